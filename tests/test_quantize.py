"""Quantisation: round trips within half a step, layouts fused_gemv reads, bad input refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernelhub import quantize as q
from kernelhub.contracts.fused_gemv import SPEC
from kernelhub.errors import ArgumentError
from kernelhub.testing import compare

BF16, FP8, HALF = torch.bfloat16, torch.float8_e4m3fn, torch.float16
FLOATS = (torch.float32, HALF, BF16)


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(*shape[:-1], 1, generator=g))
    return (torch.randn(shape, generator=g) * spread).to(dtype)


def gemv(x: Tensor, **arguments: Any) -> Tensor:
    """What the op makes of quantised arguments, held to the oracle."""
    args = SPEC.bind(x, **arguments)
    SPEC.validate(args)
    y = SPEC.reference(x, **arguments)
    assert compare(SPEC.oracle(args, None)[0], y) <= 1
    return y


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_int4_comes_back_within_half_a_step(
    group: int | None, zero_point: bool, scale_dtype: torch.dtype
) -> None:
    w = weight(2, 7, 256)
    w = torch.where(w > 0, 3 * w, w) if zero_point else w
    packed, scale, zero = q.quantize_int4(w, group, zero_point=zero_point, scale_dtype=scale_dtype)
    assert scale.shape == (2, 7, 256 // (group or 256))
    assert scale.dtype is scale_dtype
    back = q.dequantize_int4(packed, scale, zero)
    step = scale.double().repeat_interleave(group or 256, -1)
    # fp32 division and multiplication add a little to half a step.
    share = 0.5 + (15 * torch.finfo(scale_dtype).eps / 2 if zero_point else 0) + 1e-5
    error = (back.double() - w.double()).abs() / step
    assert error.max() <= share
    assert error.max() > 0.45
    codes = q.unpack_int4(packed)
    if zero_point:
        assert zero is not None
        assert bool((codes.amin(-1) <= 1).all() and (codes.amax(-1) >= 14).all())
    else:
        assert zero is None
        assert codes.min() == 1  # -7 to 7: both signs reach as far
        assert codes.max() == 15


def test_int4_by_hand() -> None:
    w = torch.tensor([[7.0, -7.0, 0.0, 3.4]])
    packed, scale, _ = q.quantize_int4(w, None)
    assert packed.tolist() == [[0x1F, 0xB8]]
    assert scale.tolist() == [[1.0]]
    assert q.dequantize_int4(packed, scale).tolist() == [[7, -7, 0, 3]]
    packed, scale, zero = q.quantize_int4(
        torch.tensor([[5.0, 10.0, -5.0, 0.0]]), None, zero_point=True
    )
    assert (scale.tolist(), zero.tolist() if zero is not None else None) == ([[1.0]], [[5]])
    assert packed.tolist() == [[0xFA, 0x50]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_packing_puts_the_low_nibble_and_the_low_byte_first(dtype: torch.dtype) -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]])
    packed = q.pack_int4(codes, dtype)
    assert packed.dtype is dtype
    assert packed.view(torch.uint8).tolist() == [[0x21, 0x43, 0x65, 0xF7]]
    assert packed.shape == (1, 1 if dtype is torch.int32 else 4)
    assert torch.equal(q.unpack_int4(packed), codes)
    every_second = torch.stack((packed, packed), -1)[..., 0]
    assert torch.equal(q.unpack_int4(every_second), codes)


@pytest.mark.parametrize("packed_dtype", [torch.uint8, torch.int8, torch.int32])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group", [64, None])
def test_int4_is_what_fused_gemv_reads(
    group: int | None, zero_point: bool, packed_dtype: torch.dtype
) -> None:
    w = weight(9, 192)
    packed, scale, zero = q.quantize_int4(
        w, group, zero_point=zero_point, packed_dtype=packed_dtype, scale_dtype=HALF
    )
    y = gemv(
        torch.eye(192, dtype=BF16), weight=packed, weight_scale=scale, weight_zero=zero,
        group_size=group, out_dtype=torch.float32,
    )  # fmt: skip
    assert torch.equal(y.T, q.dequantize_int4(packed, scale, zero))


@pytest.mark.parametrize("shape", [(150, 200), (2, 150, 200), (1, 1), (2, 3, 4, 130)])
@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
@pytest.mark.parametrize("group", [64, 128])
def test_fp8_comes_back_within_half_a_step(shape: tuple[int, ...], scheme: Any, group: int) -> None:
    w = weight(*shape)
    codes, scale = q.quantize_fp8(w, scheme, group_size=group)
    *lead, n, k = shape
    blocks = (*lead, -(-n // group), -(-k // group))
    shapes = {"block": blocks, "channel": (*lead, n, 1), "tensor": (*lead, 1)}
    assert (scale.shape, scale.dtype) == (shapes[scheme], torch.float32)
    assert (codes.shape, codes.dtype) == (shape, FP8)
    back = q.dequantize_fp8(codes, scale, group_size=group).double()
    each = (back / codes.double()).nan_to_num(0)  # the scale that each value met
    bound = torch.maximum(w.double().abs() * 2**-4, each * 2**-10) * (1 + 1e-6)
    assert bool(((back - w.double()).abs() <= bound)[codes.double() != 0].all())
    for index in (0, -1):  # under every scale the greatest code is 448: look at the corner blocks
        corner = (
            (..., slice(None, group), slice(None, group))
            if index == 0
            else (..., slice((n - 1) // group * group, None), slice((k - 1) // group * group, None))
        )
        part = codes.double()[corner].abs() if scheme == "block" else codes.double().abs()
        dims = {"block": (-2, -1), "channel": (-1,), "tensor": (-2, -1)}[scheme]
        assert bool((part.amax(dims) == 448).all())


@pytest.mark.parametrize(("scheme", "group"), [("block", 128), ("block", 64), ("channel", 128),
                                               ("tensor", 128)])  # fmt: skip
@pytest.mark.parametrize("x_scheme", ["group", "row", "tensor"])
def test_fp8_is_what_fused_gemv_reads(scheme: Any, group: int, x_scheme: Any) -> None:
    w, x = weight(150, 200), weight(5, 200, seed=1, dtype=BF16)
    codes, scale = q.quantize_fp8(w, scheme, group_size=group)
    y = gemv(
        torch.eye(200, dtype=BF16), weight=codes, weight_scale=scale, group_size=group,
        out_dtype=torch.float32,
    )  # fmt: skip
    back = q.dequantize_fp8(codes, scale, group_size=group)
    assert torch.equal(y.T, back)
    x8, x_scale = q.quantize_fp8_activation(x, x_scheme, group_size=group)
    y = gemv(x8, weight=codes, x_scale=x_scale, weight_scale=scale, group_size=group,
             out_dtype=torch.float32)  # fmt: skip
    exact = x.double() @ w.double().T
    # Each factor is off by 2^-4 at most, save the smallest, which weigh nothing.
    allowed = (2 * 2**-4 + 2**-8) * (x.double().abs() @ w.double().abs().T) + 1e-3
    assert bool(((y.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("scheme", ["group", "row", "tensor"])
def test_activations_have_a_scale_for_each_group_row_or_all(scheme: Any) -> None:
    x = torch.cat([weight(2, 3, 128), 100 * weight(2, 3, 72, seed=1)], -1)
    codes, scale = q.quantize_fp8_activation(x, scheme)
    assert scale.shape == {"group": (2, 3, 2), "row": (2, 3, 1), "tensor": (1,)}[scheme]
    spread = scale.repeat_interleave(128, -1)[..., :200] if scheme == "group" else scale
    back = codes.double() * spread.double()
    bound = torch.maximum(x.double().abs() * 2**-4, spread.double() * 2**-10) * (1 + 1e-6)
    assert bool(((back - x.double()).abs() <= bound).all())
    wanted = {
        "group": torch.stack([x[..., :128].abs().amax(-1), x[..., 128:].abs().amax(-1)], -1),
        "row": x.abs().amax(-1, keepdim=True),
        "tensor": x.abs().amax().view(1),
    }[scheme]
    assert torch.allclose(scale * 448, wanted, rtol=1e-6)


def test_experts_are_quantised_each_by_itself() -> None:
    w = weight(3, 70, 128)
    packed, scale, zero = q.quantize_int4(w, 64, zero_point=True)
    codes, fp8_scale = q.quantize_fp8(w, "block", group_size=64)
    per_tensor, tensor_scale = q.quantize_fp8(w, "tensor")
    for expert in range(3):
        one = q.quantize_int4(w[expert], 64, zero_point=True)
        for mine, alone in zip((packed, scale, zero), one, strict=True):
            assert mine is not None
            assert alone is not None
            assert torch.equal(mine[expert], alone)
        alone_codes, alone_scale = q.quantize_fp8(w[expert], "block", group_size=64)
        assert torch.equal(codes[expert].view(torch.uint8), alone_codes.view(torch.uint8))
        assert torch.equal(fp8_scale[expert], alone_scale)
        alone_codes, alone_scale = q.quantize_fp8(w[expert], "tensor")
        assert torch.equal(per_tensor[expert].view(torch.uint8), alone_codes.view(torch.uint8))
        assert torch.equal(tensor_scale[expert], alone_scale)


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_stay_zeros_and_scales_stay_finite(dtype: torch.dtype) -> None:
    w = torch.zeros(4, 64, dtype=dtype)
    w[1] = 1
    for zero_point in (False, True):
        packed, scale, zero = q.quantize_int4(w, 32, zero_point=zero_point, scale_dtype=HALF)
        assert q.dequantize_int4(packed, scale, zero, dtype=dtype)[[0, 2, 3]].abs().max() == 0
        assert scale[0].tolist() == [1, 1]
    for scheme in ("block", "channel", "tensor"):
        codes, scale = q.quantize_fp8(w, scheme)
        assert torch.equal(q.dequantize_fp8(codes, scale, dtype=dtype), w)
    x, x_scale = q.quantize_fp8_activation(w, "row")
    assert x_scale.flatten().tolist() == [1, pytest.approx(1 / 448), 1, 1]
    assert x.float()[1].tolist() == [448] * 64


@pytest.mark.parametrize("ends", [(-3e38, 3e38), (-3.2e38, 1e38), (-1e38, 3.2e38)])
def test_a_span_beyond_fp32(ends: tuple[float, float]) -> None:
    low, high = torch.tensor(ends)
    share = torch.linspace(0, 1, 32)
    w = (low * (1 - share) + high * share).expand(1, 32)
    packed, scale, zero = q.quantize_int4(w, 32, zero_point=True)
    back = q.dequantize_int4(packed, scale, zero)
    error = (back.double() - w.double()).abs() / scale.double()
    assert 0.4 < error.max() <= 0.5 + 1e-5


def test_a_code_that_stands_for_infinity_is_refused() -> None:
    largest = torch.finfo(torch.float32).max
    w = torch.full((1, 32), largest)
    w[:, 0] = -largest
    with pytest.raises(ArgumentError, match=r"'weight': .* come back finite, got .* 3\.4e\+38"):
        q.quantize_int4(w, 32, zero_point=True)
    q.quantize_int4(w, 32)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 3e38])
def test_extreme_sizes(size: float) -> None:
    w = torch.full((1, 64), size)
    w[0, ::2] *= -0.5
    packed, scale, _ = q.quantize_int4(w, None)
    assert (q.dequantize_int4(packed, scale) - w).abs().max() <= scale.item() / 2 * (1 + 1e-6)
    for scheme in ("block", "channel", "tensor"):
        codes, scale = q.quantize_fp8(w, scheme)
        bound = torch.maximum(w.abs() * 2**-4, scale * 2**-10) * (1 + 1e-6)
        assert bool(((q.dequantize_fp8(codes, scale) - w).abs() <= bound).all())


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-4])
def test_scales_below_fp16_normal_numbers(size: float) -> None:
    w = size * weight(3, 64)
    for zero_point in (False, True):
        packed, scale, zero = q.quantize_int4(w, 32, zero_point=zero_point, scale_dtype=HALF)
        assert scale.min() >= torch.finfo(HALF).smallest_normal
        error = (q.dequantize_int4(packed, scale, zero) - w).abs()
        assert bool((error <= scale.float().repeat_interleave(32, -1) * 0.51).all())


def test_empty_weights() -> None:
    packed, scale, _ = q.quantize_int4(torch.empty(0, 5, 64), 32)
    assert (packed.shape, scale.shape) == ((0, 5, 32), (0, 5, 2))
    codes, scale = q.quantize_fp8(torch.empty(5, 0))
    assert (codes.shape, scale.shape) == ((5, 0), (1, 0))
    assert q.dequantize_fp8(codes, scale).shape == (5, 0)
    codes, scale = q.quantize_fp8(torch.empty(0, 300))
    assert (codes.shape, scale.shape) == ((0, 300), (0, 3))
    x, scale = q.quantize_fp8_activation(torch.empty(0, 300))
    assert (x.shape, scale.shape) == ((0, 300), (0, 3))
    assert q.quantize_fp8_activation(torch.empty(0, 300), "tensor")[1].tolist() == [1]
    assert q.quantize_fp8(torch.empty(3, 0), "tensor")[1].tolist() == [1]


def with_value(value: float) -> Tensor:
    w = torch.ones(2, 64)
    w[1, 63] = value
    return w


INT4 = q.quantize_int4(torch.ones(2, 64), 32)
ONES8 = torch.ones(2, 64).to(FP8)


@pytest.mark.parametrize(
    ("function", "arguments", "argument"),
    [
        ("quantize_int4", {"weight": with_value(float("nan"))}, "weight"),
        ("quantize_int4", {"weight": with_value(float("inf"))}, "weight"),
        ("quantize_int4", {"weight": torch.ones(64)}, "weight"),
        ("quantize_int4", {"weight": torch.ones(2, 64, dtype=torch.int32)}, "weight"),
        ("quantize_int4", {"weight": [1.0]}, "weight"),
        ("quantize_int4", {"weight": torch.ones(2, 0), "group_size": None}, "weight"),
        ("quantize_int4", {"weight": torch.ones(2, 3), "group_size": None}, "weight"),
        ("quantize_int4", {"weight": torch.ones(2, 64), "group_size": 128}, "group_size"),
        ("quantize_int4", {"weight": torch.ones(2, 64), "group_size": 16}, "group_size"),
        ("quantize_int4", {"weight": torch.ones(2, 64), "group_size": 0}, "group_size"),
        ("quantize_int4", {"weight": torch.ones(2, 64), "group_size": True}, "group_size"),
        ("quantize_int4", {"weight": torch.ones(2, 64), "group_size": 32.0}, "group_size"),
        ("quantize_int4", {"weight": torch.ones(2, 64), "scale_dtype": FP8}, "scale_dtype"),
        ("quantize_int4", {"weight": torch.ones(2, 64), "packed_dtype": HALF}, "packed_dtype"),
        (
            "quantize_int4",
            {"weight": torch.ones(2, 12), "group_size": None, "packed_dtype": torch.int32},
            "weight",
        ),
        (
            "quantize_int4",
            {"weight": with_value(1e7), "group_size": 32, "scale_dtype": HALF},
            "scale_dtype",
        ),
        ("pack_int4", {"codes": torch.tensor([1, 16])}, "codes"),
        ("pack_int4", {"codes": torch.tensor([1, -1])}, "codes"),
        ("pack_int4", {"codes": torch.tensor([1])}, "codes"),
        ("pack_int4", {"codes": torch.tensor([1.0, 2.0])}, "codes"),
        ("unpack_int4", {"weight": torch.ones(2)}, "weight"),
        ("dequantize_int4", {"weight": INT4[0], "scale": torch.ones(2, 3)}, "scale"),
        ("dequantize_int4", {"weight": INT4[0], "scale": torch.ones(2, 0)}, "scale"),
        ("dequantize_int4", {"weight": INT4[0], "scale": torch.tensor(1.0)}, "scale"),
        ("dequantize_int4", {"weight": INT4[0], "scale": torch.ones(3, 2)}, "scale"),
        (
            "dequantize_int4",
            {"weight": INT4[0], "scale": INT4[1], "zero": torch.ones(2, 1, dtype=torch.uint8)},
            "zero",
        ),
        ("dequantize_int4", {"weight": INT4[0], "scale": INT4[1], "zero": INT4[1]}, "zero"),
        ("dequantize_int4", {"weight": INT4[0], "scale": INT4[1], "dtype": FP8}, "dtype"),
        ("quantize_fp8", {"weight": with_value(float("nan"))}, "weight"),
        ("quantize_fp8", {"weight": torch.ones(2, 64), "scheme": "rows"}, "scheme"),
        ("quantize_fp8", {"weight": torch.ones(2, 64), "group_size": 100}, "group_size"),
        ("dequantize_fp8", {"weight": torch.ones(2, 64), "scale": torch.ones(1)}, "weight"),
        ("dequantize_fp8", {"weight": ONES8, "scale": torch.ones(2)}, "scale"),
        ("dequantize_fp8", {"weight": ONES8, "scale": torch.ones(1, dtype=HALF)}, "scale"),
        (
            "dequantize_fp8",
            {"weight": ONES8, "scale": torch.ones(1), "group_size": -1},
            "group_size",
        ),
        ("quantize_fp8_activation", {"x": torch.tensor(1.0)}, "x"),
        ("quantize_fp8_activation", {"x": with_value(float("-inf"))}, "x"),
        ("quantize_fp8_activation", {"x": torch.ones(2, 64), "scheme": "block"}, "scheme"),
        ("quantize_fp8_activation", {"x": torch.ones(2, 64), "group_size": 0}, "group_size"),
    ],
)
def test_bad_arguments(function: str, arguments: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        getattr(q, function)(**arguments)
    assert (raised.value.op, raised.value.argument) == (function, argument)


def test_inputs_are_left_alone_and_any_strides_do() -> None:
    w = weight(64, 70).T
    before = w.clone(memory_format=torch.contiguous_format)
    untouched = w.clone()
    strided = q.quantize_int4(w, 64)[:2] + q.quantize_fp8(w) + q.quantize_fp8_activation(w)
    dense = (
        q.quantize_int4(before, 64)[:2] + q.quantize_fp8(before) + q.quantize_fp8_activation(before)
    )
    assert torch.equal(w, untouched)
    assert torch.equal(before, untouched)
    for one, other in zip(strided, dense, strict=True):
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
