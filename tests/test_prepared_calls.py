"""What an implementation prepares for a call serves all calls like it, and no others."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch

import kernelhub
from kernelhub import RegistrationError, dispatch, function, registry
from kernelhub.backend import Backend, Implementation
from kernelhub.backends.native import abi, library, tiles
from kernelhub.backends.native.kernels import maker
from kernelhub.spec import Case
from tests.toys import OP, call, constant

needs_keys = pytest.mark.skipif(
    bool(library.why_not_fast()), reason="; ".join(library.why_not_fast())
)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    registry.notify()
    yield
    registry.notify()


class Subclass(torch.Tensor):
    pass


def some_cases(op: str) -> Iterator[Case]:
    """Good calls that are soon emulated and draw no random seed."""

    def size(case: Case) -> int:
        given = case.arguments().values()
        return sum(v.numel() for v in given if isinstance(v, torch.Tensor))

    good = (c for c in registry.spec(op).cases() if c.error is None)
    fixed = (c for c in good if c.arguments().get("seed", 0) is not None)
    return islice((c for c in fixed if size(c) < 5_000), 0, None, 9)


def values_of(op: str, case: Case) -> list[Any]:
    spec = registry.spec(op)
    bound = spec.bind(**case.arguments())
    return [getattr(bound, p.name) for p in spec.params]


def misplaced(value: Any) -> Any:
    """A tensor in memory of another alignment."""
    if not isinstance(value, torch.Tensor) or value.numel() == 0:
        return value
    last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    room = torch.zeros(last + 2, dtype=value.dtype)
    room[1:].copy_(value.as_strided((last + 1,), (1,)))
    return room[1:].as_strided(value.shape, value.stride())


def written(op: str, values: list[Any], result: Any) -> list[torch.Tensor]:
    """What a call returned and what it wrote to."""
    params = registry.spec(op).params
    returned = list(result) if isinstance(result, tuple) else [result]
    mutated = [v for p, v in zip(params, values, strict=True) if p.role in ("in_place", "output")]
    return [t for t in (*returned, *mutated) if t is not None]


@pytest.mark.parametrize("op", abi.OPS)
def test_what_is_prepared_keeps_no_tensor_and_serves_other_memory(op: str) -> None:
    kernelhub.op(op).on("simt")
    spec, seen = registry.spec(op), 0
    for case in some_cases(op):
        first = [misplaced(v) for v in values_of(op, case)]
        entry = function.entry_for(op, "simt", spec.bind(*first))
        if entry is None:
            continue
        run = entry.prepared(spec.bind(*first))
        kept = [weakref.ref(v) for v in first if isinstance(v, torch.Tensor) and v.numel()]
        run(*first)
        del first
        assert not any(ref() is not None for ref in kept), case.name
        here, there = values_of(op, case), [misplaced(v) for v in values_of(op, case)]
        expected = written(op, here, entry.run(*here))
        found = written(op, there, run(*there))
        for f, e in zip(found, expected, strict=True):
            assert (f.shape, f.stride(), f.dtype) == (e.shape, e.stride(), e.dtype), case.name
            assert torch.equal(f.float().nan_to_num(7.0), e.float().nan_to_num(7.0)), case.name
        seen += 1
    assert seen > 3


def recording(made: list[tuple[int, ...]]) -> Implementation:
    def prepare(a: Any) -> Any:
        made.append(tuple(a.x.shape))
        size = len(a.x)
        return lambda x, bias, scale, out: torch.full((size,), 42.0)

    return Implementation(OP, prepare=prepare)


@needs_keys
def test_a_call_is_prepared_once_for_all_like_it(add_backend: Any) -> None:
    assert library.fast_binding() is not None
    made: list[tuple[int, ...]] = []
    add_backend(Backend("toy", (recording(made),)))
    op = kernelhub.op(OP)
    for size in (3, 5, 3, 5):
        for _ in range(4):
            assert op(torch.ones(size), torch.ones(size), 1.0).tolist() == [42.0] * size
    assert made.count((3,)) <= 3  # the first call of all is told of, and not kept
    assert made.count((5,)) == 2  # one that runs it, and one for those to come
    op(torch.ones(3).requires_grad_(), torch.ones(3), 1.0).sum().backward()


@needs_keys
def test_what_is_prepared_under_a_policy_that_has_gone_is_not_kept(add_backend: Any) -> None:
    assert library.fast_binding() is not None
    table = function._ops[OP].table
    change: list[bool] = []

    def prepare(a: Any) -> Any:
        if change:
            change.clear()
            kernelhub.configure("reference")
            kernelhub.configure()
            kernelhub.op(OP)(torch.ones(4), torch.ones(4), 1.0)
        return lambda *values: constant(42.0)(*values[:3])

    add_backend(Backend("toy", (Implementation(OP, prepare=prepare),)))
    op = kernelhub.op(OP)
    op(*call())
    with_change = dispatch.key_for(registry.spec(OP), True)(*call(), None)
    assert with_change is not None
    assert not table.known
    change.append(True)
    table.checked(with_change, *call(), None)
    assert not change
    assert with_change not in table.known
    op(*call())
    op(*call())
    assert with_change in table.known


@needs_keys
def test_another_tile_forgets_what_was_prepared() -> None:
    x, weight = torch.ones(1, 64), torch.ones(16, 64)
    op = kernelhub.op("fused_gemv").on("simt")
    table = function._ops["fused_gemv"]._on["simt"][1]
    for _ in range(3):
        op(x, weight)
    assert len(table.known) == 1
    name = tiles.shape_class("fp32", 16, 64)
    with tiles.override({"fused_gemv": {name: "r16"}}):
        assert not table.known
        for _ in range(3):
            op(x, weight)
        assert len(table.known) == 1
    assert not table.known


@pytest.mark.parametrize("given", [{}, {"target": constant(1.0), "prepare": lambda a: None}])
def test_an_implementation_has_a_target_or_prepares_one(given: dict[str, Any]) -> None:
    with pytest.raises(RegistrationError, match=OP):
        registry.add_backend(Backend("toy", (Implementation(OP, **given),)))


LIKES = {
    "same": torch.ones(3, 4),
    "transposed": torch.ones(4, 3).t(),
    "row of a wider one": torch.ones(2, 9)[:1, :4],
    "no dimension": torch.ones(()),
    "empty": torch.ones(0, 4),
    "another dtype": torch.ones(3, 4, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("like", LIKES.values(), ids=LIKES)
@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (), (0, 4), (5,), None])
def test_new_tensors_are_contiguous(like: torch.Tensor, shape: tuple[int, ...] | None) -> None:
    shape = tuple(like.shape) if shape is None else shape
    made = maker(like, shape, torch.float32)(like)
    expected = torch.empty(shape, dtype=torch.float32)
    assert (made.shape, made.stride(), made.dtype) == (shape, expected.stride(), torch.float32)
    assert made.data_ptr() != like.data_ptr() or made.numel() == 0


def plan_of(op: str, backend: str, **given: Any) -> Any:
    with kernelhub.use(backend):
        return kernelhub.op(op).plan(**given)


@needs_keys
def test_a_plan_prepares_once_for_all_calls_that_are_alike(add_backend: Any) -> None:
    assert library.fast_binding() is not None
    made: list[tuple[int, ...]] = []
    add_backend(Backend("toy", (recording(made),)))
    run = plan_of(OP, "toy", x=torch.ones(3), bias=torch.ones(3), scale=1.0)
    for size in (3, 5, 3, 5):
        for _ in range(2):
            assert run(torch.ones(size), torch.ones(size)).tolist() == [42.0] * size
    assert made == [(3,), (5,)]
    run(torch.ones(3).as_subclass(Subclass), torch.ones(3))  # it has no key
    assert made == [(3,), (5,), (3,)]


def test_a_plan_takes_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(48, 64, generator=g), torch.rand(2, 1, 6, 5, generator=g)
    x = torch.randn(2, 1, 6, 64, generator=g)
    mul_add = plan_of(OP, "simt", x=scale, bias=scale, scale=2.0)
    gemv = plan_of("fused_gemv", "simt", x=x, weight=weight, activation="swiglu")
    for keys in (True, False):
        if not keys:
            monkeypatch.setitem(gemv.__globals__, "_key", dispatch._no_key)
        for given in (x, x[0], x[0, 0], x[0, 0, 0], x[:0], x[:, :, :3], x[0, 0].clone()):
            for _ in range(2):
                expected = kernelhub.op("fused_gemv").reference(given, weight, activation="swiglu")
                torch.testing.assert_close(gemv(given), expected, rtol=1e-3, atol=1e-3)
        for given in (scale, scale[0], scale[:0], scale[..., :2]):
            for _ in range(2):
                torch.testing.assert_close(mul_add(given, given), given * 3)


def test_a_plan_sees_that_its_weight_has_changed() -> None:
    x, weight = torch.ones(1, 64), torch.nn.Parameter(torch.ones(16, 64))
    gemv = plan_of("fused_gemv", "simt", x=x, weight=weight.requires_grad_(False))
    for rows in (16, 8, 24):
        weight.data = torch.full((rows, 64), float(rows))
        for _ in range(2):
            assert gemv(x).tolist() == [[64.0 * rows] * rows]


def test_autograd_is_told_what_a_kernel_wrote_to() -> None:
    x, weight, q, k = (
        torch.ones(1, 64),
        torch.ones(16, 64),
        torch.ones(1, 2, 32),
        torch.ones(1, 1, 32),
    )
    for out in (torch.empty(1, 16), torch.empty(16, 1).t()):
        kernelhub.op("fused_gemv").on("simt")(x, weight, out=out)
        assert out._version == 1
    out = torch.empty(1, 64)
    kernelhub.op(OP).on("simt")(x, x, 2.0, out=out)
    positions, table = torch.zeros(1, dtype=torch.int64), torch.ones(4, 32)
    rotary = kernelhub.op("rotary_embedding").on("simt")
    rotary(positions, q, k, 32, table)
    assert [t._version for t in (out, q, k)] == [1, 1, 1]
    rotary(positions, q, None, 32, table)
    assert [t._version for t in (q, k)] == [2, 1]
    with torch.inference_mode():
        rotary(positions, q.clone(), None, 32, table)
