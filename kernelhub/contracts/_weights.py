"""Weights dense, fp8 and int4: what fused_gemv and fused_moe_gemv share of their contracts.

An argument object `a` here has `x`, `weight`, `x_scale`, `weight_scale`, `weight_zero` and
`group_size`. Leading dimensions of `weight` (`[E]` of a mixture of experts) lead its scales too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch

from kernelhub.contracts import _bounds
from kernelhub.contracts._cases import normal
from kernelhub.errors import ArgumentError
from kernelhub.spec import Args

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
HALVES = (torch.float16, torch.bfloat16)
PACKED = {torch.uint8: 2, torch.int8: 2, torch.int32: 8}
"""Integer types that hold int4 codes, and how many codes an element holds."""

Scheme = Literal["dense", "w8a16", "w8a8", "w4a16"]

# What a scheme needs beside x and weight, and what would have no meaning in it.
_NEEDS = {
    "dense": (),
    "w8a16": ("weight_scale",),
    "w8a8": ("weight_scale", "x_scale"),
    "w4a16": ("weight_scale",),
}
_REFUSES = {
    "dense": ("x_scale", "weight_scale", "weight_zero", "group_size"),
    "w8a16": ("x_scale", "weight_zero"),
    "w8a8": ("weight_zero",),
    "w4a16": ("x_scale",),
}


def scheme(a: Args) -> Scheme:
    """How the weight is encoded: told by the dtypes alone, never by the shape of the scales."""
    if a.weight.dtype in PACKED:
        return "w4a16"
    if a.weight.dtype is FP8:
        return "w8a8" if a.x.dtype is FP8 else "w8a16"
    return "dense"


def group_size(a: Args) -> int:
    """Length along K that shares one scale.

    What was given, else 128 for fp8 blocks and `K / weight_scale.shape[-1]` for int4.
    """
    if a.group_size is not None:
        return int(a.group_size)
    k = a.x.shape[-1]
    if a.weight.dtype in PACKED and k > 0:
        return int(k // a.weight_scale.shape[-1])
    return 128


def num_groups(k: int, group: int) -> int:
    """Groups in a row of K elements; the last may be short."""
    return -(-k // group)


def result_dtype(a: Args) -> torch.dtype:
    """`out_dtype`, else x's; bf16 for fp8 x."""
    dtype: torch.dtype = a.x.dtype if a.out_dtype is None else a.out_dtype
    return torch.bfloat16 if dtype is FP8 else dtype


def result_width(a: Args) -> int:
    """n: weight rows, halved by SwiGLU."""
    rows: int = a.weight.shape[-2]
    return rows // 2 if a.activation == "swiglu" else rows


def check_weights(op: str, a: Args) -> None:
    """Raise `ArgumentError` unless x, weight and scales are one of the schemes."""
    kind = scheme(a)
    if kind == "dense" and a.weight.dtype is not a.x.dtype:
        raise ArgumentError(
            op, "weight", f"{_name(a.x.dtype)} as 'x', fp8 or packed int4", a.weight
        )
    if kind == "w4a16" and a.x.dtype not in HALVES:
        raise ArgumentError(op, "x", "float16 or bfloat16 beside int4 weights", a.x)
    if kind == "w8a16" and a.x.dtype not in HALVES:
        raise ArgumentError(op, "x", "float16, bfloat16 or fp8 beside fp8 weights", a.x)
    for name in _REFUSES[kind]:
        if getattr(a, name) is not None:
            raise ArgumentError(op, name, f"None for {_describe(a)}", getattr(a, name))
    for name in _NEEDS[kind]:
        if getattr(a, name) is None:
            raise ArgumentError(op, name, f"a tensor for {_describe(a)}", None)
    _check_weight_shape(op, a, kind)
    if kind != "dense":
        _check_group_size(op, a)
        _check_weight_scale(op, a, kind)
    if kind == "w8a8":
        _check_x_scale(op, a)


def _check_weight_shape(op: str, a: Args, kind: Scheme) -> None:
    k, columns = a.x.shape[-1], a.weight.shape[-1]
    if kind != "w4a16":
        if columns != k:
            raise ArgumentError(
                op, "weight", f"K = {k} columns, the last dimension of 'x'", a.weight
            )
        return
    per_element = PACKED[a.weight.dtype]
    if k % per_element != 0:
        holder = _name(a.weight.dtype)
        raise ArgumentError(op, "x", f"K a multiple of {per_element} beside int4 in {holder}", a.x)
    if columns * per_element != k:
        wanted = f"K/{per_element} = {k // per_element} columns of packed int4"
        raise ArgumentError(op, "weight", wanted, a.weight)


def _check_group_size(op: str, a: Args) -> None:
    k, given = a.x.shape[-1], a.group_size
    if given is None:
        return
    if given not in (32, 64, 128) and not (given == k and k > 0):
        raise ArgumentError(op, "group_size", f"32, 64, 128 or K = {k}", given)
    if a.weight.dtype in PACKED and k % given != 0:
        raise ArgumentError(op, "group_size", f"a divisor of K = {k} for int4 weights", given)


def _check_weight_scale(op: str, a: Args, kind: Scheme) -> None:
    k, rows, lead = a.x.shape[-1], a.weight.shape[-2], tuple(a.weight.shape[:-2])
    scale = a.weight_scale
    shape = tuple(scale.shape)
    if kind == "w4a16":
        if a.group_size is None and k > 0:
            columns = shape[-1]
            if columns == 0 or k % columns != 0 or k // columns not in (32, 64, 128, k):
                wanted = f"[N, K/g] with g 32, 64, 128 or K, K = {k}"
                raise ArgumentError(op, "weight_scale", wanted, scale)
        wanted_shape = (*lead, rows, k // group_size(a))
        if shape != wanted_shape:
            raise ArgumentError(op, "weight_scale", f"[N, K/g] = {list(wanted_shape)}", scale)
        if a.weight_zero is not None and tuple(a.weight_zero.shape) != wanted_shape:
            raise ArgumentError(
                op, "weight_zero", f"the shape of 'weight_scale', {list(shape)}", a.weight_zero
            )
        return
    if scale.dtype is not torch.float32:
        raise ArgumentError(op, "weight_scale", "float32 for fp8 weights", scale)
    group = group_size(a)
    blocks = (*lead, num_groups(rows, group), num_groups(k, group))
    channels, tensor = (*lead, rows, 1), (*lead, 1)
    if shape not in (blocks, channels, tensor):
        wanted = f"blocks {list(blocks)}, per channel {list(channels)} or per tensor {list(tensor)}"
        raise ArgumentError(op, "weight_scale", wanted, scale)


def _check_x_scale(op: str, a: Args) -> None:
    lead = tuple(a.x.shape[:-1])
    groups = num_groups(a.x.shape[-1], group_size(a))
    shape = tuple(a.x_scale.shape)
    if shape == (1,):
        return
    if shape[-1] not in (1, groups) or shape[:-1] not in (lead, (math.prod(lead),)):
        wanted = f"[M, ceil(K/g)] = {[*lead, groups]}, {[*lead, 1]} or [1]"
        raise ArgumentError(op, "x_scale", wanted, a.x_scale)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(a: Args) -> str:
    kind = {"dense": "dense", "w8a16": "fp8", "w8a8": "fp8", "w4a16": "int4"}[scheme(a)]
    return f"{kind} weights beside {_name(a.x.dtype)} 'x'"


# The truth, in float64.


def weight_float64(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    group: int,
    k: int,
) -> torch.Tensor:
    """The values `[N, K]` of one expert's weight, exact: codes and fp32 scales fit float64."""
    if weight.dtype in PACKED:
        assert scale is not None
        scale = _infinite_is_nan(scale)
        codes = torch.arange(k) // PACKED[weight.dtype]
        shifts = 4 * (torch.arange(k) % PACKED[weight.dtype])
        nibbles = (weight.long()[:, codes] >> shifts) & 15
        groups = torch.arange(k) // group
        zeros = torch.tensor(8) if zero is None else zero.long()[:, groups]
        return (nibbles - zeros).double() * scale.double()[:, groups]
    if weight.dtype is FP8:
        assert scale is not None
        scale = _infinite_is_nan(scale).double()
        return fp8_float64(weight) * _fp8_scale(scale, group, weight.shape[0], k)
    return weight.double()


def _infinite_is_nan(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale.isinf(), math.nan, scale)


def _fp8_scale(scale: torch.Tensor, group: int, n: int, k: int) -> torch.Tensor:
    """Scales spread so that they broadcast with `[N, K]`.

    Where `[N, 1]` is also the shape of the blocks (N = 1, or g = 1) it means the same either way.
    """
    if scale.dim() == 1 or scale.shape == (n, 1):
        return scale
    return scale[torch.arange(n) // group][:, torch.arange(k) // group]


def fp8_float64(t: torch.Tensor) -> torch.Tensor:
    """Values of e4m3fn codes: 4 exponent bits of bias 7, 3 fraction bits, no infinity, two NaN."""
    code = torch.arange(256)
    exponent, fraction = (code >> 3) & 15, (code & 7).double()
    normal_value = (8 + fraction) * 2.0 ** (exponent - 10).double()
    value = torch.where(exponent == 0, fraction * 2.0**-9, normal_value)
    value[(code & 127) == 127] = math.nan
    signed = torch.where(code >= 128, -value, value)
    return signed[t.view(torch.uint8).long()]


def x_float64(a: Args) -> torch.Tensor:
    """The values of x, `[M, K]` with all leading dimensions flattened."""
    k = a.x.shape[-1]
    rows = math.prod(a.x.shape[:-1])
    if a.x.dtype is not FP8:
        values: torch.Tensor = a.x.double().reshape(rows, k)
        return values
    scale = _infinite_is_nan(a.x_scale).double()
    if scale.numel() != 1 or scale.dim() != 1:
        scale = scale.reshape(rows, scale.shape[-1])
        if scale.shape[-1] != 1:
            scale = scale[:, torch.arange(k) // group_size(a)]
    return fp8_float64(a.x).reshape(rows, k) * scale


def dot_float64(
    x: torch.Tensor, weight: torch.Tensor, chain: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x @ weight.T` of float64 `[M, K]` and `[N, K]`, and how far fp32 accumulation may be off.

    A product passes through at most `chain` additions (K, where each waits for the last) and four
    more roundings: the two dequantisations, the multiplication, and a partial sum joined to
    another. Each is at most a factor 1 +- 2^-24, so with s = chain + 4 the error is at most
    s 2^-24 / (1 - s 2^-24) * sum |x||w|. A product below fp32's normal range may be lost whole.
    Sums beyond fp32's range are outside the bound.
    """
    k = x.shape[-1]
    steps = ((k if chain is None else chain) + 4) * _bounds.FP32_UNIT
    value = x @ weight.T
    error = steps / (1 - steps) * (x.abs() @ weight.abs().T) + k * torch.finfo(torch.float32).tiny
    return value, error


def activate_float64(
    activation: str | None, value: torch.Tensor, error: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of `value` and the bound on what fp32 makes of something within `error`."""
    if activation is None:
        return value, error
    if activation == "swiglu":
        gate, up = value.chunk(2, dim=-1)
        gate_error, up_error = error.chunk(2, dim=-1)
        gate, gate_error = _silu(gate, gate_error)
        result = gate * up
        spread = gate.abs() * up_error + up.abs() * gate_error + gate_error * up_error
        return result, spread + _bounds.FP32_UNIT * (result.abs() + spread)
    return (_silu if activation == "silu" else _gelu_tanh)(value, error)


def _exp_unit(v: torch.Tensor) -> torch.Tensor:
    """Relative error granted to fp32 exp(v): it grows with |v| as that of exp2(v log2(e)) does."""
    return (4 + 3 * v.abs()) * _bounds.FP32_UNIT


def _silu(v: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v / (1 + exp(-v)); NaN at -inf, as IEEE has it.

    The slope is below 1.1. An error of exp reaches the result by the share of exp(-v) in the
    denominator, 1 - sigmoid(v). The addition, the division (2 ulp) and slack are 8 units. Where the
    denominator overflows, or its reciprocal is flushed, |v| times fp32's smallest normal is lost.
    """
    result = v / (1 + torch.exp(-v))
    own = result.abs() * (_exp_unit(v) * torch.sigmoid(-v) + 8 * _bounds.FP32_UNIT)
    return result, 1.1 * error + own + v.abs() * torch.finfo(torch.float32).tiny


def _gelu_tanh(v: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v/2 (1 + tanh(u)), u = sqrt(2/pi) (v + 0.044715 v^3).

    The slope is below 1.13. u is off by at most 6 units of |u|, and tanh by way of exp by half of
    exp(2u)'s relative error; both reach tanh by its slope 1 - tanh^2. Computing tanh and 1 + tanh
    costs 8 units of 1, an absolute error: for v << 0 the sum cancels.
    """
    u = math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)
    tanh = torch.tanh(u)
    result = v / 2 * (1 + tanh)
    # Where the slope is zero in float64 the product with an infinite u is none.
    slope = torch.where(tanh.abs() == 1, torch.zeros_like(u), 1 - tanh**2)
    reach = slope * torch.nan_to_num(6 * _bounds.FP32_UNIT * u.abs() + _exp_unit(2 * u) / 2)
    own = v.abs() / 2 * (reach + 8 * _bounds.FP32_UNIT) + 2 * _bounds.FP32_UNIT * result.abs()
    return result, 1.13 * error + own


# Arguments for the cases.


def int4_arguments(
    g: torch.Generator,
    n: int,
    k: int,
    *,
    group: int | None = None,
    packed: torch.dtype = torch.uint8,
    zeros: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    lead: Iterable[int] = (),
) -> dict[str, Any]:
    """`weight`, `weight_scale` and, with `zeros`, `weight_zero`: random codes of all 16 values."""
    lead = tuple(lead)
    groups = k // (group or k) if k else 0
    codes = torch.randint(0, 256, (*lead, n, k // 2), generator=g, dtype=torch.uint8)
    made: dict[str, Any] = {
        "weight": codes.view(packed),
        "weight_scale": scales(g, (*lead, n, groups)).to(scale_dtype),
    }
    if zeros:
        zero = torch.randint(0, 16, (*lead, n, groups), generator=g, dtype=torch.uint8)
        made["weight_zero"] = zero
    return made


def fp8_arguments(
    g: torch.Generator,
    n: int,
    k: int,
    *,
    scale: Literal["block", "channel", "tensor"] = "block",
    group: int = 128,
    lead: Iterable[int] = (),
) -> dict[str, Any]:
    """`weight` and `weight_scale`."""
    lead = tuple(lead)
    shapes = {
        "block": (*lead, num_groups(n, group), num_groups(k, group)),
        "channel": (*lead, n, 1),
        "tensor": (*lead, 1),
    }
    return {
        "weight": normal(g, (*lead, n, k), scale=8.0).to(FP8),
        "weight_scale": scales(g, shapes[scale]),
    }


def scales(g: torch.Generator, shape: Iterable[int]) -> torch.Tensor:
    """Positive fp32 scales a factor of a few apart, so that taking a neighbour's shows."""
    return torch.exp(torch.randn(tuple(shape), generator=g)) * 0.05
