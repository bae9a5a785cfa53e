"""What runs in the place of a layer's own code while a model is accelerated.

Each function is the `run` of a patch: it takes the patch, the patch's users, and the arguments of
what it stands for, and answers as that does.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from kernelhub.integrations import too_many_rows
from kernelhub.integrations.census import Census, ran_stock, run
from kernelhub.integrations.transformers import families
from kernelhub.integrations.transformers.families import FLOATS
from kernelhub.integrations.transformers.patches import Patch


def censuses_of(users: tuple[Any, ...]) -> tuple[Census, ...]:
    """Who counts, each of them once."""
    return tuple(dict.fromkeys(u.census for u in users if u.census is not None))


def refusal(x: Tensor, *weights: Tensor, rows: int | None = None) -> str:
    """Why the model's own code runs this call; empty where GEMV does. `rows` of x, if not all."""
    why = too_many_rows(x, rows)
    if why:
        return why
    if torch.is_autocast_enabled(x.device.type):
        return "under autocast"
    for tensor in (x, *weights):
        if tensor.dtype not in FLOATS or tensor.dtype is not x.dtype:
            return f"dtypes {name_of(x)} and {name_of(tensor)}"
    return ""


def name_of(tensor: Tensor) -> str:
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


class Joined:
    """The weights of layers that read the same input, one below the other.

    A copy, made on first use and anew where an original has changed or another is in its place.
    While somebody `hold`s it, the originals do not change, and nothing looks whether they have.
    """

    def __init__(self) -> None:
        self._made: tuple[Any, Any, dict[str, Any]] | None = None
        self._holders = 0
        self.held: dict[str, Any] | None = None

    def __call__(self, *layers: nn.Module) -> dict[str, Any]:
        """What `fused_gemv` takes: weight, weight_scale and bias of all layers."""
        if wants_gradients(*layers):
            return join(*layers)  # a copy that is kept would keep its graph
        held = self.held  # another thread may let go meanwhile
        if held is not None:
            return held
        tensors = _tensors(layers)
        state = [(t.data_ptr(), t.device, t.dtype, version(t)) for t in tensors]
        made = self._made
        if made is None or made[1] != state or not same(made[0], tensors):
            if capturing(tensors[0].device):
                return join(*layers)  # it has no numbers before the graph is replayed
            of = tuple(map(weakref.ref, tensors))
            made = self._made = (of, state, _join_for_any_mode(*layers))
        return made[2]

    def follows(self, *layers: nn.Module) -> bool:
        """Whether a change of the layers' weights would be seen, or is promised not to come.

        Tensors made under inference_mode do not tell, and torch.compile sees no change at all.
        """
        if self.held is not None and not wants_gradients(*layers):
            return True
        if torch.compiler.is_compiling():
            return False
        weights: Iterable[Any] = (layer.weight for layer in layers)
        return not any(weight.is_inference() for weight in weights)

    def hold(self, *layers: nn.Module) -> Joined:
        """Make the copy now, for one who promises that the layers do not change until `let_go`."""
        if self.held is None:
            made = _join_for_any_mode(*layers)
            for tensor in made.values():
                if tensor is not None:  # torch.compile's graphs read it where it lies
                    torch._dynamo.mark_static_address(tensor)
            self.held, self._made = made, None
        self._holders += 1
        return self

    def let_go(self) -> None:
        self._holders -= 1
        if not self._holders:
            self.held = None


def same(of: Iterable[Any], tensors: Iterable[Tensor]) -> bool:
    """Whether these are the very tensors that weak references are of."""
    return all(ref() is t for ref, t in zip(of, tensors, strict=True))


_TENSORS = ("weight", "weight_scale", "bias")


def _tensors(layers: Iterable[nn.Module]) -> list[Tensor]:
    found = (getattr(layer, name, None) for name in _TENSORS for layer in layers)
    return [t for t in found if t is not None]


def wants_gradients(*layers: nn.Module) -> bool:
    """Whether the weights of layers are to have gradients."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(layers))


def join(*layers: nn.Module) -> dict[str, Any]:
    """Weights of nn.Linear, or of quantised layers whose blocks end where each layer ends."""
    parts = {
        n: [t for t in (getattr(x, n, None) for x in layers) if t is not None] for n in _TENSORS
    }
    return {name: torch.cat(tensors) if tensors else None for name, tensors in parts.items()}


def _join_for_any_mode(*layers: nn.Module) -> dict[str, Any]:
    with torch.inference_mode(False), torch.no_grad():
        return join(*layers)


def capturing(device: torch.device) -> bool | None:
    """Whether calls go into a graph; None where the device's module does not tell."""
    if device.type == "cpu":
        return False
    module = getattr(torch, device.type, None)
    tell = getattr(module, "is_current_stream_capturing", None)
    return None if tell is None else bool(tell())


def version(t: Tensor) -> int:
    """Changes with t's numbers, but for inference tensors and where torch.compile traces."""
    return 0 if torch.compiler.is_compiling() or t.is_inference() else t._version


class GateUp:
    """`down(silu(gate(x)) * up(x))` with gate and up as one weight, `[2 I, K]`.

    Where a change of gate or up would be missed, and where others have put something of theirs on
    these or on the activation since the model was entered, the model's own code runs.
    """

    def __init__(self, mlp: Any) -> None:
        self._mlp = mlp
        self._gate_up, self._activation = (mlp.gate_proj, mlp.up_proj), mlp.act_fn
        self._joined = Joined()

    def __call__(self, patch: Patch, users: tuple[Any, ...], x: Tensor) -> Tensor:
        mlp, gate_up, place = self._mlp, self._gate_up, "gate-up with SwiGLU"
        counted = censuses_of(users)
        why = self._changed() or refusal(x, gate_up[0].weight, gate_up[1].weight)
        if not why and not self._joined.follows(*gate_up):
            why = "changes of gate and up would not be seen"
        if why:
            ran_stock(counted, "fused_gemv", place, why)
            return patch.stock(x)  # type: ignore[no-any-return]
        y = run(counted, "fused_gemv", place, x, **self._joined(*gate_up), activation="swiglu")
        return mlp.down_proj(y)  # type: ignore[no-any-return]

    def _changed(self) -> str:
        """What others have done to gate, up or the activation; empty where nothing."""
        mlp, (gate, up), activation = self._mlp, self._gate_up, self._activation
        if mlp.gate_proj is not gate or mlp.up_proj is not up or mlp.act_fn is not activation:
            return "gate, up or the activation is another"
        for part in (gate, up, activation):
            if hooked(part):
                return "hooks on gate, up or the activation"
            if families.replaced(part):
                return "a forward of others on gate, up or the activation"
        return ""

    def hold(self) -> Joined:
        """Hold the joined weights, for who then lets them go."""
        return self._joined.hold(*self._gate_up)


def hooked(module: nn.Module) -> bool:
    """Whether a call of a module runs hooks: its own, or those of all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def rms_norm(patch: Patch, users: tuple[Any, ...], hidden_states: Tensor) -> Tensor:
    """RMSNorm by torch's own function: two kernels on CUDA, where the model's code takes eight.

    x `[batch, seq, ..., D]`. Two and not one, for the model rounds before it multiplies by the
    weight. torch.compile makes one kernel of the model's code.
    """
    x, norm = hidden_states, patch.owner
    tokens = x.shape[: min(2, x.dim() - 1)].numel()
    if torch.compiler.is_compiling() or refusal(x, norm.weight, rows=tokens):
        return patch.stock(x)  # type: ignore[no-any-return]
    y: Tensor = norm.weight * F.rms_norm(x, norm.weight.shape, None, norm.variance_epsilon)
    return y


def router(
    patch: Patch, users: tuple[Any, ...], hidden_states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A router by softmax: logits `[M, E]`, weights and ids of the experts chosen, `[M, k]`.

    Where the weights of those chosen are divided by their sum, a softmax over them alone is the
    same. Those chosen come in any order: who sums over them does not ask for one, and torch sorts
    by a kernel of its own.
    """
    gate, place = patch.owner, "router"
    counted = censuses_of(users)
    x = hidden_states.reshape(-1, gate.hidden_dim)
    why = refusal(x, gate.weight)
    if why:
        ran_stock(counted, "fused_gemv", place, why)
        return patch.stock(hidden_states)  # type: ignore[no-any-return]
    logits: Tensor = run(counted, "fused_gemv", place, x, gate.weight)
    divided = getattr(gate, "norm_topk_prob", True)  # Mixtral, which has no choice, divides
    weights, ids = choose(logits, gate.top_k, divided)
    if hasattr(gate, "norm_topk_prob"):  # Qwen3-MoE rounds, Mixtral does not
        weights = weights.to(logits.dtype)
    return logits, weights, ids


_COMPARED = 512
"""Experts, up to which each is compared with each under torch.compile; measured with 128."""


def choose(logits: Tensor, k: int, divided: bool) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `[M, E]`: shares by softmax, in fp32, and ids, `[M, k]`.

    Shares of all E, or, `divided` by their sum, of those chosen. NaN makes all shares NaN.
    """
    if torch.compiler.is_compiling() and logits.shape[-1] <= _COMPARED:
        return _choose_by_rank(logits.float(), k, divided)
    if divided:
        chosen, ids = logits.topk(k, dim=-1, sorted=False)
        return torch.softmax(chosen, -1, dtype=torch.float32), ids
    shares = torch.softmax(logits, -1, dtype=torch.float32)
    chosen, ids = shares.topk(k, dim=-1, sorted=False)
    return chosen, ids


def _choose_by_rank(x: Tensor, k: int, divided: bool) -> tuple[Tensor, Tensor]:
    """In two kernels of torch.compile, of a reduction each: `topk` and a softmax are three.

    What one kernel is to compute has one shape here, where it need not, too: `[M, E, E]` and
    `[M, k, E]`, summed over the last dimension.
    """
    m, size = x.shape
    places = torch.arange(size, device=x.device)
    keys = torch.where(x.isnan(), float("inf"), x)
    others, own = keys[:, None, :].expand(m, size, size), keys[:, :, None]
    ahead = (others > own) | ((others == own) & (places < places[:, None]))
    rank = ahead.sum(-1, dtype=torch.int32)  # 0 to E - 1, each once
    share = torch.exp(x - others.amax(-1))
    at = rank[:, None, :] == places[:k, None]
    of = torch.where(rank < k, share, 0.0) if divided else share
    total = of[:, None, :].expand(m, k, size).sum(-1)
    chosen = torch.where(at, share[:, None, :], 0.0).sum(-1)
    return chosen / total, torch.where(at, places, 0).sum(-1)


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


_FACTOR = "routed_scaling_factor"


def _without_factor(router: nn.Module) -> Any:
    twin = copy.copy(router)  # shares parameters and buffers
    setattr(twin, _FACTOR, 1.0)
    return twin


def _out_of_date(twin: nn.Module, router: nn.Module) -> bool:
    """Whether an attribute has been set since the twin was made, or the router is another."""
    own, of_twin = vars(router), vars(twin)
    return any(of_twin.get(name) is not own[name] for name in own if name != _FACTOR)


class SharedExperts:
    """A block that adds shared experts to routed ones: `routed * factor + shared`.

    The family's router multiplies its weights by the factor; here a twin of the router, of the same
    parameters, leaves it out. What others put on the router would see the twin's weights, or the
    router itself: then the block's own code runs.
    """

    def __init__(self, block: Any) -> None:
        self._router = _without_factor(block.gate)

    def __call__(self, patch: Patch, users: tuple[Any, ...], hidden_states: Tensor) -> Tensor:
        x, block, place = hidden_states, patch.owner, "routed * factor + shared"
        why = "" if x.dtype in FLOATS else f"dtype {name_of(x)}"
        if families.replaced(block.gate) or hooked(block.gate):
            why = "hooks or a forward of others on the router"
        if why:
            ran_stock(censuses_of(users), "fused_mul_add", place, why)
            return patch.stock(x)  # type: ignore[no-any-return]
        if not torch.compiler.is_compiling() and _out_of_date(self._router, block.gate):
            self._router = _without_factor(block.gate)
        _, topk_weights, topk_ids = self._router(x)
        routed = block.experts(x.view(-1, x.shape[-1]), topk_ids, topk_weights).view(x.shape)
        shared = block.shared_experts(x)
        factor = float(block.gate.routed_scaling_factor)
        return run(censuses_of(users), "fused_mul_add", place, routed, shared, factor)  # type: ignore[no-any-return]
