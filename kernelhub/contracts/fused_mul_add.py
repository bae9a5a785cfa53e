"""fused_mul_add: x * scale + bias, elementwise, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from kernelhub.backends.reference.fused_mul_add import fused_mul_add as _reference
from kernelhub.contracts import _bounds
from kernelhub.contracts._cases import every_second, misaligned, normal, padded_rows, transposed
from kernelhub.errors import ArgumentError
from kernelhub.spec import (
    Args,
    Case,
    Cost,
    Expected,
    OpSpec,
    Param,
    TensorDesc,
    is_tensor,
    overlaps_itself,
    same_storage_span,
    same_view,
)

NAME = "fused_mul_add"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def fused_mul_add(
    x: Tensor, bias: Tensor, scale: float | Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Multiply by a scale and add: `x * scale + bias`, in fp32, rounded once.

    Joins the routed and the shared experts of DeepSeek-style MoE layers:
    `routed * routed_scaling_factor + shared`, `[tokens, hidden_size]`.

    Args:
        x: any shape; fp32, fp16 or bf16; any strides.
        bias: same dtype, broadcasts with `x` as torch does.
        scale: a float (used as fp32), or a tensor of fp32, fp16 or bf16 that broadcasts.
        out: optional result, of the broadcast shape and x's dtype. May be exactly `x` or `bias`.

    Returns:
        Tensor of the broadcast shape and x's dtype; `out` where given.

    Raises:
        ArgumentError: dtypes differ, shapes do not broadcast, devices differ, `out` does not fit or
            overlaps an input in part.

    Supported:
        reference: any device, differentiable
        cuda, musa: devices of their own, no derivative
        simt: CPU tensors, for tests, no derivative

    Cost: reads x and bias, writes the result; 2 operations an element.
    Definition: `fp32(x) * fp32(scale) + fp32(bias)`, rounded to nearest even (torch.addcmul with
    one factor scalar computes the same).
    """
    raise NotImplementedError


def _shape(a: Args) -> tuple[int, ...]:
    shapes = [a.x.shape, a.bias.shape]
    if is_tensor(a.scale):
        shapes.append(a.scale.shape)
    return tuple(torch.broadcast_shapes(*shapes))


def check(a: Args) -> None:
    if a.bias.dtype != a.x.dtype:
        raise ArgumentError(NAME, "bias", f"dtype {a.x.dtype}, as 'x'", a.bias)
    if a.out is None and a.x.shape == a.bias.shape and not is_tensor(a.scale):
        return  # the usual call, made quick
    try:
        shape = _shape(a)
    except RuntimeError:
        rest = f"x {list(a.x.shape)}" + (
            f" and scale {list(a.scale.shape)}" if is_tensor(a.scale) else ""
        )
        raise ArgumentError(NAME, "bias", f"a shape that broadcasts with {rest}", a.bias) from None
    if a.out is None:
        return
    if tuple(a.out.shape) != tuple(shape) or a.out.dtype != a.x.dtype:
        raise ArgumentError(NAME, "out", f"{list(shape)} {a.x.dtype}", a.out)
    if overlaps_itself(a.out):
        raise ArgumentError(NAME, "out", "no overlapping elements", f"strides {a.out.stride()}")
    for name in ("x", "bias", "scale"):
        value = getattr(a, name)
        if same_storage_span(a.out, value) and not (name != "scale" and same_view(a.out, value)):
            raise ArgumentError(NAME, "out", f"'{name}' itself or other memory", "partial overlap")


def outputs(a: Args) -> tuple[TensorDesc, ...]:
    return (TensorDesc(_shape(a), a.x.dtype, a.x.device),)


def oracle(a: Args, chain: int | None = None) -> tuple[Expected, ...]:
    scale = a.scale if is_tensor(a.scale) else torch.tensor(a.scale, dtype=torch.float32)
    product = a.x.double() * scale.double()
    value = product + a.bias.double()
    # One rounding for the product, one for the sum, both in fp32, then one to the output type.
    error = _bounds.FP32_UNIT * (product.abs() + value.abs())
    return (Expected("out", value, _bounds.rounded(value, error, a.x.dtype)),)


def cost(a: Args) -> Cost:
    (result,) = outputs(a)
    size = a.x.element_size()
    read = (a.x.numel() + a.bias.numel()) * size
    if is_tensor(a.scale):
        read += a.scale.numel() * a.scale.element_size()
    return Cost(read, result.numel() * size, 2 * result.numel())


def _case(
    name: str,
    kind: Literal["typical", "boundary"],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    scale: float,
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> Case:
    tag = str(dtype).removeprefix("torch.")

    def make(g: torch.Generator) -> dict[str, Any]:
        x = layout(normal(g, shape, dtype))
        return {"x": x, "bias": normal(g, shape, dtype), "scale": scale}

    return Case(f"{name}-{tag}", kind, make)


def _good_cases() -> Iterator[Case]:
    for dtype in FLOATS:
        yield _case("deepseek-v3-m1", "typical", (1, 7168), dtype, 2.5)
        yield _case("qwen3-30b-m7", "typical", (7, 2048), dtype, 2.5)
        for numel in (1, 7, 8, 9, 31, 257):
            yield _case(f"tail-{numel}", "boundary", (numel,), dtype, -0.37)
        for layout in (padded_rows, transposed, every_second, misaligned):
            yield _case(layout.__name__, "boundary", (5, 33), dtype, 1.7, layout)
        yield _case("empty", "boundary", (0, 16), dtype, 1.0)
        yield _case("no-dimension", "boundary", (), dtype, 3.0)


def _tensors(
    x: tuple[int, ...], bias: tuple[int, ...], scale: tuple[int, ...], dtype: torch.dtype
) -> Callable[[torch.Generator], dict[str, Any]]:
    def make(g: torch.Generator) -> dict[str, Any]:
        tensors = {"x": normal(g, x, dtype), "bias": normal(g, bias, dtype)}
        return {**tensors, "scale": normal(g, scale, dtype)}

    return make


def _out_is(name: str) -> Callable[[torch.Generator], dict[str, Any]]:
    def make(g: torch.Generator) -> dict[str, Any]:
        made = {"x": padded_rows(normal(g, (3, 37))), "bias": padded_rows(normal(g, (3, 37)))}
        return {**made, "scale": 1.3, "out": made[name]}

    return make


def _out_transposed(scale: float | None) -> Callable[[torch.Generator], dict[str, Any]]:
    """Scaled by a number or, where there is none, a tensor."""

    def make(g: torch.Generator) -> dict[str, Any]:
        made = {"x": normal(g, (3, 37)), "bias": normal(g, (3, 37))}
        by = normal(g, (3, 37)) if scale is None else scale
        return {**made, "scale": by, "out": transposed(torch.zeros(3, 37))}

    return make


def _scaled_by_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> Callable[[torch.Generator], dict[str, Any]]:
    def make(g: torch.Generator) -> dict[str, Any]:
        made = {"x": layout(normal(g, shape, dtype)), "bias": normal(g, shape, dtype)}
        return {**made, "scale": normal(g, shape, dtype)}

    return make


def _cancellation(g: torch.Generator) -> dict[str, Any]:
    x = normal(g, (64,))
    return {"x": x, "bias": -2.5 * x + normal(g, (64,), scale=1e-6), "scale": 2.5}


def _not_finite(g: torch.Generator) -> dict[str, Any]:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 1.0, inf])
    return {"x": x, "bias": torch.tensor([1.0, 1.0, inf, nan, -inf]), "scale": 2.0}


def cases() -> Iterator[Case]:
    yield from _good_cases()
    broadcast = _tensors((4, 1, 9), (3, 1), (9,), torch.float32)
    yield Case("broadcast", "boundary", broadcast)
    rows = _tensors((6, 20), (6, 20), (6, 1), torch.bfloat16)
    yield Case("scale-tensor-bf16", "boundary", rows)
    for dtype in FLOATS:
        columns = _tensors((6, 48), (48,), (48,), dtype)
        tag = str(dtype).removeprefix("torch.")
        yield Case(f"scale-per-column-{tag}", "boundary", columns)
        for numel in (1, 7, 257):  # backends may have other kernels where scale is a number
            tail = _scaled_by_tensor((numel,), dtype, Tensor.contiguous)
            yield Case(f"scale-tensor-tail-{numel}-{tag}", "boundary", tail)
        for layout in (padded_rows, every_second, misaligned):
            laid_out = _scaled_by_tensor((5, 33), dtype, layout)
            yield Case(f"scale-tensor-{layout.__name__}-{tag}", "boundary", laid_out)
    x, bias, scale = (2, 1, 2, 1, 3, 1, 2, 1, 2, 3), (1, 2, 1, 2, 1), (1, 3, 1, 2, 1, 1, 3)
    many = _tensors(x, bias, scale, torch.float32)
    yield Case("ten-dimensions", "boundary", many)
    yield Case("cancellation", "boundary", _cancellation)
    for name in ("x", "bias"):
        yield Case(f"out-is-{name}", "boundary", _out_is(name))
    yield Case("out-transposed", "boundary", _out_transposed(1.3))
    yield Case("scale-tensor-out-transposed", "boundary", _out_transposed(None))
    yield Case("nan-and-inf", "hostile", _not_finite)

    def bad(name: str, error: str, **changes: Any) -> Case:
        def make(g: torch.Generator) -> dict[str, Any]:
            return {"x": normal(g, (4, 5)), "bias": normal(g, (4, 5)), "scale": 1.0, **changes}

        return Case(name, "hostile", make, error)

    both = torch.arange(21.0)
    yield bad("bias-of-another-dtype", "bias", bias=torch.ones(4, 5, dtype=torch.float16))
    yield bad("does-not-broadcast", "bias", bias=torch.ones(4, 6))
    yield bad("integer-x", "x", x=torch.ones(4, 5, dtype=torch.int32))
    yield bad("x-on-another-device", "bias", x=torch.ones(4, 5, device="meta"))
    yield bad("scale-text", "scale", scale="2")
    yield bad("scale-integer-tensor", "scale", scale=torch.ones(5, dtype=torch.int64))
    yield bad("no-x", "x", x=None)
    yield bad("out-of-another-shape", "out", out=torch.ones(5, 4))
    yield bad("out-expanded", "out", out=torch.ones(1, 5).expand(4, 5))
    yield bad("out-partial-overlap", "out", x=both[:20].view(4, 5), out=both[1:].view(4, 5))


SPEC = OpSpec(
    prototype=fused_mul_add,
    params=(
        Param("x", dtypes=FLOATS, shape="[...]"),
        Param("bias", dtypes=FLOATS, shape="[...]"),
        Param("scale", dtypes=FLOATS, types=(float,), fixed=True, any_number=True),
        Param("out", "output", dtypes=FLOATS, optional=True),
    ),
    check=check,
    outputs=outputs,
    reference=_reference,
    oracle=oracle,
    cases=cases,
    cost=cost,
    device_param="x",
)
