"""fused_moe_gemv: each token's row times the weights of the experts chosen for it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kernelhub.backends.reference.fused_moe_gemv import fused_moe_gemv as _reference
from kernelhub.contracts import _bounds, _weights
from kernelhub.contracts._fused_moe_gemv_cases import cases
from kernelhub.contracts._weights import FLOATS, FP8, PACKED
from kernelhub.contracts.fused_gemv import ACTIVATIONS
from kernelhub.errors import ArgumentError
from kernelhub.spec import Args, Cost, Expected, OpSpec, Param, TensorDesc, Traits, check_out

NAME = "fused_moe_gemv"


def fused_moe_gemv(
    x: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None = None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    *,
    weight_zero: Tensor | None = None,
    group_size: int | None = None,
    activation: Literal["swiglu", "silu", "gelu", "gelu_tanh"] | None = None,
    reduce: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply each token's row by the weights of the experts chosen for it.

    For token t and slot j, with e = topk_ids[t, j]:
    `result[t, j] = activation(topk_weights[t, j] * (dequant(weight[e]) @ row))`, in fp32, rounded
    once. The row is `x[t]` (gate-up projection) or `x[t, j]` (down projection).

    The expert layers of LLM decoding, where reading the chosen weights is all the time. Tuned for
    up to 16 tokens, correct for any number. The schemes are those of fused_gemv, told by the
    weight's dtype: dense, fp8 W8A16, fp8 W8A8, int4 W4A16.

    Args:
        x: `[M, K]`, a row that all slots of a token share, or `[M, k, K]`, a row for each slot;
            fp32, fp16, bf16 or float8_e4m3fn; any strides.
        weight: `[E, N, K]`, or int4 packed along K, low nibble first: uint8 or int8 `[E, N, K/2]`,
            or int32 `[E, N, K/8]` of the same bytes, little-endian. Any strides.
        topk_ids: `[M, k]`, int32 or int64. An expert may occur twice. An id outside `[0, E)` makes
            a row of zeros (adds nothing where `reduce`) for which no row of x, weight or scale
            is read: expert parallelism masks with -1.
        topk_weights: `[M, k]`, fp32, fp16 or bf16. They multiply before the activation, so with
            SwiGLU they reach gate and up: the router's weight on the input. Without an activation
            they are the usual weighting of the down projection.
        x_scale: W8A8 only, fp32, shaped as x's rows: per group `[M, ceil(K/g)]` or
            `[M, k, ceil(K/g)]`, per row `[M, 1]` or `[M, k, 1]`, or `[1]`. Scales multiply.
        weight_scale: fp8: fp32 per block `[E, ceil(N/g), ceil(K/g)]`, per channel `[E, N, 1]`, or
            per expert `[E, 1]`. int4: fp32, fp16 or bf16 `[E, N, K/g]`. Scales multiply.
        weight_zero: int4 only, uint8 `[E, N, K/g]`, values 0..15 (8 where not given):
            `(nibble - zero) * scale`.
        group_size: g, one of 32, 64, 128 and K. Not given: 128 for fp8, `K / weight_scale.shape[2]`
            for int4. The last block of fp8 may be short; g divides K for int4.
        activation: "swiglu": rows `[0, N/2)` of a weight are gate and `[N/2, N)` up, the result is
            `silu(gate) * up`. "silu", or "gelu" (the same as "gelu_tanh"), act on each output.
        reduce: add up the slots of each token, in fp32, in slot order.
        out_dtype: fp32, fp16 or bf16; x's dtype where not given, bf16 for fp8 x.
        out: optional result, apart from all inputs.

    Returns:
        Tensor `[M, k, n]`, or `[M, n]` where `reduce`; n = N, or N/2 with SwiGLU; `out` where
        given. k = 0 gives no slots, and zeros where `reduce`. NaN and infinities propagate as IEEE
        has it; fp8 codes 0x7f and 0xff are NaN. An infinite scale makes NaN, for it multiplies the
        sum of a group.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit each other, an argument has no meaning
            in the weight's scheme, an option is out of range, or `out` does not fit or overlaps.

    Supported:
        reference: any device, differentiable. Its fp32 products follow
            `torch.set_float32_matmul_precision`, by default full precision.
        cuda, musa: devices of their own, no derivative
        simt: CPU tensors, for tests, no derivative

    Cost: reads the weight and scales of each chosen expert once, x, ids and topk_weights, and
        writes the result; 2 M k N K operations.
    Definition: the products of dequantised values, not rounded to x's dtype on the way, summed in
    fp32; weighting, activation and sum over slots in fp32; one rounding to nearest even.
    """
    raise NotImplementedError


def check(a: Args) -> None:
    tokens, slots = a.topk_ids.shape
    if a.x.shape[0] != tokens:
        raise ArgumentError(
            NAME, "topk_ids", f"[M, k] with M = {a.x.shape[0]}, the rows of 'x'", a.topk_ids
        )
    if a.x.dim() == 3 and a.x.shape[1] != slots:
        raise ArgumentError(
            NAME, "topk_ids", f"[M, k] with k = {a.x.shape[1]}, the slots of 'x'", a.topk_ids
        )
    if a.topk_weights is not None and tuple(a.topk_weights.shape) != tuple(a.topk_ids.shape):
        wanted = f"[M, k] = {list(a.topk_ids.shape)}, as 'topk_ids'"
        raise ArgumentError(NAME, "topk_weights", wanted, a.topk_weights)
    _weights.check_weights(NAME, a)
    if a.x_scale is not None and a.x_scale.dim() not in (1, a.x.dim()):
        raise ArgumentError(NAME, "x_scale", f"{a.x.dim()} dimensions, as 'x', or [1]", a.x_scale)
    if a.activation == "swiglu" and a.weight.shape[1] % 2 != 0:
        raise ArgumentError(
            NAME, "weight", "an even N for swiglu, gate rows then up rows", a.weight
        )
    if a.out is not None:
        check_out(NAME, a.out, outputs(a)[0], _inputs(a))


def _inputs(a: Args) -> dict[str, Any]:
    names = (
        "x", "weight", "topk_ids", "topk_weights", "x_scale", "weight_scale", "weight_zero"
    )  # fmt: skip
    return {name: getattr(a, name) for name in names if getattr(a, name) is not None}


def outputs(a: Args) -> tuple[TensorDesc, ...]:
    rows = a.topk_ids.shape[:1] if a.reduce else a.topk_ids.shape
    shape = (*rows, _weights.result_width(a))
    return (TensorDesc(shape, _weights.result_dtype(a), a.x.device),)


def oracle(a: Args, chain: int | None = None) -> tuple[Expected, ...]:
    tokens, slots = a.topk_ids.shape
    num_experts, n = a.weight.shape[:2]
    k = a.x.shape[-1]
    rows = _weights.x_float64(a)
    x = (
        rows.unsqueeze(1).expand(tokens, slots, k)
        if a.x.dim() == 2
        else rows.reshape(tokens, slots, k)
    )
    value = torch.zeros(tokens, slots, n, dtype=torch.float64)
    error = torch.zeros_like(value)
    inside = torch.zeros(tokens, slots, dtype=torch.bool)
    for e in range(num_experts):
        chosen = a.topk_ids == e
        if not chosen.any():
            continue
        scale = None if a.weight_scale is None else a.weight_scale[e]
        zero = None if a.weight_zero is None else a.weight_zero[e]
        weight = _weights.weight_float64(a.weight[e], scale, zero, _weights.group_size(a), k)
        value[chosen], error[chosen] = _weights.dot_float64(x[chosen], weight, chain)
        inside |= chosen
    if a.topk_weights is not None:
        by = torch.where(inside, a.topk_weights.double(), 0.0).unsqueeze(-1)
        value, error = value * by, error * by.abs()
        # One multiplication, whose result may fall below fp32's normal range.
        error = error + _bounds.FP32_UNIT * (value.abs() + error) + torch.finfo(torch.float32).tiny
    value, error = _weights.activate_float64(a.activation, value, error)
    # All of an outsider is exact: zero times no weight, through no activation.
    value = value.masked_fill(~inside.unsqueeze(-1), 0.0)
    error = error.masked_fill(~inside.unsqueeze(-1), 0.0)
    if a.reduce:
        value, error = _sum_of_slots(value, error, inside)
        inside = inside.any(dim=1)
    (desc,) = outputs(a)
    bound = _bounds.rounded(value, error, desc.dtype).masked_fill(~inside.unsqueeze(-1), 0.0)
    return (Expected("out", value, bound),)


def _sum_of_slots(value: Tensor, error: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over slots, and what fp32 makes of it for terms within `error` of `value`.

    c chosen slots take c - 1 additions that round; adding zeros and the first to zero is exact. A
    term passes through at most all of them, each a factor 1 +- 2^-24.
    """
    steps = (inside.sum(dim=1, keepdim=True) - 1).clamp(min=0) * _bounds.FP32_UNIT
    sizes = (value.abs() + error).sum(dim=1)
    return value.sum(dim=1), error.sum(dim=1) + steps / (1 - steps) * sizes


def cost(a: Args) -> Cost:
    (result,) = outputs(a)
    num_experts, n = a.weight.shape[:2]
    places = a.topk_ids.numel()
    ids = a.topk_ids
    if type(ids) is Tensor and ids.device.type != "meta":
        # What is read depends on the ids: count them where they are to be had.
        ids = ids[(ids >= 0) & (ids < num_experts)]
        places, chosen = ids.numel(), len(set(ids.tolist()))
    else:
        chosen = min(num_experts, places)
    read = 0
    for name, t in _inputs(a).items():
        size = t.numel() * t.element_size()
        of_experts = name in ("weight", "weight_scale", "weight_zero")
        read += size // max(num_experts, 1) * chosen if of_experts else size
    return Cost(
        read_bytes=read,
        write_bytes=result.numel() * result.element_size(),
        operations=2 * places * n * a.x.shape[-1],
    )


def _one(rank: int) -> range:
    return range(rank, rank + 1)


SPEC = OpSpec(
    prototype=fused_moe_gemv,
    params=(
        Param("x", dtypes=(*FLOATS, FP8), ranks=range(2, 4), shape="[M, K] or [M, k, K]"),
        Param(
            "weight", dtypes=(*FLOATS, FP8, *PACKED), ranks=_one(3), shape="[E, N, K]", fixed=True
        ),
        Param("topk_ids", dtypes=(torch.int32, torch.int64), ranks=_one(2), shape="[M, k]"),
        Param("topk_weights", dtypes=FLOATS, ranks=_one(2), shape="[M, k]", optional=True),
        Param(
            "x_scale",
            dtypes=(torch.float32,),
            ranks=range(1, 4),
            shape="[M, ceil(K/g)] or [M, k, ceil(K/g)] or [M, 1] or [M, k, 1] or [1]",
            optional=True,
        ),
        Param(
            "weight_scale",
            dtypes=FLOATS,
            ranks=range(2, 4),
            shape="[E, N, K/g] or [E, ceil(N/g), ceil(K/g)] or [E, N, 1] or [E, 1]",
            optional=True,
            fixed=True,
        ),
        Param(
            "weight_zero",
            dtypes=(torch.uint8,),
            ranks=_one(3),
            shape="[E, N, K/g]",
            optional=True,
            fixed=True,
        ),
        Param("group_size", "attribute", types=(int,), optional=True, fixed=True),
        Param(
            "activation", "attribute", types=(str,), choices=ACTIVATIONS, optional=True, fixed=True
        ),
        Param("reduce", "attribute", types=(bool,), fixed=True),
        Param(
            "out_dtype",
            "attribute",
            types=(torch.dtype,),
            choices=FLOATS,
            optional=True,
            fixed=True,
        ),
        Param("out", "output", dtypes=FLOATS, shape="[M, k, n] or [M, n]", optional=True),
    ),
    check=check,
    outputs=outputs,
    reference=_reference,
    oracle=oracle,
    cases=cases,
    cost=cost,
    device_param="x",
    rows=("x", "topk_ids", "topk_weights", "x_scale"),
    # torch.matmul adds in another order for other numbers of rows; which experts there are to loop
    # over is read from the device.
    reference_traits=Traits(batch_invariant=False, graph_safe=False, differentiable=True),
)
