"""fused_gemv: x @ dequant(weight).T with bias, activation or RMSNorm, for a few rows of x."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kernelhub.backends.reference.fused_gemv import fused_gemv as _reference
from kernelhub.contracts import _bounds, _weights
from kernelhub.contracts._fused_gemv_cases import cases
from kernelhub.contracts._weights import FLOATS, FP8, PACKED
from kernelhub.errors import ArgumentError
from kernelhub.spec import Args, Cost, Expected, OpSpec, Param, TensorDesc, Traits, check_out

NAME = "fused_gemv"
ACTIVATIONS = ("swiglu", "silu", "gelu", "gelu_tanh")


def fused_gemv(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    *,
    weight_zero: Tensor | None = None,
    group_size: int | None = None,
    bias: Tensor | None = None,
    activation: Literal["swiglu", "silu", "gelu", "gelu_tanh"] | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply a few rows by a weight: `epilogue(x @ dequant(weight).T)`, in fp32, rounded once.

    The linear layers of LLM decoding, where reading the weight is all the time. Tuned for up to 16
    rows of x, correct for any number. The weight's dtype alone tells the scheme:

    - dense: weight of x's dtype, no scales.
    - fp8 W8A16: weight float8_e4m3fn, x fp16 or bf16; `weight_scale`.
    - fp8 W8A8: weight and x float8_e4m3fn; `weight_scale` and `x_scale`.
    - int4 W4A16: weight packed in integers, x fp16 or bf16; `weight_scale`, perhaps `weight_zero`.

    Args:
        x: `[..., K]`; fp32, fp16, bf16 or float8_e4m3fn; any strides. M is the product of the
            leading dimensions.
        weight: `[N, K]`, or int4 packed along K, low nibble first: uint8 or int8 `[N, K/2]`, or
            int32 `[N, K/8]` of the same bytes, little-endian. Any strides.
        x_scale: W8A8 only, fp32: per group `[M, ceil(K/g)]`, per row `[M, 1]`, or `[1]`. x's own
            leading dimensions may stand for M. Scales multiply.
        weight_scale: fp8: fp32 per block `[ceil(N/g), ceil(K/g)]`, per channel `[N, 1]`, or per
            tensor `[1]`. int4: fp32, fp16 or bf16 `[N, K/g]`. Where one shape fits two of these,
            both mean the same. Scales multiply (`weight_scale_inv` of DeepSeek checkpoints).
        weight_zero: int4 only, uint8 `[N, K/g]`, values 0..15, 8 where not given:
            `(nibble - zero) * scale`. A greater value is subtracted as it is.
        group_size: g, one of 32, 64, 128 and K. Not given: 128 for fp8, `K / weight_scale.shape[1]`
            for int4. The last block of fp8 may be short; g divides K for int4.
        bias: `[N]`, fp32, fp16 or bf16; added in fp32 before the activation.
        activation: "swiglu": rows `[0, N/2)` of the weight are gate and `[N/2, N)` up, the result
            is `silu(gate) * up`. "silu", or "gelu" (the same as "gelu_tanh"), act on each output.
        norm_weight: `[N]`, fp32, fp16 or bf16: RMSNorm of the output,
            `y * rsqrt(mean(y^2) + eps) * norm_weight`, the mean over N, before rounding. Excludes
            `activation`.
        eps: finite and not negative, used as fp32.
        out_dtype: fp32, fp16 or bf16; x's dtype where not given, bf16 for fp8 x.
        out: optional result, apart from all inputs.

    Returns:
        Tensor `[..., n]`, n = N, or N/2 with SwiGLU; `out` where given. K = 0 gives the epilogue
        of zeros. NaN and infinities propagate as IEEE has it; fp8 codes 0x7f and 0xff are NaN. An
        infinite scale makes NaN, for it multiplies the sum of a group.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit each other, an argument has no meaning
            in the weight's scheme, an option is out of range, or `out` does not fit or overlaps.

    Supported:
        reference: any device, differentiable. Its fp32 products follow
            `torch.set_float32_matmul_precision`, by default full precision.
        cuda, musa: devices of their own, no derivative
        simt: CPU tensors, for tests, no derivative

    Cost: reads the weight and its scales once, x, and writes the result; 2 M N K operations.
    Definition: the products of dequantised values, not rounded to x's dtype on the way, summed in
    fp32; epilogue in fp32; one rounding to nearest even.
    """
    raise NotImplementedError


def check(a: Args) -> None:
    _weights.check_weights(NAME, a)
    rows = a.weight.shape[0]
    for name in ("bias", "norm_weight"):
        vector = getattr(a, name)
        if vector is not None and vector.shape[0] != rows:
            raise ArgumentError(NAME, name, f"[N] = [{rows}]", vector)
    if a.norm_weight is not None and a.activation is not None:
        raise ArgumentError(NAME, "activation", "None beside 'norm_weight'", a.activation)
    if a.activation == "swiglu" and rows % 2 != 0:
        raise ArgumentError(
            NAME, "weight", "an even N for swiglu, gate rows then up rows", a.weight
        )
    if not 0 <= a.eps <= torch.finfo(torch.float32).max:
        raise ArgumentError(NAME, "eps", "a finite fp32 number that is not negative", a.eps)
    if a.out is not None:
        inputs = ("x", "weight", "x_scale", "weight_scale", "weight_zero", "bias", "norm_weight")
        given = {name: getattr(a, name) for name in inputs if getattr(a, name) is not None}
        check_out(NAME, a.out, outputs(a)[0], given)


def outputs(a: Args) -> tuple[TensorDesc, ...]:
    shape = (*a.x.shape[:-1], _weights.result_width(a))
    return (TensorDesc(shape, _weights.result_dtype(a), a.x.device),)


def oracle(a: Args, chain: int | None = None) -> tuple[Expected, ...]:
    x = _weights.x_float64(a)
    weight = _weights.weight_float64(
        a.weight, a.weight_scale, a.weight_zero, _weights.group_size(a), x.shape[1]
    )
    value, error = _weights.dot_float64(x, weight, chain)
    if a.bias is not None:
        value = value + a.bias.double()
        error = error + _bounds.FP32_UNIT * (value.abs() + error)
    value, error = _weights.activate_float64(a.activation, value, error)
    if a.norm_weight is not None:
        value, error = _rms_norm(value, error, a.norm_weight.double(), a.eps)
    (desc,) = outputs(a)
    bound = _bounds.rounded(value, error, desc.dtype)
    return (Expected("out", value.reshape(desc.shape), bound.reshape(desc.shape)),)


def _rms_norm(y: Tensor, error: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of float64 `y`, and what fp32 makes of something within `error` of it.

    The mean square m = mean(y^2) + eps is off by mean(2 |y| e + e^2) for the inputs and, for N
    additions, the square, the division and adding eps, by (N + 4) units. Let m lie in [low, high]:
    rsqrt then lies between theirs, and y times it is off by |y| |drsqrt| + e rsqrt(low), plus 8
    units for rsqrt (2 ulp) and the two products. Were low to be zero, all that is known is that
    no |y_j| exceeds sqrt(N) times the root of their mean square. An infinite y has neighbours 0.
    """
    n = y.shape[1]
    unit = _bounds.FP32_UNIT
    eps = torch.tensor(eps, dtype=torch.float32).item()
    mean_square = y.square().mean(-1, keepdim=True) + eps
    scale = torch.rsqrt(mean_square)
    value = y * scale * weight
    spread = (2 * y.abs() * error + error**2).mean(-1, keepdim=True)
    spread = spread + (n + 4) * unit * (mean_square + spread)
    highest = torch.rsqrt(mean_square - spread)  # NaN or inf where the mean square may be zero
    lowest = torch.rsqrt(mean_square + spread)
    drift = torch.maximum(highest - scale, scale - lowest)
    off = weight.abs() * (y.abs() * drift + error * highest) + 8 * unit * value.abs()
    # Squares beyond fp32's range make rsqrt zero.
    known = highest.isfinite() & (mean_square * n < torch.finfo(torch.float32).max)
    unknown = torch.where(mean_square.isfinite(), 2 * math.sqrt(n) * weight.abs(), 0.0)
    return value, torch.where(known, off, unknown)


def cost(a: Args) -> Cost:
    (result,) = outputs(a)
    names = ("x", "weight", "x_scale", "weight_scale", "weight_zero", "bias", "norm_weight")
    given = [getattr(a, name) for name in names if getattr(a, name) is not None]
    rows, k = math.prod(a.x.shape[:-1]), a.x.shape[-1]
    return Cost(
        read_bytes=sum(t.numel() * t.element_size() for t in given),
        write_bytes=result.numel() * result.element_size(),
        operations=2 * rows * a.weight.shape[0] * k,
    )


SPEC = OpSpec(
    prototype=fused_gemv,
    params=(
        Param("x", dtypes=(*FLOATS, FP8), ranks=range(1, 65), shape="[..., K]"),
        Param(
            "weight", dtypes=(*FLOATS, FP8, *PACKED), ranks=range(2, 3), shape="[N, K]", fixed=True
        ),
        Param(
            "x_scale",
            dtypes=(torch.float32,),
            ranks=range(1, 65),
            optional=True,
            shape="[M, ceil(K/g)] or [M, 1] or [1]",
        ),
        Param(
            "weight_scale",
            dtypes=FLOATS,
            ranks=range(1, 3),
            optional=True,
            fixed=True,
            shape="[N, K/g] or [ceil(N/g), ceil(K/g)] or [N, 1] or [1]",
        ),
        Param(
            "weight_zero",
            dtypes=(torch.uint8,),
            ranks=range(2, 3),
            optional=True,
            fixed=True,
            shape="[N, K/g]",
        ),
        Param("group_size", "attribute", types=(int,), optional=True, fixed=True),
        Param("bias", dtypes=FLOATS, ranks=range(1, 2), shape="[N]", optional=True, fixed=True),
        Param(
            "activation", "attribute", types=(str,), choices=ACTIVATIONS, optional=True, fixed=True
        ),
        Param(
            "norm_weight", dtypes=FLOATS, ranks=range(1, 2), shape="[N]", optional=True, fixed=True
        ),
        Param("eps", "attribute", types=(float,), fixed=True),
        Param(
            "out_dtype",
            "attribute",
            types=(torch.dtype,),
            choices=FLOATS,
            optional=True,
            fixed=True,
        ),
        Param("out", "output", dtypes=FLOATS, shape="[..., n]", optional=True),
    ),
    check=check,
    outputs=outputs,
    reference=_reference,
    oracle=oracle,
    cases=cases,
    cost=cost,
    device_param="x",
    rows=("x", "x_scale"),
    # torch.matmul adds in another order for other numbers of rows.
    reference_traits=Traits(batch_invariant=False, differentiable=True),
)
