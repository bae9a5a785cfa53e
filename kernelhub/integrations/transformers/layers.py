"""What runs in the place of a layer's own code while a model is accelerated.

Each function is the `run` of a patch: it takes the patch, the patch's users, and the arguments of
what it stands for, and answers as that does.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernelhub.integrations import MAX_ROWS
from kernelhub.integrations.census import Census, ran_stock, run
from kernelhub.integrations.transformers.families import FLOATS
from kernelhub.integrations.transformers.patches import Patch

_inside = threading.local()


def censuses_of(users: tuple[Any, ...]) -> tuple[Census, ...]:
    """Who counts, each of them once."""
    return tuple(dict.fromkeys(u.census for u in users if u.census is not None))


def refusal(x: Tensor, *weights: Tensor) -> str:
    """Why the model's own code runs this call; empty where GEMV does."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if rows > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    if torch.is_autocast_enabled(x.device.type):
        return "under autocast"
    for tensor in (x, *weights):
        if tensor.dtype not in FLOATS or tensor.dtype is not x.dtype:
            return f"dtypes {_name(x)} and {_name(tensor)}"
    return ""


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def linear(patch: Patch, users: tuple[Any, ...], input: Tensor) -> Tensor:
    """`nn.Linear`: `[..., K]` to `[..., N]`."""
    x, layer, place = input, patch.owner, "linear"
    counted = censuses_of(users)
    why = refusal(x, layer.weight)
    if why:
        ran_stock(counted, "fused_gemv", place, why)
        return patch.stock(x)  # type: ignore[no-any-return]
    return run(counted, "fused_gemv", place, x, layer.weight, bias=layer.bias)  # type: ignore[no-any-return]


class GateUp:
    """`down(silu(gate(x)) * up(x))` with gate and up as one weight, `[2 I, K]`.

    The weight is a copy, made on first use and anew where either original has changed.
    """

    def __init__(self) -> None:
        self._made: tuple[Any, Tensor, Tensor | None] | None = None

    def __call__(self, patch: Patch, users: tuple[Any, ...], x: Tensor) -> Tensor:
        mlp, place = patch.owner, "gate-up with SwiGLU"
        counted = censuses_of(users)
        why = refusal(x, mlp.gate_proj.weight, mlp.up_proj.weight)
        if not why and any(_hooked(part) for part in (mlp.gate_proj, mlp.up_proj)):
            why = "hooks on gate or up"
        if why:
            ran_stock(counted, "fused_gemv", place, why)
            return patch.stock(x)  # type: ignore[no-any-return]
        weight, bias = self._weight(mlp.gate_proj, mlp.up_proj)
        y = run(counted, "fused_gemv", place, x, weight, bias=bias, activation="swiglu")
        return mlp.down_proj(y)  # type: ignore[no-any-return]

    def _weight(self, gate: nn.Linear, up: nn.Linear) -> tuple[Tensor, Tensor | None]:
        parts = [t for t in (gate.weight, up.weight, gate.bias, up.bias) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in parts):
            return joined(gate, up)  # a copy that is kept would keep its graph
        state = [(t.data_ptr(), t.device, t.dtype, _version(t)) for t in parts]
        made = self._made
        if made is None or made[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # to be used in any mode
                made = self._made = (state, *joined(gate, up))
        return made[1], made[2]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def joined(gate: nn.Linear, up: nn.Linear) -> tuple[Tensor, Tensor | None]:
    bias = None if gate.bias is None else torch.cat([gate.bias, up.bias])
    return torch.cat([gate.weight, up.weight]), bias


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def experts(
    module: Any,
    stock: Callable[..., Tensor],
    users: tuple[Any, ...],
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
) -> Tensor:
    """An experts module: x `[M, K]`, the router's ids and weights `[M, k]`, to `[M, K]`."""
    counted = censuses_of(users)
    why = refusal(x, module.gate_up_proj, module.down_proj)
    if why:
        ran_stock(counted, "fused_moe_gemv", "experts", why)
        return stock(module, x, topk_ids, topk_weights)
    return expert_layers(
        counted, x, topk_ids, topk_weights, (module.gate_up_proj, None), (module.down_proj, None)
    )


def expert_layers(
    counted: tuple[Census, ...],
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    **scheme: Any,
) -> Tensor:
    """Both products of an expert layer: gate-up with SwiGLU, then down, weighted and summed.

    `gate_up` and `down` are weights with their scales; topk_weights of any float dtype.
    """
    op = "fused_moe_gemv"
    if topk_weights.dtype not in FLOATS:
        topk_weights = topk_weights.float()
    y = run(
        counted, op, "experts gate-up with SwiGLU", x, gate_up[0], topk_ids,
        weight_scale=gate_up[1], activation="swiglu", **scheme,
    )  # fmt: skip
    return run(  # type: ignore[no-any-return]
        counted, op, "experts down, weighted and summed", y, down[0], topk_ids, topk_weights,
        weight_scale=down[1], reduce=True, **scheme,
    )  # fmt: skip


def attention(patch: Patch, users: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
    """An attention module's own code, marked as accelerated for the rotary function it calls."""
    before = getattr(_inside, "users", ())
    _inside.users = users
    try:
        return patch.stock(*args, **kwargs)
    finally:
        _inside.users = before


def rotary(
    patch: Patch,
    _: tuple[Any, ...],
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)` of a family's module.

    The function belongs to all models of the family, so it asks whether an accelerated attention
    module calls it. q and k `[batch, heads, seq, D]`; cos and sin `[batch or 1, seq, D]`, both
    halves alike. The interleaved form comes and goes as the family has it: in as pairs, out as
    halves.
    """
    users = getattr(_inside, "users", ())
    unsqueeze_dim = kwargs.get("unsqueeze_dim", 1)
    why, counted, place = "", censuses_of(users), "rotary"
    if args or unsqueeze_dim not in (1, 2) or set(kwargs) - {"unsqueeze_dim"}:
        why = "arguments that the op has not"
    elif q.dtype not in FLOATS or cos.dtype not in (torch.float32, q.dtype):
        why = f"dtypes {_name(q)} and {_name(cos)}"
    if why or not users:
        ran_stock(counted, "rotary_embedding", place, why)
        return patch.stock(q, k, cos, sin, *args, **kwargs)  # type: ignore[no-any-return]
    # The op writes in place, and these are views of what the projections returned: copy.
    if patch.name.endswith("_interleave"):
        q, k = (torch.cat([t[..., 0::2], t[..., 1::2]], -1) for t in (q, k))
    else:
        q, k = q.clone(), k.clone()
    half = cos.shape[-1] // 2
    table = torch.cat([cos[..., :half], sin[..., :half]], -1).flatten(0, 1)
    rows = torch.arange(table.shape[0], device=q.device).view(cos.shape[:2])
    positions = rows.expand(q.shape[0], -1)
    by_token = [t.transpose(1, 2) if unsqueeze_dim == 1 else t for t in (q, k)]
    run(counted, "rotary_embedding", place, positions, *by_token, q.shape[-1], table)
    return q, k


class SharedExperts:
    """A block that adds shared experts to routed ones: `routed * factor + shared`.

    The family's router multiplies its weights by the factor; here a twin of the router, of the same
    parameters, leaves it out.
    """

    def __init__(self, block: Any) -> None:
        self._router = copy.copy(block.gate)  # shares parameters, buffers and hooks
        self._router.routed_scaling_factor = 1.0

    def __call__(self, patch: Patch, users: tuple[Any, ...], hidden_states: Tensor) -> Tensor:
        x, block, place = hidden_states, patch.owner, "routed * factor + shared"
        if x.dtype not in FLOATS:
            ran_stock(censuses_of(users), "fused_mul_add", place, f"dtype {_name(x)}")
            return patch.stock(x)  # type: ignore[no-any-return]
        _, topk_weights, topk_ids = self._router(x)
        routed = block.experts(x.view(-1, x.shape[-1]), topk_ids, topk_weights).view(x.shape)
        shared = block.shared_experts(x)
        factor = float(block.gate.routed_scaling_factor)
        return run(censuses_of(users), "fused_mul_add", place, routed, shared, factor)  # type: ignore[no-any-return]
