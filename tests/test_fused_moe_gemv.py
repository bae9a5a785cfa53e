"""fused_moe_gemv: values known by hand, the faults of earlier kernels, masks, gradients, checks."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernelhub
from kernelhub.contracts import _weights
from kernelhub.contracts.fused_moe_gemv import SPEC
from kernelhub.errors import ArgumentError
from kernelhub.spec import DeviceDesc, TensorDesc
from kernelhub.testing import compare

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
CASES = {case.name: case for case in SPEC.cases()}
GOOD = [case for case in CASES.values() if case.error is None]


def moe(*args: Any, **kwargs: Any) -> Tensor:
    """The reference's result, which the oracle agrees with."""
    bound_args = SPEC.bind(*args, **kwargs)
    SPEC.validate(bound_args)
    (expected,) = SPEC.oracle(bound_args, None)
    y: Tensor = SPEC.reference(*args, **kwargs)
    assert compare(expected, y) <= 1
    return y


def call(case: str, **changes: Any) -> dict[str, Any]:
    return CASES[case].arguments() | changes


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def multiples(*factors: float, n: int = 2, k: int = 2) -> Tensor:
    """Experts whose weight is a multiple of [[1, 2, ...], [k + 1, ...], ...]."""
    one = torch.arange(1.0, n * k + 1).reshape(n, k)
    return torch.stack([factor * one for factor in factors])


def silu(v: float) -> float:
    return v / (1 + torch.tensor(-v).double().exp().item())


# Values known without the oracle.


def test_shared_rows_by_hand() -> None:
    x = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    y = moe(x, multiples(1, 10, 100), ids([0, 2], [1, 1]))
    assert y.tolist() == [[[3, 7], [300, 700]], [[40, 80], [40, 80]]]


def test_a_row_for_each_slot_by_hand() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [1.0, 1.0]]])
    y = moe(x, multiples(1, 10, 100), ids([2, 0], [0, 1]))
    assert y.tolist() == [[[100, 300], [2, 4]], [[2, 6], [30, 70]]]


def test_weights_and_sum_by_hand() -> None:
    x, weights = torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([[0.5, 0.25], [2.0, -1.0]])
    arguments = (x, multiples(1, 10, 100), ids([0, 2], [1, 1]), weights)
    assert moe(*arguments).tolist() == [[[1.5, 3.5], [75, 175]], [[80, 160], [-40, -80]]]
    assert moe(*arguments, reduce=True).tolist() == [[76.5, 178.5], [40, 80]]


def test_the_weight_reaches_gate_and_up() -> None:
    """So SwiGLU sees it twice: silu(w gate) * (w up), not w * silu(gate) * up."""
    x, weights = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5]])
    y = moe(x, multiples(1, 2), ids([1]), weights, activation="swiglu")
    assert y.item() == pytest.approx(silu(1.0) * 3.0, rel=1e-6)  # gate 2, up 6
    y = moe(x, multiples(1, 2), ids([1]), weights, activation="silu")
    assert y.flatten().tolist() == pytest.approx([silu(1.0), silu(3.0)], rel=1e-6)


def test_slots_are_added_in_slot_order() -> None:
    """fp32 sums of these depend on the order; that of the experts is another."""
    weight = torch.tensor([-(2.0**24), 1.0, 2.0**24]).reshape(3, 1, 1)
    x = torch.ones(3, 1)
    to = ids([2, 1, 0], [2, 0, 1], [0, 1, 2])
    assert moe(x, weight, to, reduce=True).flatten().tolist() == [0, 1, 1]


def test_the_sum_is_rounded_once() -> None:
    weight = torch.tensor([1.0, 2.0**-9]).reshape(2, 1, 1).to(BF16)
    y = moe(torch.ones(1, 1, dtype=BF16), weight, ids([0, 1, 1, 1, 1]), reduce=True)
    assert y.item() == 1 + 2**-7  # each step rounded to bf16 would stay at 1


# Faults of the kernels that came before.


def test_fault_schema_and_kernel_had_different_names() -> None:
    x, weight, to = torch.ones(1, 2), multiples(1, 10), ids([1, 0])
    for function in (kernelhub.op("fused_moe_gemv"), kernelhub.ops.fused_moe_gemv):
        assert function(x, weight, to).tolist() == [[[30, 70], [3, 7]]]


@pytest.mark.parametrize("k", [128, 256, 384])
def test_fault_int4_per_channel_with_k_a_multiple_of_128(k: int) -> None:
    """One scale a row, whatever K is: codes are offset by 8, never two's complement."""
    codes = torch.arange(16).repeat(k // 16)
    packed = (codes[0::2] | codes[1::2] << 4).to(torch.uint8).expand(2, 3, k // 2)
    scale = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]).unsqueeze(-1)
    y = moe(torch.ones(1, k, dtype=BF16), packed, ids([1, 0]), None, None, scale)
    total = -8 * k // 16  # the values -8 .. 7 sum to -8
    assert y.tolist() == [[[8 * total, 16 * total, 32 * total], [total, 2 * total, 4 * total]]]


def test_fault_fp8_scales_flat_over_experts() -> None:
    """With N = 200, expert e's first block row is row 2 e of the scales, not 200 e / 128."""
    experts, n, k = 5, 200, 130
    scale = torch.arange(1.0, experts * 4 + 1).reshape(experts, 2, 2)
    weight = torch.ones(experts, n, k).to(FP8)
    y = moe(torch.ones(1, k, dtype=BF16), weight, ids([4, 3, 2, 1, 0]), None, None, scale,
            out_dtype=torch.float32)  # fmt: skip
    for slot, e in enumerate([4, 3, 2, 1, 0]):
        for row, block in ((0, 0), (127, 0), (128, 1), (199, 1)):
            assert y[0, slot, row] == 128 * scale[e, block, 0] + 2 * scale[e, block, 1]


def test_fault_swiglu_raced_through_shared_memory() -> None:
    """Each of many outputs pairs its own gate row with its own up row."""
    n = 512
    gate, up = torch.arange(n) % 7 - 3.0, torch.arange(n) % 11 - 5.0
    weight = torch.cat((gate, up)).reshape(1, 2 * n, 1)
    y = moe(torch.ones(2, 1), weight, ids([0], [0]), activation="swiglu")
    expected = [silu(g) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
    assert y[0, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(y[0], y[1])


@pytest.mark.parametrize("k", [7, 9, 15, 17, 31, 33, 130])
def test_fault_short_rows_read_what_follows(k: int) -> None:
    wide = torch.full((3, 4, k + 8), torch.nan, dtype=BF16)
    x, weight = wide[:, 0, :k].fill_(1), torch.full_like(wide, torch.nan)[:, :, :k].fill_(2)
    assert (moe(x, weight, ids([0, 2], [1, 1], [2, 0])) == 2 * k).all()


def test_fault_int64_ids_were_read_as_int32() -> None:
    arguments = call("dense-per-slot-weighted-swiglu")
    assert arguments["topk_ids"].dtype is torch.int32
    as_int64 = arguments | {"topk_ids": arguments["topk_ids"].long()}
    assert torch.equal(moe(**arguments), moe(**as_int64))
    # 2^32 + 1 is no expert, though its low word is one.
    assert moe(torch.ones(1, 2), multiples(1, 2), ids([2**32 + 1, 0])).tolist() == [
        [[0, 0], [3, 7]]
    ]


def test_fault_offsets_beyond_32_bits() -> None:
    """Experts lie 2^31 elements apart; memory that is never touched costs nothing."""
    memory = torch.empty(2**31 + 64, dtype=torch.uint8)
    weight = memory.as_strided((2, 2, 16), (2**31, 16, 1))
    weight[0], weight[1] = 0x88, 0x99  # values 0 and 1
    scale = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    y = moe(torch.ones(1, 32, dtype=BF16), weight, ids([1, 0]), None, None, scale)
    assert y.tolist() == [[[96, 128], [0, 0]]]


# Masked ids.


@pytest.mark.parametrize("activation", [None, "swiglu", "silu", "gelu"])
@pytest.mark.parametrize("outsider", [-1, 3, 2**31, 2**62, -(2**63)])
def test_an_id_outside_gives_zero_and_reads_nothing(activation: str | None, outsider: int) -> None:
    x = torch.tensor([[[torch.nan, torch.inf], [1.0, 1.0]]])
    weights = torch.tensor([[torch.nan, 1.0]])
    arguments = (x, multiples(1, 10, 100), ids([outsider, 1]), weights)
    y = moe(*arguments, activation=activation)
    assert (y[0, 0] == 0).all()
    assert (y[0, 1] > 0).all()
    assert torch.equal(moe(*arguments, activation=activation, reduce=True)[0], y[0, 1])


def test_experts_that_nobody_chose_do_not_leak() -> None:
    weight = multiples(1, torch.nan, torch.inf)
    assert moe(torch.ones(1, 2), weight, ids([0, -1])).tolist() == [[[3, 7], [0, 0]]]


def test_no_slots_no_experts_no_features() -> None:
    x, weight = torch.ones(2, 2), multiples(1, 10)
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert moe(x, weight, none).shape == (2, 0, 2)
    assert moe(x, weight, none, reduce=True).tolist() == [[0, 0], [0, 0]]
    assert moe(x, weight[:0], ids([0], [-1])).tolist() == [[[0, 0]], [[0, 0]]]
    assert moe(x[:, :0], weight[:, :, :0], ids([0], [1])).tolist() == [[[0, 0]], [[0, 0]]]
    assert moe(x[:0], weight, none[:0]).shape == (0, 0, 2)


# Gradients.


def dequantized(packed: Tensor, scale: Tensor) -> Tensor:
    """int4 weights `[E, N, K]` as a plain formula, for autograd to go through."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return (nibbles.double() - 8) * scale.double().repeat_interleave(32, dim=-1)


@pytest.mark.parametrize("scheme", ["dense", "int4"])
@pytest.mark.parametrize("per_slot", [False, True])
@pytest.mark.parametrize("reduce", [False, True])
def test_gradients(scheme: str, per_slot: bool, reduce: bool) -> None:
    """They are those of the formula in float64, and nothing reaches what a mask hides."""
    g = torch.Generator().manual_seed(1)
    to = ids([0, 2], [2, 2], [-1, 0], [4, -1])
    x = torch.randn(*((4, 2) if per_slot else (4,)), 64, generator=g).to(BF16)
    x[3] = torch.nan  # masked in every slot
    given: dict[str, Any] = {"x": x, "topk_weights": torch.rand(4, 2, generator=g) + 0.5}
    if scheme == "int4":
        packed = torch.randint(0, 256, (4, 6, 32), generator=g, dtype=torch.uint8)
        given |= {"weight": packed, "weight_scale": _weights.scales(g, (4, 6, 2))}
    else:
        given["weight"] = torch.randn(4, 6, 64, generator=g).to(BF16) / 8
    leaves = [t.requires_grad_() for t in given.values() if t.is_floating_point()]
    a = SPEC.bind(topk_ids=to, activation="swiglu", reduce=reduce, **given)

    y = SPEC.reference(topk_ids=to, activation="swiglu", reduce=reduce,
                       out_dtype=torch.float32, **given)  # fmt: skip
    direction = torch.randn(y.shape, generator=g)
    got = torch.autograd.grad(y, leaves, direction)

    inside = (to >= 0) & (to < 4)
    weight = dequantized(a.weight, a.weight_scale) if scheme == "int4" else a.weight.double()
    rows = a.x.double() if per_slot else a.x.double().unsqueeze(1).expand(4, 2, 64)
    rows = torch.where(inside.unsqueeze(-1), rows, 0.0)
    r = torch.einsum("tjnk,tjk->tjn", weight[to.clamp(0, 3)], rows)
    gate, up = (r * a.topk_weights.double().unsqueeze(-1)).chunk(2, dim=-1)
    plain = torch.nn.functional.silu(gate) * up * inside.unsqueeze(-1)
    plain = plain.sum(1) if reduce else plain
    expected = torch.autograd.grad(plain, leaves, direction.double())
    for ours, formula in zip(got, expected, strict=True):
        # bf16 leaves round their gradient, and shared rows add up rounded ones.
        assert (ours - formula).abs().max() <= 2**-7 * formula.abs().max()
    for leaf, ours in zip(leaves, got, strict=True):
        if leaf is x:
            assert (ours[3] == 0).all()
    assert (y[3] == 0).all()


# The bound, the cost, the memory, the checks.


def test_bounds_are_neither_broken_nor_vacuous() -> None:
    """Without the last rounding to 16 bits, which alone would be most of a share."""
    shares: dict[str, float] = {}
    for case in GOOD:
        arguments = case.arguments() | {"out_dtype": torch.float32, "out": None}
        (expected,) = SPEC.oracle(SPEC.bind(**arguments), None)
        shares[case.name] = compare(expected, SPEC.reference(**arguments))
    assert max(shares.values()) <= 1
    assert statistics.median(shares.values()) > 1e-3
    # Rounding errors of thousands of additions cancel; the bound's do not.
    assert min(shares[case.name] for case in GOOD if case.kind == "typical") > 1e-5


@pytest.mark.parametrize("case", ["dense-shared-impulses", "int4-per-slot-impulses"])
def test_one_wrong_element_breaks_the_bound(case: str) -> None:
    arguments = call(case)
    (expected,) = SPEC.oracle(SPEC.bind(**arguments), None)
    weight = arguments["weight"]
    e, row = int(arguments["topk_ids"][1, 0]), weight.shape[1] - 1
    spoiled = weight.clone()
    spoiled[e, row, -1] = weight[e, row, -1] + 1 if weight.dtype is BF16 else ~weight[e, row, -1]
    y = SPEC.reference(**arguments | {"weight": spoiled})
    at = arguments["x"].reshape(5, -1, 192)[1, 0].nonzero().item()
    assert at == 191  # the element that was changed is the one that this row reads
    assert compare(expected, y) > 100


def test_the_bound_of_a_sum_counts_its_additions() -> None:
    arguments = call("every-expert", out_dtype=torch.float32)
    (reduced,) = SPEC.oracle(SPEC.bind(**arguments), None)
    (apart,) = SPEC.oracle(SPEC.bind(**arguments | {"reduce": False}), None)
    terms = apart.value.abs().sum(1)
    assert torch.allclose(reduced.value, apart.value.sum(1), rtol=1e-12)
    # Seven additions, and one last rounding of the sum in place of eight of the terms.
    extra = (reduced.bound - apart.bound.sum(1)) / (2**-24 * terms)
    assert ((extra > 5.9) & (extra < 7.1)).all()


def test_no_more_than_one_expert_is_widened_at_a_time() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not result._is_view():
                self.elements = max(self.elements, result.numel())
            return result

    weight = torch.ones(16, 64, 256, dtype=BF16)
    to = torch.arange(16).reshape(2, 8)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        y = SPEC.reference(torch.ones(2, 256, dtype=BF16), weight, to)
    assert (y == 256).all()
    assert largest.elements <= 64 * 256


def test_cost_counts_the_experts_that_are_read() -> None:
    arguments = call("qwen3-30b-down-m4-int4")
    a = SPEC.bind(**arguments | {"topk_ids": torch.tensor([[0, 1, 2, 3, 4, 5, -1, 6]] * 4)})
    cost = SPEC.cost(a)
    expert = 128 * 768 // 2 + 128 * 6 * 4
    inputs = 4 * 8 * 768 * 2 + 4 * 8 * 8 + 4 * 8 * 4
    assert cost.read_bytes == 7 * expert + inputs
    assert cost.write_bytes == 4 * 8 * 128 * 2
    assert cost.operations == 2 * 4 * 7 * 128 * 768
    described = SPEC.bind(**arguments | {"topk_ids": TensorDesc((4, 8), torch.int64)})
    assert SPEC.cost(described).read_bytes == 10 * expert + inputs  # as far as one can know


def test_every_call_checks_alike_when_only_described() -> None:
    """On descriptions of tensors, on a device that torch does not know, nothing differs."""
    device = DeviceDesc("musa", 0)
    for case in CASES.values():
        if case.name.startswith(("out-overlaps", "out-expanded")):
            continue  # descriptions have no memory
        arguments = case.arguments()
        described = {
            name: TensorDesc(tuple(v.shape), v.dtype, device) if isinstance(v, Tensor) else v
            for name, v in arguments.items()
        }
        args = SPEC.bind(**described)
        if case.error:
            with pytest.raises(ArgumentError) as raised:
                SPEC.validate(args)
            assert raised.value.argument == case.error, case.name
        else:
            SPEC.validate(args)
            (here,), (there,) = SPEC.outputs(SPEC.bind(**arguments)), SPEC.outputs(args)
            assert (there.shape, there.dtype, there.device) == (here.shape, here.dtype, device)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("case", ["dense-shared", "w8a8-per-slot", "int4-per-slot"])
def test_checks_leave_the_number_of_tokens_open(case: str, reduce: bool) -> None:
    """With a symbolic M, checking and shaping must not pin it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    arguments = call(case, reduce=reduce)
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    fake: dict[str, Any] = {}
    for name, v in arguments.items():
        if not isinstance(v, Tensor):
            fake[name] = v
        elif name in SPEC.rows:
            sizes = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (v.dim() - 1)]
            context: Any = StatelessSymbolicContext(sizes)
            fake[name] = mode.from_tensor(v, static_shapes=False, symbolic_context=context)
        else:
            fake[name] = mode.from_tensor(v, static_shapes=True)
    args = SPEC.bind(**fake)
    SPEC.validate(args)
    (out,) = SPEC.outputs(args)
    assert not isinstance(out.shape[0], int)
    symbol = out.shape[0].node.expr
    assert env.replacements.get(symbol, symbol).is_symbol
    assert out.shape[1:] == ((200,) if reduce else (2, 200))
