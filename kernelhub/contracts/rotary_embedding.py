"""rotary_embedding: rotate query and key by their positions, in place."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernelhub.backends.reference.rotary_embedding import rotary_embedding as _reference
from kernelhub.contracts import _bounds
from kernelhub.contracts._rotary_embedding_cases import cases
from kernelhub.errors import ArgumentError
from kernelhub.spec import (
    Args,
    Cost,
    Expected,
    OpSpec,
    Param,
    TensorDesc,
    overlaps_itself,
    same_storage_span,
)

NAME = "rotary_embedding"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32, torch.int64)
_FP32_TINY = torch.finfo(torch.float32).tiny


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int | None,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
    *,
    rot_dim: int | None = None,
    cos_sin_cache_offsets: Tensor | None = None,
) -> None:
    """Rotate the first `rot_dim` lanes of query and key heads by their token's position, in place.

    With `c, s` the two halves of row `positions + cos_sin_cache_offsets` of the cache, each
    pair of lanes `(x, y)` becomes `(x c - y s, y c + x s)`, in fp32, rounded once.

    Args:
        positions: `[T]`, or `[batch, seq]`; int32 or int64. A row outside `[0, P)` leaves its
            token's query and key as they are.
        query: `[T, Hq, D]` or `[T, Hq*D]` (T stands for `batch, seq` where positions has both);
            fp32, fp16 or bf16; written in place through any strides, so that slices of a packed
            QKV tensor and transposed layouts work. Its elements may not overlap.
        key: `[T, Hk, D]` or `[T, Hk*D]`, in the same form, dtype and device as `query`, with any
            number of heads; None where only `query` turns. Apart from `query` in memory.
        head_size: D. Needed where `query` has no head dimension; may be None where it has.
        cos_sin_cache: `[P, rot_dim]`, cosines of the rot_dim/2 frequencies, then sines; fp32 or
            the dtype of `query`; any strides.
        is_neox: True pairs lanes `i` and `i + rot_dim/2` (GPT-NeoX), False `2i` and `2i + 1`
            (GPT-J).
        rot_dim: even, at most D. The width of `cos_sin_cache`, which is its default. Lanes past it
            are untouched.
        cos_sin_cache_offsets: shape of `positions`; int32 or int64. Added to it, in int64; a sum
            that int64 cannot hold is out of range.

    Returns:
        None.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, `head_size` is missing, `rot_dim` is
            not the width of the cache, or elements of `query` and `key` overlap.

    Supported:
        reference: any device, differentiable
        cuda, musa: devices of their own, no derivative
        simt: CPU tensors, for tests, no derivative

    Cost: reads and writes the rotated lanes, reads a row of the cache for each token; 3 operations
    a rotated lane.
    Definition: RoFormer (arXiv 2104.09864), equation 34, with the table of angles precomputed.
    """
    raise NotImplementedError


def _head_size(a: Args) -> int:
    """D: the last dimension where heads have one of their own."""
    size: int = a.query.shape[-1] if a.query.dim() == a.positions.dim() + 2 else a.head_size
    return size


def _num_heads(a: Args, t: Any) -> int:
    lanes: int = t.shape[-1] * (t.shape[-2] if t.dim() == a.positions.dim() + 2 else 1)
    return lanes // _head_size(a)


def check(a: Args) -> None:
    tokens = a.positions.dim()
    forms = (
        "[T, Hq, D] or [T, Hq*D]" if tokens == 1 else "[batch, seq, Hq, D] or [batch, seq, Hq*D]"
    )
    if a.query.dim() - tokens not in (1, 2):
        raise ArgumentError(NAME, "query", f"{forms} for {tokens}-dimensional positions", a.query)
    flat = a.query.dim() == tokens + 1
    if tuple(a.positions.shape) != tuple(a.query.shape[:tokens]):
        wanted = f"one for each token of 'query', {list(a.query.shape[:tokens])}"
        raise ArgumentError(NAME, "positions", wanted, a.positions)
    offsets = a.cos_sin_cache_offsets
    if offsets is not None and tuple(offsets.shape) != tuple(a.positions.shape):
        wanted = f"the shape of 'positions', {list(a.positions.shape)}"
        raise ArgumentError(NAME, "cos_sin_cache_offsets", wanted, offsets)
    _check_heads(a, flat)
    _check_key(a, flat, tokens)
    _check_cache(a)
    for name in ("query", "key"):
        tensor = getattr(a, name)
        if tensor is None:
            continue
        if overlaps_itself(tensor):
            strides = f"strides {list(tensor.stride())}"
            raise ArgumentError(NAME, name, "no overlapping elements", strides)
        for read in ("positions", "cos_sin_cache", "cos_sin_cache_offsets"):
            if _share_memory(tensor, getattr(a, read)):
                raise ArgumentError(
                    NAME, name, f"memory apart from '{read}'", "overlapping elements"
                )
    if a.key is not None and _share_memory(a.query, a.key):
        raise ArgumentError(NAME, "key", "memory apart from 'query'", "overlapping elements")


def _check_heads(a: Args, flat: bool) -> None:
    width = a.query.shape[-1]
    if flat:
        if a.head_size is None or a.head_size <= 0:
            wanted = "D > 0, for 'query' has no head dimension"
            raise ArgumentError(NAME, "head_size", wanted, a.head_size)
        if width % a.head_size != 0:
            wanted = f"a divisor of Hq*D = {width}, the last dimension of 'query'"
            raise ArgumentError(NAME, "head_size", wanted, a.head_size)
    elif a.head_size is not None and a.head_size != width:
        wanted = f"D = {width}, the last dimension of 'query', or None"
        raise ArgumentError(NAME, "head_size", wanted, a.head_size)


def _check_key(a: Args, flat: bool, tokens: int) -> None:
    if a.key is None:
        return
    if a.key.dtype != a.query.dtype:
        raise ArgumentError(NAME, "key", f"dtype {a.query.dtype}, as 'query'", a.key)
    size = _head_size(a)
    last = f"Hk*{size}" if flat else f"Hk, {size}"
    fits = (
        a.key.dim() == a.query.dim()
        and tuple(a.key.shape[:tokens]) == tuple(a.query.shape[:tokens])
        and (a.key.shape[-1] % size == 0 if flat else a.key.shape[-1] == size)
    )
    if not fits:
        lead = ", ".join(str(n) for n in a.query.shape[:tokens])
        raise ArgumentError(NAME, "key", f"[{lead}, {last}], as 'query'", a.key)


def _check_cache(a: Args) -> None:
    cache, size = a.cos_sin_cache, _head_size(a)
    if cache.dtype not in (torch.float32, a.query.dtype):
        wanted = "dtype float32 or that of 'query'"
        raise ArgumentError(NAME, "cos_sin_cache", wanted, cache)
    width = cache.shape[1]
    if a.rot_dim is not None and a.rot_dim != width:
        wanted = f"the width of 'cos_sin_cache', {width}, or None"
        raise ArgumentError(NAME, "rot_dim", wanted, a.rot_dim)
    if not 0 < width <= size or width % 2 != 0:
        wanted = f"[P, rot_dim] with rot_dim even and 0 < rot_dim <= D = {size}"
        raise ArgumentError(NAME, "cos_sin_cache", wanted, cache)


def _share_memory(a: Any, b: Any) -> bool:
    """Whether an element of `a` overlaps one of `b`.

    Unlike the spans of bytes, right for tensors that interleave, such as the query and key slices
    of a packed QKV tensor. A layout too odd to decide in a few steps counts as apart.
    """
    if not same_storage_span(a, b):
        return False
    distance = b.data_ptr() - a.data_ptr()
    size_a, size_b = a.element_size(), b.element_size()
    return _layouts_meet(distance, size_a, a.shape, a.stride(), size_b, b.shape, b.stride())


# Distances followed at once: real layouts need a handful.
_MOST_DISTANCES = 1024


@lru_cache(maxsize=256)
def _layouts_meet(
    distance: int,
    size_a: int,
    shape_a: tuple[int, ...],
    stride_a: tuple[int, ...],
    size_b: int,
    shape_b: tuple[int, ...],
    stride_b: tuple[int, ...],
) -> bool:
    """Whether elements of two layouts, `distance` bytes apart, overlap."""
    # An element of b minus one of a is `distance + sum(n * step)`, where for each distinct step n
    # is any integer between `low` and `high`. Follow the sums that can still come near zero.
    low: dict[int, int] = {}
    high: dict[int, int] = {}
    for count, stride in zip(shape_a, stride_a, strict=True):
        low[stride * size_a] = low.get(stride * size_a, 0) - (count - 1)
    for count, stride in zip(shape_b, stride_b, strict=True):
        high[stride * size_b] = high.get(stride * size_b, 0) + (count - 1)
    steps = sorted({*low, *high} - {0}, reverse=True)
    below = sum(low.get(step, 0) * step for step in steps)
    above = sum(high.get(step, 0) * step for step in steps)
    distances = {distance}
    for step in steps:
        below -= low.get(step, 0) * step
        above -= high.get(step, 0) * step
        reached: set[int] = set()
        for start in distances:
            first = max(low.get(step, 0), (-size_b - start - above) // step + 1)
            last = min(high.get(step, 0), (size_a - 1 - start - below) // step)
            if last - first + len(reached) >= _MOST_DISTANCES:
                return False
            reached.update(start + n * step for n in range(first, last + 1))
        distances = reached
    return any(-size_b < left < size_a for left in distances)


def outputs(a: Args) -> tuple[TensorDesc, ...]:
    return ()


def oracle(a: Args, chain: int | None = None) -> tuple[Expected, ...]:
    given = [("query", a.query)] + ([("key", a.key)] if a.key is not None else [])
    return tuple(_rotated(a, name, tensor) for name, tensor in given)


def _rotated(a: Args, name: str, tensor: Tensor) -> Expected:
    """Each token in range rotated in float64; the rest as it was, exactly."""
    num_rows, rot_dim = a.cos_sin_cache.shape
    positions = a.positions.reshape(-1).tolist()
    offsets = a.cos_sin_cache_offsets
    shifts = [0] * len(positions) if offsets is None else offsets.reshape(-1).tolist()
    rows = [position + shift for position, shift in zip(positions, shifts, strict=True)]
    turned = [token for token, row in enumerate(rows) if 0 <= row < num_rows]  # exact integers

    value = tensor.double().reshape(len(rows), _num_heads(a, tensor), _head_size(a))
    bound = torch.zeros_like(value)
    first = list(range(rot_dim // 2)) if a.is_neox else list(range(0, rot_dim, 2))
    second = [lane + (rot_dim // 2 if a.is_neox else 1) for lane in first]
    angles = a.cos_sin_cache.double()[[rows[token] for token in turned]].unsqueeze(1)
    cos, sin = angles.tensor_split(2, dim=-1)
    old, new, error = value[turned], value[turned], bound[turned]
    x, y = old[..., first], old[..., second]
    for lanes, left, right in ((first, x * cos, -y * sin), (second, y * cos, x * sin)):
        total = left + right
        # Either product and their sum are rounded once in fp32 (or flushed, where that small).
        fp32 = _bounds.FP32_UNIT * (left.abs() + right.abs() + total.abs()) + 2 * _FP32_TINY
        new[..., lanes] = total
        error[..., lanes] = _bounds.rounded(total, fp32, tensor.dtype)
    value[turned], bound[turned] = new, error
    return Expected(name, value.reshape(tensor.shape), bound.reshape(tensor.shape))


def cost(a: Args) -> Cost:
    num_rows, rot_dim = a.cos_sin_cache.shape
    num_tokens = a.positions.numel()
    num_heads = sum(_num_heads(a, t) for t in (a.query, a.key) if t is not None)
    lanes = num_tokens * num_heads * rot_dim
    read = lanes * a.query.element_size() + num_tokens * a.positions.element_size()
    # Tokens may share rows, so no more than the whole cache has to move.
    read += min(num_tokens, num_rows) * rot_dim * a.cos_sin_cache.element_size()
    if a.cos_sin_cache_offsets is not None:
        read += num_tokens * a.cos_sin_cache_offsets.element_size()
    return Cost(read, lanes * a.query.element_size(), 3 * lanes)


SPEC = OpSpec(
    prototype=rotary_embedding,
    params=(
        Param("positions", dtypes=INTS, ranks=range(1, 3), shape="[T] or [batch, seq]"),
        Param("query", "in_place", dtypes=FLOATS, ranks=range(2, 5), shape="[T, Hq, D]"),
        Param(
            "key", "in_place", dtypes=FLOATS, ranks=range(2, 5), shape="[T, Hk, D]", optional=True
        ),
        Param("head_size", "attribute", types=(int,), optional=True, fixed=True),
        Param("cos_sin_cache", dtypes=FLOATS, ranks=range(2, 3), shape="[P, rot_dim]", fixed=True),
        Param("is_neox", "attribute", types=(bool,), fixed=True),
        Param("rot_dim", "attribute", types=(int,), optional=True, fixed=True),
        Param("cos_sin_cache_offsets", dtypes=INTS, ranks=range(1, 3), shape="[T]", optional=True),
    ),
    check=check,
    outputs=outputs,
    reference=_reference,
    oracle=oracle,
    cases=cases,
    cost=cost,
    device_param="query",
    num_outputs=0,
)
