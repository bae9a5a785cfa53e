"""Quantise weights and activations into the layouts of fused_gemv and fused_moe_gemv.

Offline tools: they read the data, and say so where it cannot be quantised. All of them take any
leading dimensions, such as the experts of a mixture: `[E, N, K]`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelhub.errors import ArgumentError

FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CODES_PER_ELEMENT = {torch.uint8: 2, torch.int8: 2, torch.int32: 8}
_GROUPS = (32, 64, 128)


@torch.no_grad()
def quantize_int4(
    weight: Tensor,
    group_size: int | None = 128,
    *,
    zero_point: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    packed_dtype: torch.dtype = torch.uint8,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise a weight to int4: `value = (code - zero) * scale`, codes 0..15, round to nearest.

    Args:
        weight: `[..., N, K]`; fp32, fp16 or bf16, finite.
        group_size: elements along K that share a scale: 32, 64, 128, K, or None for K. Divides K.
        zero_point: False: zero is 8, and `scale = max|value| / 7`; code 0 is not used, so that both
            signs reach as far. True: a zero point for each group, and `scale` spans its least to
            its greatest value, zero always within.
        scale_dtype: fp32, fp16 or bf16. Codes are chosen for the scale as rounded to it.
        packed_dtype: uint8 or int8 (K even), or int32 (K a multiple of 8); low nibble first.

    Returns:
        The packed weight `[..., N, K/2]` or `[..., N, K/8]`, the scales `[..., N, K/g]`, and the
        zero points, uint8 `[..., N, K/g]`, or None. A value comes back within half its scale (with
        zero points, 15 unit roundoffs of `scale_dtype` more). A group of zeros gets scale 1; no
        scale is below the normal numbers of `scale_dtype`, which accelerators may flush.

    Raises:
        ArgumentError: a dtype, shape or group size does not fit, or the weight holds a NaN, an
            infinity, a group whose scale is beyond `scale_dtype`, or a value so near the largest of
            fp32 that its code stands for one beyond.
    """
    op = "quantize_int4"
    _check_values(op, "weight", weight, rank=2)
    _check_choice(op, "scale_dtype", scale_dtype, _FLOATS)
    _check_choice(op, "packed_dtype", packed_dtype, tuple(_CODES_PER_ELEMENT))
    k = weight.shape[-1]
    group = _int4_group(op, group_size, k)
    if k % _CODES_PER_ELEMENT[packed_dtype] != 0:
        wanted = f"K a multiple of {_CODES_PER_ELEMENT[packed_dtype]} to pack as {packed_dtype}"
        raise ArgumentError(op, "weight", wanted, weight)
    values = weight.float().reshape(*weight.shape[:-1], k // group, group)
    if zero_point:
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        span = high - low  # beyond fp32 where both are near its largest
        step = torch.where(span.isfinite(), span / 15, high / 15 - low / 15)
        scale = _int4_scale(op, step, scale_dtype)
        zero = (-low / scale.float()).round().clamp(0, 15)
    else:
        scale = _int4_scale(op, values.abs().amax(-1) / 7, scale_dtype)
        zero = torch.full_like(scale, 8, dtype=torch.float32)
    steps = (values / scale.float().unsqueeze(-1)).round()
    codes = (steps + zero.unsqueeze(-1)).clamp(0, 15)
    for end in (codes.amin(-1), codes.amax(-1)):
        if not bool(((end - zero) * scale.float()).isfinite().all()):
            largest = f"values up to {float(values.abs().max()):.3g}"
            raise ArgumentError(op, "weight", "values whose codes come back finite", largest)
    packed = pack_int4(codes.to(torch.uint8).flatten(-2), packed_dtype)
    return packed, scale, zero.to(torch.uint8) if zero_point else None


def dequantize_int4(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values of an int4 weight: `(code - zero) * scale`, computed in fp32.

    Args:
        weight: packed codes, uint8 or int8 `[..., N, K/2]` or int32 `[..., N, K/8]`.
        scale: `[..., N, K/g]`; fp32, fp16 or bf16. g is K over its columns.
        zero: uint8 `[..., N, K/g]`; 8 where not given.
        dtype: of the result; fp32, fp16 or bf16.

    Returns:
        Tensor `[..., N, K]`.

    Raises:
        ArgumentError: dtypes or shapes do not fit.
    """
    op = "dequantize_int4"
    _check_choice(op, "dtype", dtype, _FLOATS)
    codes = unpack_int4(weight)
    _check_tensor(op, "scale", scale, _FLOATS)
    groups = scale.shape[-1] if scale.dim() else 0
    k = codes.shape[-1]
    if scale.shape[:-1] != codes.shape[:-1] or groups == 0 or k % groups != 0:
        raise ArgumentError(op, "scale", f"[..., N, K/g] for codes {list(codes.shape)}", scale)
    if zero is not None:
        _check_tensor(op, "zero", zero, (torch.uint8,))
        if zero.shape != scale.shape:
            raise ArgumentError(op, "zero", f"the shape of 'scale', {list(scale.shape)}", zero)
    steps = codes.reshape(*scale.shape, k // groups).float()
    steps = steps - (8 if zero is None else zero.float().unsqueeze(-1))
    values: Tensor = steps * scale.float().unsqueeze(-1)
    return values.flatten(-2).to(dtype)


def pack_int4(codes: Tensor, packed_dtype: torch.dtype = torch.uint8) -> Tensor:
    """Pack codes 0..15 along the last dimension, low nibble first.

    Args:
        codes: `[..., K]`, an integer tensor.
        packed_dtype: uint8 or int8 (K even), or int32 (K a multiple of 8): the same bytes, the
            lowest address first (little-endian).

    Returns:
        Tensor `[..., K/2]` or `[..., K/8]`.

    Raises:
        ArgumentError: K does not fit, or a code is outside 0..15.
    """
    op = "pack_int4"
    _check_tensor(op, "codes", codes, (torch.uint8, torch.int8, torch.int32, torch.int64), rank=1)
    _check_choice(op, "packed_dtype", packed_dtype, tuple(_CODES_PER_ELEMENT))
    if codes.shape[-1] % _CODES_PER_ELEMENT[packed_dtype] != 0:
        wanted = f"K a multiple of {_CODES_PER_ELEMENT[packed_dtype]} to pack as {packed_dtype}"
        raise ArgumentError(op, "codes", wanted, codes)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > 15):
        raise ArgumentError(op, "codes", "values 0..15", f"{int(codes.min())}..{int(codes.max())}")
    low, high = codes[..., 0::2].to(torch.uint8), codes[..., 1::2].to(torch.uint8)
    return (low | (high << 4)).contiguous().view(packed_dtype)


def unpack_int4(weight: Tensor) -> Tensor:
    """Codes 0..15 of a packed weight: the inverse of `pack_int4`.

    Args:
        weight: uint8 or int8 `[..., K/2]`, or int32 `[..., K/8]`.

    Returns:
        Tensor `[..., K]`, uint8.

    Raises:
        ArgumentError: another dtype.
    """
    _check_tensor("unpack_int4", "weight", weight, tuple(_CODES_PER_ELEMENT), rank=1)
    # A view as bytes needs a last stride of 1, which `contiguous` leaves alone in a lone column.
    codes = weight.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


@torch.no_grad()
def quantize_fp8(
    weight: Tensor,
    scheme: Literal["block", "channel", "tensor"] = "block",
    *,
    group_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Quantise a weight to fp8 (e4m3fn): `value = code * scale`, round to nearest even.

    Args:
        weight: `[..., N, K]`; fp32, fp16 or bf16, finite.
        scheme: what shares a scale: "block" (g rows by g columns; the last ones may be short),
            "channel" (a row), or "tensor" (one expert's weight).
        group_size: g: 32, 64, 128 or K. Of "block" only.

    Returns:
        The weight `[..., N, K]` float8_e4m3fn, and the scales, fp32: `[..., ceil(N/g), ceil(K/g)]`,
        `[..., N, 1]` or `[..., 1]`. The greatest magnitude under a scale becomes 448. A value comes
        back within 2^-4 of itself, or half the least step, `2^-10 * scale`, whichever is more; both
        up to fp32 rounding. What is all zeros gets scale 1.

    Raises:
        ArgumentError: a dtype, shape or option does not fit, or the weight holds a NaN or infinity.
    """
    op = "quantize_fp8"
    _check_values(op, "weight", weight, rank=2)
    _check_choice(op, "scheme", scheme, ("block", "channel", "tensor"))
    if scheme == "block":
        _check_group(op, group_size, weight.shape[-1])
        size = _block_max(weight.float().abs(), group_size)
    elif scheme == "channel":
        size = _max(weight.float().abs(), (-1,), keepdim=True)
    else:
        size = _max(weight.float().abs(), (-2, -1)).unsqueeze(-1)
    scale = _fp8_scale(size)
    return _to_fp8(weight.float() / _spread(scale, weight.shape, group_size)), scale


def dequantize_fp8(
    weight: Tensor,
    scale: Tensor,
    *,
    group_size: int = 128,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values of an fp8 weight: `code * scale`, computed in fp32.

    Args:
        weight: `[..., N, K]` float8_e4m3fn.
        scale: fp32, per block `[..., ceil(N/g), ceil(K/g)]`, channel `[..., N, 1]` or tensor
            `[..., 1]`.
        group_size: g, where the scale is per block.
        dtype: of the result; fp32, fp16 or bf16.

    Returns:
        Tensor `[..., N, K]`.

    Raises:
        ArgumentError: dtypes or shapes do not fit.
    """
    op = "dequantize_fp8"
    _check_tensor(op, "weight", weight, (FP8,), rank=2)
    _check_tensor(op, "scale", scale, (torch.float32,))
    _check_choice(op, "dtype", dtype, _FLOATS)
    _check_group(op, group_size, weight.shape[-1])
    *lead, n, k = weight.shape
    blocks = (*lead, -(-n // group_size), -(-k // group_size))
    if tuple(scale.shape) not in (blocks, (*lead, n, 1), (*lead, 1)):
        wanted = f"{list(blocks)}, {[*lead, n, 1]} or {[*lead, 1]}"
        raise ArgumentError(op, "scale", wanted, scale)
    return (weight.float() * _spread(scale, weight.shape, group_size)).to(dtype)


@torch.no_grad()
def quantize_fp8_activation(
    x: Tensor,
    scheme: Literal["group", "row", "tensor"] = "group",
    *,
    group_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Quantise activations for W8A8: `value = code * scale`, round to nearest even.

    Args:
        x: `[..., K]`; fp32, fp16 or bf16, finite.
        scheme: what shares a scale: "group" (g elements of a row; the last group may be short),
            "row", or "tensor".
        group_size: g: 32, 64, 128 or K. Of "group" only.

    Returns:
        `[..., K]` float8_e4m3fn, and the scales, fp32: `[..., ceil(K/g)]`, `[..., 1]` or `[1]`.

    Raises:
        ArgumentError: a dtype, shape or option does not fit, or x holds a NaN or infinity.
    """
    op = "quantize_fp8_activation"
    _check_values(op, "x", x, rank=1)
    _check_choice(op, "scheme", scheme, ("group", "row", "tensor"))
    size = x.float().abs()
    k = x.shape[-1]
    if scheme == "tensor":
        scale = _fp8_scale(_max(size.flatten(), (-1,), keepdim=True))
        return _to_fp8(x.float() / scale), scale
    if scheme == "row":
        scale = _fp8_scale(_max(size, (-1,), keepdim=True))
        return _to_fp8(x.float() / scale), scale
    _check_group(op, group_size, k)
    scale = _fp8_scale(_max(_cut(size, group_size), (-1,)))
    spread = scale.repeat_interleave(group_size, dim=-1)[..., :k]
    return _to_fp8(x.float() / spread), scale


def _int4_group(op: str, group_size: int | None, k: int) -> int:
    if k == 0:
        raise ArgumentError(op, "weight", "K of at least 1", "K = 0")
    if group_size is None:
        return k
    _check_group(op, group_size, k)
    if k % group_size != 0:
        raise ArgumentError(op, "group_size", f"a divisor of K = {k}", group_size)
    return group_size


def _int4_scale(op: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to `dtype`; 1 for a group of zeros, never a zero that divides."""
    scale = exact.to(dtype)
    if not bool(scale.isfinite().all()):
        raise ArgumentError(op, "scale_dtype", "a dtype that holds the scales", _dtype_text(dtype))
    least = torch.finfo(dtype).smallest_normal
    return torch.where(exact == 0, torch.ones_like(scale), scale.clamp(min=least))


def _fp8_scale(size: Tensor) -> Tensor:
    """Scales that bring `size` to 448; 1 where it is zero."""
    scale = (size / _FP8_MAX).clamp(min=torch.finfo(torch.float32).smallest_normal)
    return torch.where(size == 0, torch.ones_like(size), scale)


def _to_fp8(t: Tensor) -> Tensor:
    return t.clamp(-_FP8_MAX, _FP8_MAX).to(FP8)  # a quotient may round to just above 448


def _max(t: Tensor, dims: tuple[int, ...], keepdim: bool = False) -> Tensor:
    """The greatest along `dims`, 0 where there is nothing."""
    if any(t.shape[dim] == 0 for dim in dims):
        return t.sum(dims, keepdim=keepdim)
    return t.amax(dims, keepdim=keepdim)


def _cut(t: Tensor, group: int) -> Tensor:
    """`[..., K]` to `[..., ceil(K/g), g]`, the last group filled up with zeros."""
    k = t.shape[-1]
    groups = -(-k // group)
    return F.pad(t, (0, groups * group - k)).reshape(*t.shape[:-1], groups, group)


def _block_max(size: Tensor, group: int) -> Tensor:
    rows = _max(_cut(size, group), (-1,))  # [..., N, ceil(K/g)]
    return _max(_cut(rows.transpose(-1, -2), group), (-1,)).transpose(-1, -2).contiguous()


def _spread(scale: Tensor, shape: torch.Size, group: int) -> Tensor:
    """Scales of any fp8 scheme so that they broadcast with a weight of `shape`."""
    *lead, n, k = shape
    if scale.dim() < len(shape):
        return scale.unsqueeze(-1)
    if tuple(scale.shape) == (*lead, n, 1):
        return scale
    rows = scale.repeat_interleave(group, dim=-2)[..., :n, :]
    return rows.repeat_interleave(group, dim=-1)[..., :k]


def _check_values(op: str, name: str, value: Any, rank: int) -> None:
    _check_tensor(op, name, value, _FLOATS, rank)
    if not bool(value.isfinite().all()):
        raise ArgumentError(op, name, "finite values", "a NaN or an infinity")


def _check_tensor(
    op: str, name: str, value: Any, dtypes: tuple[torch.dtype, ...], rank: int = 0
) -> None:
    fits = isinstance(value, Tensor) and value.dtype in dtypes and value.layout is torch.strided
    if not fits or value.dim() < rank:
        names = "|".join(_dtype_text(dtype) for dtype in dtypes)
        raise ArgumentError(op, name, f"a tensor of rank {rank} or more, {names}", value)


def _check_group(op: str, group_size: Any, k: int) -> None:
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not whole or not (group_size in _GROUPS or (group_size == k and k > 0)):
        raise ArgumentError(op, "group_size", f"32, 64, 128 or K = {k}", group_size)


def _check_choice(op: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is choice or value == choice for choice in choices):
        known = " or ".join(
            _dtype_text(c) if isinstance(c, torch.dtype) else repr(c) for c in choices
        )
        got = _dtype_text(value) if isinstance(value, torch.dtype) else value
        raise ArgumentError(op, name, known, got)


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
