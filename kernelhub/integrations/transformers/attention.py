"""What runs in the place of an attention layer's parts while a model is accelerated.

The layer's own code goes on. It calls functions that belong to all models of its family or of
transformers, so what stands for them asks whether an accelerated layer calls, in this thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kernelhub.integrations import MAX_ROWS
from kernelhub.integrations.census import ran_stock, run
from kernelhub.integrations.transformers import families, layers
from kernelhub.integrations.transformers.families import FLOATS
from kernelhub.integrations.transformers.patches import Patch
from kernelhub.integrations.transformers.quantized import QuantizedLinear

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_BLOCK = 128  # rows of a block of fp8

_inside = threading.local()


def attention(patch: Patch, users: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
    """An attention module's own code, marked as accelerated for the functions it calls."""
    before: Any = getattr(_inside, "users", ()), getattr(_inside, "fresh", False)
    _inside.users, _inside.fresh = users, _fresh(patch.owner)
    try:
        return patch.stock(*args, **kwargs)
    finally:
        _inside.users, _inside.fresh = before
        _inside.projected = None


def _fresh(attention: nn.Module) -> bool:
    """Whether nobody but the module's own code can hold what its projections and norms return."""
    if torch_module._global_forward_hooks:
        return False
    return all(
        (type(part) in (nn.Linear, QuantizedLinear) or families.is_norm(part))
        and not part._forward_hooks
        and not families.replaced(part)
        for part in attention.children()
    )


# ---- projections -----------------------------------------------------------------------------


class _Projected(NamedTuple):
    """What remains of a product until the layers that it was made for ask for it."""

    of: Any
    x: Tensor
    version: int
    parts: dict[int, Tensor]


class Projections:
    """The projections of an attention module: one product for all, made when the first is called.

    Not where gradients flow, there are hooks or a change of a weight would not be seen: then each
    has its own.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)
        self._joined = layers.Joined()

    def part(self, index: int, x: Tensor, users: tuple[Any, ...]) -> Tensor | None:
        """The product of one projection; None where it is to be computed alone."""
        if self._refuses(x):
            return None
        made = getattr(_inside, "projected", None)
        if made is None or made.of is not self or made.x is not x or index not in made.parts:
            if not self._joined.follows(*self.parts):
                return None
            made = _inside.projected = self._product(users, x)
        elif made.version != layers.version(x):
            return None
        found: Tensor = made.parts.pop(index)
        return found

    def hold(self) -> layers.Joined:
        """Hold the joined weights, for who then lets them go."""
        return self._joined.hold(*self.parts)

    def _refuses(self, x: Tensor) -> bool:
        if not getattr(_inside, "users", ()):
            return True  # called by others than the attention module
        if any(map(layers.hooked, self.parts)):
            return True  # one may change x, or the weight of the part it is of
        quantised = isinstance(self.parts[0], QuantizedLinear)
        if layers.refusal(x, *(() if quantised else (p.weight for p in self.parts))):
            return True
        return (torch.is_grad_enabled() and x.requires_grad) or layers.wants_gradients(*self.parts)

    def _product(self, users: tuple[Any, ...], x: Tensor) -> _Projected:
        place = "query, key and value"
        y = run(layers.censuses_of(users), "fused_gemv", place, x, **self._joined(*self.parts))
        sizes = [part.weight.shape[0] for part in self.parts]
        return _Projected(self, x, layers.version(x), dict(enumerate(y.split(sizes, -1))))


@attrs.frozen(eq=False)
class Projection:
    """The `run` of a patch of one projection; `alone` runs it where it is not one with others."""

    of: Projections
    index: int
    alone: Callable[..., Tensor]

    def __call__(self, patch: Patch, users: tuple[Any, ...], input: Tensor) -> Tensor:
        found = self.of.part(self.index, input, users)
        return self.alone(patch, users, input) if found is None else found

    def hold(self) -> layers.Joined:
        return self.of.hold()


def projections(attention: nn.Module) -> Projections | None:
    """The projections of a module as one; None where they cannot be."""
    parts: list[Any] = [getattr(attention, name, None) for name in PROJECTIONS]
    if any(map(_apart, parts)) or len({_kind(part) for part in parts}) > 1:
        return None
    in_blocks = parts[0].weight.dtype is torch.float8_e4m3fn  # with scales: none crosses a border
    if in_blocks and any(part.weight.shape[0] % _BLOCK for part in parts[:-1]):
        return None
    return Projections(parts)


def _apart(part: Any) -> bool:
    """Whether a projection, or what stands for one, shares a product with no other."""
    if type(part) is QuantizedLinear:
        return families.replaced(part)
    return not isinstance(part, nn.Linear) or bool(families.linear_refusal(part))


def _kind(part: Any) -> tuple[Any, ...]:
    """What parts of one product share."""
    scale = getattr(part, "weight_scale", None)
    found = (type(part), part.weight.dtype, part.weight.shape[1:], part.bias is None)
    return (*found, None if scale is None else (scale.dtype, scale.shape[1:]))


# ---- rotary embedding ------------------------------------------------------------------------


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

    q and k `[batch, heads, seq, D]`; cos and sin `[batch or 1, seq, D]`, both halves alike. The
    interleaved form comes and goes as the family has it: in as pairs, out as halves.
    torch.compile makes one kernel of the model's code and of what stands before and after it.
    """
    if torch.compiler.is_compiling():
        return patch.stock(q, k, cos, sin, *args, **kwargs)  # type: ignore[no-any-return]
    users: tuple[Any, ...] = getattr(_inside, "users", ())
    unsqueeze_dim = kwargs.get("unsqueeze_dim", 1)
    why, counted, place = "", layers.censuses_of(users), "rotary"
    if args or unsqueeze_dim not in (1, 2) or set(kwargs) - {"unsqueeze_dim"}:
        why = "arguments that the op has not"
    elif q.dtype not in FLOATS or cos.dtype not in (torch.float32, q.dtype):
        why = f"dtypes {layers.name_of(q)} and {layers.name_of(cos)}"
    if why or not users:
        ran_stock(counted, "rotary_embedding", place, why)
        return patch.stock(q, k, cos, sin, *args, **kwargs)  # type: ignore[no-any-return]
    # The op writes in place, and these may be views of what others hold too.
    if patch.name.endswith("_interleave"):
        q, k = (torch.cat([t[..., 0::2], t[..., 1::2]], -1) for t in (q, k))
    elif not _inside.fresh or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        q, k = q.clone(), k.clone()
    table, rows = _once("table", _table, cos, sin)
    positions = rows.expand(q.shape[0], -1)
    by_token = [t.transpose(1, 2) if unsqueeze_dim == 1 else t for t in (q, k)]
    run(counted, "rotary_embedding", place, positions, *by_token, q.shape[-1], table)
    return q, k


def _table(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The op's table, a row for each position of each sequence, and the numbers of the rows."""
    half = cos.shape[-1] // 2
    table = torch.cat([cos[..., :half], sin[..., :half]], -1).flatten(0, 1)
    return table, torch.arange(table.shape[0], device=cos.device).view(cos.shape[:2])


# ---- attention over a static cache -----------------------------------------------------------


def attention_function(patch: Patch, _: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
    """transformers' choice of an attention function, `decode` for its `sdpa`."""
    found = patch.stock(*args, **kwargs)
    inside: tuple[Any, ...] = getattr(_inside, "users", ())
    return decode if inside and found is sdpa_attention_forward else found


def decode(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One new token of each sequence, without a copy of keys and values for each head.

    query `[batch, heads, 1, D]`, key and value `[batch, kv_heads, length, D]`; with a mask
    `[batch, 1, 1, length]`, which a static cache needs and torch makes additive anew in each layer.
    """
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    if (
        length != 1
        or attention_mask is None
        or attention_mask.shape[1:3] != (1, 1)
        or dropout
        or batch > MAX_ROWS
        or kwargs.get("position_bias") is not None
        or kwargs.get("softcap") is not None
    ):
        stock: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return stock
    mask = attention_mask
    if mask.dtype is torch.bool:
        mask = _once("mask", _additive, mask, query.dtype)
    grouped = _knows_groups(query.device, query.dtype)
    if not grouped:  # torch would copy: heads of one key are rows of one query instead
        query = query.reshape(batch, kv_heads, heads // kv_heads, -1)
    y = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )
    return y.reshape(batch, 1, heads, -1), None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _knows_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch chooses cuDNN, which takes several heads for a key as they are.

    Given one query a head it splits the keys among blocks. It is not for those who ask for
    deterministic algorithms, says torch.
    """
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device)[0] in (9, 10)
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.get_deterministic_debug_mode() < 2  # an error, not a warning alone
    )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))


# ---- what all layers of a step share ---------------------------------------------------------


@attrs.frozen
class _Kept:
    of: tuple[Any, ...]
    state: tuple[Any, ...]
    made: Any


def _once(name: str, make: Callable[..., Any], *given: Any) -> Any:
    """`make(*given)`, made for a step's first layer and kept, in this thread, for the others."""
    of = tuple(t for t in given if isinstance(t, Tensor))
    if torch.compiler.is_compiling() or any(t.requires_grad or t.is_inference() for t in of):
        return make(*given)  # of an inference tensor nobody can tell whether it has changed
    capturing = layers.capturing(of[0].device)
    if capturing is None:
        return make(*given)  # what was made in one graph must not be kept for another
    state = (
        capturing,
        torch.is_inference_mode_enabled(),
        *(layers.version(t) for t in of),
        *(value for value in given if not isinstance(value, Tensor)),
    )
    kept = getattr(_inside, name, None)
    if kept is not None and kept.state == state and layers.same(kept.of, of):
        return kept.made
    made = make(*given)
    setattr(_inside, name, _Kept(tuple(weakref.ref(t) for t in of), state, made))
    return made
