"""Every case of every op on the reference: numbers, guards, bits, rows, errors."""

from __future__ import annotations

import collections

import pytest
import torch

from kernelhub import contracts, registry
from kernelhub.spec import Case, Expected
from kernelhub.testing import compare, run_case
from kernelhub.testing.harness import Buffers
from tests.toys import OP, backend, constant

ALL = [(name, case) for name in contracts.NAMES for case in registry.spec(name).cases()]


@pytest.mark.parametrize(("op", "case"), ALL, ids=[f"{op}-{case.name}" for op, case in ALL])
def test_reference(op: str, case: Case) -> None:
    outcome = run_case(op, case, "reference")
    assert outcome.status == "passed", f"{outcome.message} (error/bound {outcome.fraction:.3g})"


@pytest.mark.parametrize("op", contracts.NAMES)
def test_cases_are_named_once_and_of_every_kind(op: str) -> None:
    cases = list(registry.spec(op).cases())
    names = collections.Counter(case.name for case in cases)
    assert [name for name, count in names.items() if count > 1] == []
    assert {case.kind for case in cases} == {"typical", "boundary", "hostile"}
    assert any(case.error for case in cases)


@pytest.mark.parametrize("op", contracts.NAMES)
def test_cost_counts_every_byte_of_a_plain_call(op: str) -> None:
    spec = registry.spec(op)
    case = next(c for c in spec.cases() if c.kind == "typical")
    args = spec.bind(**case.arguments())
    cost = spec.cost(args)
    written = sum(d.numel() * d.element_size() for d in spec.outputs(args))
    assert cost.write_bytes >= written
    assert cost.bytes == cost.read_bytes + cost.write_bytes > 0
    assert cost.operations > 0


# The harness itself is tested: each kind of fault, planted in a toy, is reported.


def judged(add_backend, function, case_name: str = "padded_rows-float32"):  # type: ignore[no-untyped-def]
    add_backend(backend(target=function))
    case = next(c for c in registry.spec(OP).cases() if c.name == case_name)
    return run_case(OP, case, "toy")


def test_harness_reports_wrong_numbers(add_backend) -> None:  # type: ignore[no-untyped-def]
    outcome = judged(add_backend, constant(1.0))
    assert (outcome.status, outcome.message) == ("failed", "error past its bound")
    assert outcome.fraction > 1e3


def test_harness_reports_a_write_past_the_end(add_backend) -> None:  # type: ignore[no-untyped-def]
    def fused_mul_add(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
        end = bias.storage_offset() + bias.numel()
        torch.as_strided(bias, (1,), (1,), end).fill_(5)
        return (x * scale + bias).contiguous()

    assert judged(add_backend, fused_mul_add).message == "wrote outside its outputs"


def test_harness_reports_a_write_to_the_gap_between_rows(add_backend) -> None:  # type: ignore[no-untyped-def]
    def fused_mul_add(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
        x.as_strided((1,), (1,), x.storage_offset() + x.shape[1]).fill_(5)
        return (x * scale + bias).contiguous()

    assert judged(add_backend, fused_mul_add).message == "wrote outside its outputs"


def test_harness_reports_other_bits_in_a_second_run(add_backend) -> None:  # type: ignore[no-untyped-def]
    runs = []

    def fused_mul_add(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
        runs.append(1)
        y = (x * scale + bias).contiguous()
        return torch.nextafter(y, y + 1) if len(runs) == 2 else y

    assert judged(add_backend, fused_mul_add).message == "a second run gave other bits"


def test_harness_reports_out_left_alone(add_backend) -> None:  # type: ignore[no-untyped-def]
    def fused_mul_add(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
        return (x * scale + bias).contiguous() if out is None else out

    assert (
        judged(add_backend, fused_mul_add).message == "`out=` gave other bits than a fresh result"
    )


def test_harness_reports_strides_of_its_own(add_backend) -> None:  # type: ignore[no-untyped-def]
    def fused_mul_add(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
        return (x * scale + bias).t().contiguous().t()

    assert "new results are contiguous" in judged(add_backend, fused_mul_add).message


def test_harness_reports_an_accepted_bad_call(add_backend) -> None:  # type: ignore[no-untyped-def]
    """The op refuses bad calls itself; a case that expects an error and sees none fails."""
    good = next(c for c in registry.spec(OP).cases() if c.name == "tail-7-float32")
    case = Case("expects-an-error", "hostile", good.make, error="x")
    assert run_case(OP, case, "reference").message == "accepted a bad 'x'"
    other = Case("blames-another", "hostile", lambda g: {**good.make(g), "scale": "2"}, error="x")
    assert "blamed 'scale', not 'x'" in run_case(OP, other, "reference").message


def test_harness_reports_a_static_result_buffer(add_backend) -> None:  # type: ignore[no-untyped-def]
    buffer = torch.empty(5, 33)
    calls = []

    def fused_mul_add(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
        calls.append(1)
        return buffer.copy_(x * scale + bias + (len(calls) > 1))

    message = judged(add_backend, fused_mul_add).message
    assert message == "a second call changed the first result"


def test_harness_reports_the_memory_of_an_input(add_backend) -> None:  # type: ignore[no-untyped-def]
    def fused_mul_add(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
        return x

    add_backend(backend(target=fused_mul_add))
    case = Case(
        "identity", "boundary", lambda g: {"x": torch.ones(4), "bias": torch.zeros(4), "scale": 1.0}
    )
    assert run_case(OP, case, "toy").message == "returned the memory of an input"


def test_harness_reports_strides_of_out_ignored(add_backend) -> None:  # type: ignore[no-untyped-def]
    def fused_mul_add(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
        y = (x * scale + bias).contiguous()
        if out is not None:
            rows = torch.as_strided(out, out.shape, (out.shape[-1], 1), out.storage_offset())
            rows.copy_(y)
            return out
        return y

    assert judged(add_backend, fused_mul_add).status == "failed"


def test_declined_is_decided_before_anything_runs(add_backend) -> None:  # type: ignore[no-untyped-def]
    from kernelhub import BackendUnavailable

    def fused_mul_add(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
        raise BackendUnavailable("CUDA error: misaligned address")

    assert judged(add_backend, fused_mul_add).status == "failed"
    registry.remove_backend("toy")
    add_backend(backend("picky", implementation={"rejects": lambda call: "built for nothing"}))
    case = next(c for c in registry.spec(OP).cases() if c.name == "tail-7-float32")
    outcome = run_case(OP, case, "picky")
    assert outcome.status == "declined"
    assert "picky      built for nothing\n" in outcome.message


def test_harness_reports_a_row_that_knows_its_neighbours(add_backend) -> None:  # type: ignore[no-untyped-def]
    from kernelhub.backend import Backend, Implementation
    from kernelhub.spec import Traits

    spec = registry.spec("fused_gemv")

    def fused_gemv(x, weight, *args, **kwargs):  # type: ignore[no-untyped-def]
        out = kwargs.pop("out", None)
        y = spec.reference(x, weight, *args, **kwargs)
        y = y if x.shape[0] == 1 else torch.nextafter(y, y + 1)
        return y if out is None else out.copy_(y)

    fused_gemv.__signature__ = spec.signature  # type: ignore[attr-defined]
    traits = Traits(batch_invariant=True, deterministic=False, differentiable=True)
    made = Implementation("fused_gemv", fused_gemv, traits=traits)
    add_backend(Backend("toy", (made,)))
    case = next(
        c
        for c in spec.cases()
        if c.error is None
        and c.arguments()["x"].dtype == torch.float32
        and c.arguments()["x"].ndim == 2
        and 1 < c.arguments()["x"].shape[0] <= 16
        and c.arguments()["x"].shape[1] > 8
    )
    assert "alone differs" in run_case("fused_gemv", case, "toy").message


def test_harness_judges_the_variant_that_ran(add_backend) -> None:  # type: ignore[no-untyped-def]
    """Another variant of the backend promises less; the one that runs is held to its own traits."""
    from kernelhub.backend import Backend, Implementation
    from kernelhub.spec import Traits

    runs = []

    def fused_mul_add(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
        runs.append(1)
        y = (x * scale + bias).contiguous()
        return torch.nextafter(y, y + 1) if len(runs) == 2 else y

    loose = Traits(deterministic=False, differentiable=True)
    elsewhere = Implementation(
        OP, constant(1), "gpu", device_types=("cuda",), traits=loose, priority=60
    )
    here = Implementation(OP, fused_mul_add, "cpu", traits=Traits(differentiable=True))
    add_backend(Backend("toy", (elsewhere, here)))
    case = next(c for c in registry.spec(OP).cases() if c.name == "padded_rows-float32")
    assert run_case(OP, case, "toy").message == "a second run gave other bits"


def test_compare_rules() -> None:
    def share(truth, bound, got, dtype=torch.float32):  # type: ignore[no-untyped-def]
        expected = Expected("y", torch.tensor(truth, dtype=torch.float64), torch.tensor(bound))
        return compare(expected, torch.tensor(got, dtype=dtype))

    nan, inf = float("nan"), float("inf")
    assert share([1.0], [0.5], [1.25]) == 0.5
    assert share([nan, inf, -inf], [1.0], [nan, inf, -inf]) == 0.0
    assert share([nan], [1.0], [0.0]) == inf
    assert share([0.0], [1.0], [nan]) == inf
    assert share([inf], [1.0], [-inf]) == inf
    assert share([inf], [1.0], [3e38]) == inf
    assert share([1.0], [0.0], [1.0]) == 0.0
    assert share([1.0], [0.0], [1.0 + 2**-20]) == inf
    assert share([65519.0], [16.0], [inf], torch.float16) == 0.0  # rounds past the largest fp16
    assert share([60000.0], [16.0], [inf], torch.float16) == inf
    assert share([1.0, 2.0], [1.0], [1.0]) == inf


def test_buffers_keep_layout_alignment_and_shared_memory() -> None:
    packed = torch.arange(40, dtype=torch.bfloat16).view(2, 20)
    q, k = packed[:, :12], packed[:, 12:18]
    odd = torch.arange(9.0)[1:]
    made = Buffers({"q": q, "k": k, "odd": odd, "n": 3}, torch.device("cpu"))
    for name, t in (("q", q), ("k", k), ("odd", odd)):
        placed = made.arguments[name]
        assert torch.equal(placed, t)
        assert placed.stride() == t.stride()
        assert placed.data_ptr() % 16 == (t.storage_offset() * t.element_size()) % 16
    first, second = made.arguments["q"], made.arguments["k"]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert not made.changed(())
    second[1, 2] = 7
    assert made.changed(())
    assert not made.changed(("k",))
    packed_tail = first.as_strided((1,), (1,), second.storage_offset() + 6)
    packed_tail.fill_(-1)
    assert made.changed(("q", "k"))
