"""fused_gemv: values known by hand, the faults of earlier kernels, gradients, bounds and checks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernelhub.contracts import _weights
from kernelhub.contracts.fused_gemv import ACTIVATIONS, SPEC, _rms_norm
from kernelhub.errors import ArgumentError
from kernelhub.spec import DeviceDesc, TensorDesc
from kernelhub.testing import compare

BF16, FP8, HALF = torch.bfloat16, torch.float8_e4m3fn, torch.float16
CASES = {case.name: case for case in SPEC.cases()}
GOOD = [case for case in CASES.values() if case.error is None]
SCHEMES = ("dense", "w8a16", "w8a8", "w4a16")


def gemv(*args: Any, **kwargs: Any) -> Tensor:
    """The reference's result, which the oracle agrees with."""
    bound_args = SPEC.bind(*args, **kwargs)
    SPEC.validate(bound_args)
    (expected,) = SPEC.oracle(bound_args, None)
    y = SPEC.reference(*args, **kwargs)
    assert compare(expected, y) <= 1
    (described,) = SPEC.outputs(bound_args)
    assert (tuple(y.shape), y.dtype) == (tuple(described.shape), described.dtype)
    return y


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call(case: str, **changes: Any) -> dict[str, Any]:
    return CASES[case].arguments() | changes


# Values known without the oracle.


def test_dense_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=BF16)
    weight = torch.tensor([[3.0, 4.0], [1.0, -1.0], [0.0, 8.0]], dtype=BF16)
    assert gemv(x, weight).tolist() == [[11, -1, 16], [-1, -1.5, 4]]
    assert gemv(x, weight, bias=torch.tensor([0.5, 0, -1])).tolist() == [
        [11.5, -1, 15], [-0.5, -1.5, 3],
    ]  # fmt: skip


def test_int4_low_nibble_first_in_every_packing() -> None:
    codes = [1, 2, 3, 4, 5, 6, 7, 15]
    as_bytes = torch.tensor([[0x21, 0x43, 0x65, 0xF7]], dtype=torch.uint8)
    as_word = torch.tensor([[-0x089ABCDF]], dtype=torch.int32)  # 0xF7654321
    x, scale = torch.eye(8, dtype=BF16), torch.tensor([[0.5]])
    for weight in (as_bytes, as_bytes.view(torch.int8), as_word):
        assert gemv(x, weight, None, scale).flatten().tolist() == [(c - 8) / 2 for c in codes]
        zero = torch.tensor([[3]], dtype=torch.uint8)
        with_zero = gemv(x, weight, None, scale, weight_zero=zero)
        assert with_zero.flatten().tolist() == [(c - 3) / 2 for c in codes]


def test_fp8_codes_are_exact_on_either_side() -> None:
    values = _weights.fp8_float64(torch.arange(256, dtype=torch.uint8).view(FP8))
    assert values[[0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0xB8]].tolist() == [
        0, 2**-9, 7 * 2**-9, 2**-6, 1, 448, -1,
    ]  # fmt: skip
    assert values.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    for name in ("fp8-all-codes-weight", "fp8-all-codes-x"):
        y = gemv(**call(name))
        first = y.flatten() if name.endswith("weight") else y[:, 0]
        assert torch.equal(first.double().nan_to_num(-1), values.nan_to_num(-1))


def test_w8a8_by_hand() -> None:
    x = torch.ones(2, 130).to(FP8)
    weight = torch.full((2, 130), 2.0).to(FP8)
    x_scale = torch.tensor([[1.0, 100.0], [2.0, 200.0]])
    weight_scale = torch.tensor([[0.5, 4.0]])
    y = gemv(x, weight, x_scale, weight_scale, out_dtype=torch.float32)
    row = 128 * 2 * 0.5 + 2 * 2 * 400
    assert y.tolist() == [[row, row], [2 * row, 2 * row]]
    assert gemv(x, weight, x_scale, weight_scale).dtype is BF16


def test_swiglu_takes_gate_from_the_first_half() -> None:
    x = torch.tensor([[1.0]])
    weight = torch.tensor([[2.0], [-1.0], [10.0], [20.0]])  # gate 2, -1; up 10, 20
    y = gemv(x, weight, activation="swiglu")
    expected = [2 / (1 + math.exp(-2)) * 10, -1 / (1 + math.exp(1)) * 20]
    assert y[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_activations_by_formula() -> None:
    v = [-3.0, -0.5, 0.0, 1.0, 4.0]
    x, weight = torch.ones(1, 1), torch.tensor(v).unsqueeze(1)

    def gelu(t: float) -> float:
        return t / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3)))

    silu = gemv(x, weight, activation="silu")[0].tolist()
    assert silu == pytest.approx([t / (1 + math.exp(-t)) for t in v], rel=1e-6)
    for name in ("gelu", "gelu_tanh"):
        y = gemv(x, weight, activation=name)[0].tolist()
        assert y == pytest.approx([gelu(t) for t in v], rel=1e-5, abs=1e-6)


def test_bias_comes_before_the_activation() -> None:
    y = gemv(torch.ones(1, 1), torch.ones(1, 1), bias=torch.tensor([1.0]), activation="silu")
    assert y.item() == pytest.approx(2 / (1 + math.exp(-2)), rel=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_features_leave_the_epilogue_of_zeros(scheme: str) -> None:
    arguments = call(f"{scheme}-k0")
    bias = torch.arange(10.0)
    assert gemv(**arguments).tolist() == [[0.0] * 10] * 3
    assert gemv(**arguments, bias=bias).tolist() == [bias.tolist()] * 3


# What earlier kernels got wrong.


@pytest.mark.parametrize("k", [128, 256, 384, 1024])
def test_fault_int4_per_channel_with_k_a_multiple_of_128(k: int) -> None:
    made = _weights.int4_arguments(generator(), 9, k)
    gemv(torch.randn(3, k, generator=generator(1)).to(BF16), **made)


def test_fault_int4_encoding_followed_the_number_of_scales() -> None:
    """K = 128: one group of 128, K and none given are one encoding; four equal groups the same."""
    x = torch.randn(2, 128, generator=generator()).to(BF16)
    made = _weights.int4_arguments(generator(1), 9, 128, group=128)
    first = gemv(x, **made)
    assert torch.equal(first, gemv(x, **made, group_size=128))
    made["weight_scale"] = made["weight_scale"].expand(9, 4)
    assert torch.equal(first, gemv(x, **made))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, HALF])
def test_fault_rms_norm_beyond_one_row_and_in_every_dtype(dtype: torch.dtype) -> None:
    """Rows of other sizes do not mix, and gamma is read as what it is."""
    x = torch.randn(5, 24, generator=generator()) * torch.tensor([[1e-2], [1], [30], [1e3], [1]])
    weight = torch.randn(40, 24, generator=generator(1))
    gamma = torch.randn(40, generator=generator(2)).to(dtype)
    y = gemv(x, weight, norm_weight=gamma)
    for row in range(5):
        z = (x[row].double() @ weight.double().T).tolist()
        mean = sum(v * v for v in z) / 40
        expected = [v / math.sqrt(mean + 1e-6) * w for v, w in zip(z, gamma.tolist(), strict=True)]
        assert y[row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_fault_rms_norm_of_wide_outputs() -> None:
    """More outputs than blocks fit on any device at once."""
    made = _weights.fp8_arguments(generator(), 70001, 2, scale="tensor")
    x = torch.randn(2, 2, generator=generator(1)).to(BF16)
    bias = torch.zeros(70001)
    bias[-1] = 1e4  # outweighs all others in the mean
    gemv(x, **made, norm_weight=torch.ones(70001), bias=bias)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fault_short_rows_read_what_follows(scheme: str) -> None:
    """Rows end in NaN codes that belong to nobody; a tail read past its row would show."""
    k = 42
    how = {"group": 128} if scheme == "w8a8" else {}
    arguments = call(f"{scheme}-norm", norm_weight=None) if scheme == "dense" else {}
    if scheme == "dense":
        arguments = {"x": arguments["x"][:, :k], "weight": arguments["weight"][:, :k]}
    elif scheme == "w4a16":
        arguments = _weights.int4_arguments(generator(), 6, k)
    else:
        arguments = _weights.fp8_arguments(generator(), 6, k, **how)
    if scheme == "w8a8":
        arguments |= {"x": torch.ones(3, k).to(FP8), "x_scale": torch.ones(1)}
    elif scheme != "dense":
        arguments["x"] = torch.randn(3, k, generator=generator(1)).to(BF16)
    for name in ("x", "weight"):
        t = arguments[name]
        bad = torch.full((t.shape[0], t.shape[1] + 22), 255, dtype=torch.uint8)
        bad = bad.view(t.dtype) if t.element_size() == 1 else bad.to(t.dtype) * math.nan
        bad[:, : t.shape[1]].copy_(t)
        arguments[name] = bad[:, : t.shape[1]]
    assert gemv(**arguments).isfinite().all()


def test_fault_offsets_beyond_32_bits() -> None:
    """Rows 2^32 bytes apart in memory of which only a few pages are ever touched."""
    rows = torch.empty(2**32 + 64, dtype=torch.uint8).as_strided((2, 64), (2**32, 1))
    made = _weights.int4_arguments(generator(), 2, 128)
    rows.copy_(made["weight"])
    x = torch.randn(1, 128, generator=generator(1)).to(BF16)
    assert torch.equal(gemv(x, rows, None, made["weight_scale"]), gemv(x, **made))


def test_fault_swiglu_raced_through_shared_memory() -> None:
    arguments = call("deepseek-v3-gate-up-m7-w8a8")
    first = gemv(**arguments)
    assert all(torch.equal(first, SPEC.reference(**arguments)) for _ in range(5))


# Rules of the contract.


@pytest.mark.parametrize(("n", "k", "group"), [(1, 40, None), (1, 128, 64), (9, 1, 1)])
def test_a_scale_of_two_readings_means_the_same(n: int, k: int, group: int | None) -> None:
    """[N, 1] may be channels and blocks at once: then a block is one channel."""
    g = generator()
    made = _weights.fp8_arguments(g, n, k, scale="channel")
    per_block = made["weight_scale"].repeat_interleave(group or 128, 0)[:n]
    x = torch.randn(3, k, generator=g).to(BF16)
    y = gemv(x, **made, group_size=group, out_dtype=torch.float32)
    weight = made["weight"].double() * per_block.double()
    assert torch.allclose(y.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-6)


def test_only_scales_of_one_meaning_are_accepted_twice() -> None:
    """Where two readings of a scale's shape coincide, they are the same map from row to scale."""
    for n, k, g in itertools.product(
        (1, 2, 3, 31, 32, 33, 64, 129), (1, 2, 32, 33, 129), (32, 64, 0)
    ):
        g = g or k
        blocks, channels = (-(-n // g), -(-k // g)), (n, 1)
        if blocks == channels:
            assert [row // g for row in range(n)] == list(range(n))


@pytest.mark.parametrize("packed", [torch.uint8, torch.int8, torch.int32])
def test_packed_dtypes_hold_the_same_bytes(packed: torch.dtype) -> None:
    arguments = call("int4-int32-k264")
    y = gemv(**arguments)
    assert torch.equal(y, gemv(**arguments | {"weight": arguments["weight"].view(packed)}))


def test_leading_dimensions_are_rows() -> None:
    flat = call("w8a8-m16")
    y = gemv(**flat)
    deep = flat | {"x": flat["x"].view(2, 4, 2, 160)}
    assert torch.equal(gemv(**deep).view(16, 48), y)
    assert torch.equal(gemv(**deep | {"x_scale": flat["x_scale"].view(2, 4, 2, 2)}).view(16, 48), y)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, HALF])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_torch_linear_on_this_cpu_accumulates_in_fp32(dtype: torch.dtype, rows: int) -> None:
    """The reference hands plain dense calls to it; 16-bit partial sums would lose what is planted.

    The first half of a row sums to 2^13, from where bf16 goes in steps of 64 and fp16 in steps of
    8; then come 512 terms of 2^-6, a long way down again, and 512 small terms.
    """
    k = 8192
    x = torch.ones(rows, k).to(dtype)
    weight = torch.full((5, k), 2.0)
    weight[:, k // 2 : k // 2 + 512] = 2**-6
    weight[:, k // 2 + 512 :] = -2.0
    weight[:, -512:] = torch.tensor([1.0, 0.5, -1.0, -0.5, 0.25]).unsqueeze(1) * 2**-5
    y = gemv(x, weight.to(dtype))
    exact = weight.sum(-1, dtype=torch.float64)
    assert torch.equal(y.double(), exact.to(dtype).double().expand(rows, 5))
    random = torch.randn(rows, 16384, generator=generator()).to(dtype)
    gemv(random, torch.randn(33, 16384, generator=generator(1)).to(dtype))


def test_the_widened_weight_never_exists_whole() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not result._is_view():
                self.elements = max(self.elements, result.numel())
            return result

    arguments = _weights.int4_arguments(generator(), 4096, 1024, group=128)
    x = torch.ones(1, 1024, dtype=BF16)
    with Largest() as largest:
        y = SPEC.reference(x, **arguments)
    assert largest.elements <= 2**19 < 4096 * 1024
    (expected,) = SPEC.oracle(SPEC.bind(x, **arguments), None)
    assert compare(expected, y) <= 1


# Gradients.


def plain_float64(a: Any, weight: Tensor) -> Tensor:
    """The op in float64 from leaves that require gradients."""
    y = a["x"] @ weight.T
    if "bias" in a:
        y = y + a["bias"]
    activation = a.get("activation")
    if activation == "swiglu":
        gate, up = y.chunk(2, -1)
        y = gate * gate.sigmoid() * up
    elif activation == "silu":
        y = y * y.sigmoid()
    elif activation:
        y = torch.nn.functional.gelu(y, approximate="tanh")
    if "norm_weight" in a:
        y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * a["norm_weight"]
    return y


@pytest.mark.parametrize("scheme", ["dense", "w8a16", "w4a16"])
@pytest.mark.parametrize("epilogue", [None, "norm", *ACTIVATIONS])
def test_gradients(scheme: str, epilogue: str | None) -> None:
    g = generator()
    leaves = {"x": torch.randn(3, 64, generator=g), "bias": torch.randn(12, generator=g)}
    fixed: dict[str, Any] = {"out_dtype": torch.float32}
    if scheme == "dense":
        leaves["weight"] = torch.randn(12, 64, generator=g)
    else:
        leaves["x"] = leaves["x"].to(BF16)
        make = _weights.int4_arguments if scheme == "w4a16" else _weights.fp8_arguments
        fixed |= make(g, 12, 64, group=32)
        leaves["weight_scale"] = fixed.pop("weight_scale")
        fixed["group_size"] = 32
    if epilogue == "norm":
        leaves["norm_weight"] = torch.randn(12, generator=g)
    elif epilogue:
        fixed["activation"] = epilogue
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    if scheme == "dense":
        weight = exact["weight"]
    else:
        ones = torch.ones_like(leaves["weight_scale"])
        codes = _weights.weight_float64(fixed["weight"], ones, None, 32, 64)
        scale = exact["weight_scale"].repeat_interleave(32, 1)
        weight = codes * (scale if scheme == "w4a16" else scale.repeat_interleave(32, 0)[:12])
    y = SPEC.reference(**leaves, **fixed)
    y64 = plain_float64(exact | fixed, weight)
    cotangent = torch.randn(y.shape, generator=g)
    got = torch.autograd.grad(y, list(leaves.values()), cotangent)
    wanted = torch.autograd.grad(y64, list(exact.values()), cotangent.double())
    for name, one, other in zip(leaves, got, wanted, strict=True):
        tolerance = 1e-2 if one.dtype is BF16 else 1e-4
        assert torch.allclose(one.double(), other, rtol=tolerance, atol=tolerance), name
        assert other.abs().max() > 0.01, name


# The bound.


def test_bounds_are_neither_broken_nor_vacuous() -> None:
    worst: dict[str, float] = {}
    for case in GOOD:
        args = SPEC.bind(**case.arguments())
        (expected,) = SPEC.oracle(args, None)
        worst[case.name] = compare(expected, SPEC.reference(**case.arguments()))
    assert max(worst.values()) <= 1
    typical = [worst[case.name] for case in GOOD if case.kind == "typical"]
    assert min(typical) > 1e-4  # fp32: rounding errors of 2048 additions cancel, the bound's do not
    assert sum(fraction > 0.1 for fraction in worst.values()) > len(worst) / 2


def test_one_wrong_element_breaks_the_bound() -> None:
    """In every planted case, the smallest change of one code of the weight is seen."""
    for name in ("impulse-w8a16", "impulse-int4", "impulse-int4-zeros-int32", "impulse-w8a8"):
        arguments = call(name)
        (expected,) = SPEC.oracle(SPEC.bind(**arguments), None)
        raw = arguments["weight"].view(torch.uint8)
        for row, column in ((0, 0), (-1, -1), (raw.shape[0] // 2, 31)):
            changed = raw.clone()
            changed[row, column] ^= 1
            arguments["weight"] = changed.view(arguments["weight"].dtype)
            assert compare(expected, SPEC.reference(**arguments)) > 1


def test_a_longer_chain_loosens_the_bound() -> None:
    args = SPEC.bind(**call("llama3-8b-down-m1-bf16", out_dtype=torch.float32))
    (short,), (long,), (worst,) = (SPEC.oracle(args, chain) for chain in (16, 1000, None))
    assert torch.equal(short.value, worst.value)
    assert bool((short.bound < long.bound).all() and (long.bound < worst.bound).all())


@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu", "norm"])
@pytest.mark.parametrize("relative", [1e-7, 1e-4, 1e-2])
def test_the_epilogue_carries_an_error_no_further_than_its_bound(
    activation: str, relative: float
) -> None:
    """Move the sums by the error, either way and at random: the result stays within the bound."""
    g = generator()
    value = (
        torch.randn(64, 32, generator=g, dtype=torch.float64)
        * 10 ** torch.linspace(-2, 2, 64)[:, None]
    )
    error = value.abs() * relative + 1e-9

    def through(v: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        if activation == "norm":
            return _rms_norm(v, e, torch.ones(32, dtype=torch.float64), 1e-6)
        return _weights.activate_float64(activation, v, e)

    truth, bound = through(value, error)
    closest = 0.0
    for direction in (-1.0, 1.0, None, None, None):
        sign = torch.sign(torch.randn(value.shape, generator=g)) if direction is None else direction
        moved, _ = through(value + sign * error, error)
        share = ((moved - truth).abs() / bound).max().item()
        assert share <= 1
        closest = max(closest, share)
    assert closest > 0.2  # a bound that nothing comes near proves nothing


# Checks.


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.error], ids=lambda c: c.name)
def test_bad_calls_blame_their_argument(case: Any) -> None:
    with pytest.raises(ArgumentError) as raised:
        SPEC.validate(SPEC.bind(**case.arguments()))
    assert raised.value.argument == case.error
    assert raised.value.op == "fused_gemv"


def test_devices_must_agree() -> None:
    with pytest.raises(ArgumentError, match="'weight'"):
        SPEC.validate(SPEC.bind(torch.ones(1, 4, device="meta"), torch.ones(4, 4)))


def test_every_call_checks_alike_when_only_described() -> None:
    """On descriptions of tensors, on a device that torch does not know, nothing differs."""
    device = DeviceDesc("musa", 0)
    for case in CASES.values():
        arguments = case.arguments()
        if any(isinstance(v, Tensor) and v.layout is not torch.strided for v in arguments.values()):
            continue
        if case.name.startswith("bad-out-overlaps"):  # descriptions have no memory to overlap
            continue
        if case.name == "bad-out-expanded":
            continue
        described = {
            name: TensorDesc(tuple(v.shape), v.dtype, device) if isinstance(v, Tensor) else v
            for name, v in arguments.items()
        }
        args = SPEC.bind(**described)
        if case.error:
            with pytest.raises(ArgumentError) as raised:
                SPEC.validate(args)
            assert raised.value.argument == case.error
        else:
            SPEC.validate(args)
            (expected,) = SPEC.outputs(SPEC.bind(**arguments))
            (out,) = SPEC.outputs(args)
            assert (tuple(out.shape), out.dtype, out.device) == (
                tuple(expected.shape), expected.dtype, device,
            )  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_checks_leave_the_number_of_rows_open(scheme: str) -> None:
    """With a symbolic M, checking and shaping must not pin it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    arguments = call(f"{scheme}-m7")
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = {
        name: mode.from_tensor(v, symbolic_context=dynamic if name in ("x", "x_scale") else None,
                               static_shapes=name not in ("x", "x_scale"))
        if isinstance(v, Tensor) else v
        for name, v in arguments.items()
    }  # fmt: skip
    args = SPEC.bind(**fake)
    SPEC.validate(args)
    (out,) = SPEC.outputs(args)
    assert not isinstance(out.shape[0], int)
    symbol = fake["x"].shape[0].node.expr
    assert env.replacements.get(symbol, symbol).is_symbol
    assert SPEC.cost(args).operations == 2 * fake["x"].shape[0] * 48 * 160


def test_cost_counts_bytes_and_operations() -> None:
    arguments = call("qwen3-30b-down-m4-int4")
    cost = SPEC.cost(SPEC.bind(**arguments))
    assert cost.read_bytes == 4 * 768 * 2 + 256 * 768 // 2 + 256 * 6 * 4
    assert cost.write_bytes == 4 * 256 * 2
    assert cost.operations == 2 * 4 * 256 * 768
