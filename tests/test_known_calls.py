"""Calls that are like one that has passed the checks are not checked again, and no others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import kernelhub
from kernelhub import ArgumentError, BackendUnavailable, dispatch, function, registry
from kernelhub.backend import Backend, Implementation
from kernelhub.backends.native import abi, library
from kernelhub.spec import OpSpec
from tests.toys import backend

if library.why_not_fast():
    pytest.skip("; ".join(library.why_not_fast()), allow_module_level=True)


class Subclass(torch.Tensor):
    pass


@pytest.fixture(scope="module", autouse=True)
def _keys() -> None:
    assert library.fast_binding() is not None


def key_of(spec: OpSpec) -> dispatch.KeyOf:
    return library._key_of(library.fast_binding(), spec)


def table_of(op: str, backend: str) -> dispatch.Table:
    kernelhub.op(op).on(backend)
    return function._ops[op]._on[backend][1]


def passes(spec: OpSpec, values: list[Any]) -> bool:
    try:
        return spec.validate(spec.bind(*values)) is not None
    except (ArgumentError, RuntimeError):
        return False


def calls(spec: OpSpec) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Every call of the contract that is right, by position; twice, in memory of its own."""
    for case in spec.cases():
        if case.error is None:
            first, second = (spec.bind(**case.arguments()) for _ in range(2))
            yield case.name, *([getattr(a, p.name) for p in spec.params] for a in (first, second))


def _padded(t: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(t.float(), (0, 3)).to(t.dtype)[..., : t.shape[-1]]


def _made_in_inference_mode(t: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return t.clone()


TENSORS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda t: t.to(torch.float64),
    lambda t: t.to(torch.int32),
    lambda t: t.float().to(torch.float8_e5m2),
    lambda t: t.to(torch.bool),
    lambda t: t.unsqueeze(0),
    lambda t: t[..., :-1],
    lambda t: t[:0],
    lambda t: t[:1].expand(t.shape),
    lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    _padded,
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    torch._neg_view,
    _made_in_inference_mode,
    lambda t: t.clone().requires_grad_(),
    lambda t: t.clone().requires_grad_().view_as(t),
    lambda t: torch.nn.Parameter(t.clone(), requires_grad=t.is_floating_point()),
    lambda t: t.as_subclass(Subclass),
    lambda t: torch.quantize_per_tensor(t.float(), 1.0, 0, torch.quint8),
    lambda t: torch.nested.nested_tensor([t, t]),
)
OTHERS = (None, True, False, 0, 1, -1, 3, 2**40, 2**70, 0.0, -1.0, math.nan, math.inf, "swigl!")
OTHERS += ("text" * 40, torch.bfloat16, torch.int8, torch.Generator(), object(), [1])


def changed(values: list[Any]) -> Iterator[list[Any]]:
    """The call with one argument changed, or made to lie in the memory of another."""
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    for i, value in enumerate(values):
        others: list[Any] = list(OTHERS)
        if isinstance(value, torch.Tensor):
            for change in TENSORS:
                try:
                    others.append(change(value))
                except (RuntimeError, IndexError, NotImplementedError):
                    continue  # torch cannot make this one
        for other in tensors:
            same = isinstance(value, torch.Tensor) and value.shape == other.shape
            if other.numel() > 0 and (value is None or (same and value.dtype == other.dtype)):
                others += [other, other.flatten()[1:]]
                room = torch.zeros(other.numel() + 1, dtype=other.dtype)
                yield [
                    room[1:].view(other.shape)
                    if j == i
                    else room[:-1].view(other.shape)
                    if v is other
                    else v
                    for j, v in enumerate(values)
                ]
        for replacement in others:
            yield [*values[:i], replacement, *values[i + 1 :]]


@pytest.mark.filterwarnings(
    "ignore:torch.quantize:UserWarning", "ignore:The PyTorch API of nested:UserWarning"
)
@pytest.mark.parametrize("op", abi.OPS)
def test_calls_of_one_key_pass_the_checks_alike(op: str) -> None:
    spec = registry.spec(op)
    key = key_of(spec)
    passed: dict[bytes, str] = {}
    for name, first, second in calls(spec):
        found = key(*first)
        assert found is None or found == key(*second), name
        if found is not None and passes(spec, first):
            passed[found] = name
    assert len(passed) > 10
    refused = 0
    some = 5 if op == "fused_gemv" else 1  # it is the longest, and alike to fused_moe_gemv
    for name, values, _ in islice(calls(spec), 0, None, some):
        for call in changed(values):
            found = key(*call)
            if found is not None and not passes(spec, call):
                refused += 1
                assert found not in passed, (name, passed[found], call)
    assert refused > 200


def arguments() -> tuple[torch.Tensor, torch.Tensor, float]:
    return torch.randn(3, 8), torch.randn(3, 8), 2.0


def known() -> dict[bytes | None, Any]:
    return table_of("fused_mul_add", "simt").known


@pytest.fixture
def mul_add() -> Iterator[Any]:
    """fused_mul_add on simt, whose call of `arguments` is known."""
    op = kernelhub.op("fused_mul_add").on("simt")
    function._ops["fused_mul_add"].clear()
    for _ in range(3):
        op(*arguments())
    assert len(known()) == 1
    yield op
    function._ops["fused_mul_add"].clear()


def test_a_known_call_is_not_checked(mul_add: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*values: Any) -> Any:
        raise AssertionError("checked")

    monkeypatch.setitem(table_of("fused_mul_add", "simt").namespace, "_unknown", unexpected)
    x, bias, scale = arguments()
    torch.testing.assert_close(mul_add(x, bias, scale), x * scale + bias)
    torch.testing.assert_close(mul_add(x, bias=bias, scale=scale), x * scale + bias)
    with pytest.raises(AssertionError, match="checked"):
        mul_add(x, bias, 3)


def test_a_bad_call_beside_a_known_one_is_refused(mul_add: Any) -> None:
    x, bias, scale = arguments()
    with pytest.raises(ArgumentError, match="bias"):
        mul_add(x, bias.half(), scale)
    with pytest.raises(ArgumentError, match="out"):
        mul_add(x, bias, scale, out=torch.empty(3, 1).expand(3, 8))


def test_overlap_is_seen_beside_a_known_call_with_out(mul_add: Any) -> None:
    x, bias, scale = arguments()
    for _ in range(3):
        mul_add(x, bias, scale, out=torch.empty(3, 8))
    assert len(known()) == 2
    both = torch.randn(25)
    with pytest.raises(ArgumentError, match="out"):
        mul_add(both[:24].view(3, 8), bias, scale, out=both[1:].view(3, 8))


def test_a_derivative_is_not_lost_by_a_known_call(mul_add: Any) -> None:
    x, bias, scale = arguments()
    with pytest.raises(BackendUnavailable, match="requires grad"):
        mul_add(x.requires_grad_(), bias, scale)
    with torch.no_grad():
        mul_add(x, bias, scale)
    with pytest.raises(BackendUnavailable, match=r"torch\.func"):
        torch.func.vmap(lambda t: mul_add(t, bias[0], scale))(torch.randn(4, 3, 8))


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_there_is_no_key_where_torch_ops_are_followed_or_transformed() -> None:
    key, call = key_of(registry.spec("fused_mul_add")), (*arguments(), None)
    found: dict[str, bytes | None] = {}

    def look(name: str) -> torch.Tensor:
        found[name] = key(*call)
        return call[0]

    with Watch():
        look("dispatch mode")
    torch.func.vmap(lambda t: t + look("vmap"))(torch.ones(2, 3, 8))
    torch.func.grad(lambda t: (t * look("grad")).sum())(torch.ones(3, 8))
    with forward_ad.dual_level():
        look("forward mode")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        torch.jit.trace(lambda t: t + look("trace"), (torch.ones(3, 8),), check_trace=False)
    assert found == dict.fromkeys(("dispatch mode", "vmap", "grad", "forward mode", "trace"))
    assert key(*call) is not None


def test_a_key_tells_whether_a_gradient_may_be_asked_for() -> None:
    key, (x, bias, scale) = key_of(registry.spec("fused_mul_add")), arguments()
    plain = key(x, bias, scale, None)
    wanted = bias.requires_grad_()
    with_grad = key(x, wanted, scale, None)
    assert plain is not None
    assert with_grad not in (plain, None)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert key(x, wanted, scale, None) == plain
    as_parameter = torch.nn.Parameter(wanted.detach())
    assert key(x, as_parameter, scale, None) == with_grad
    assert key(x, bias, scale, wanted) is None  # to be written


@pytest.mark.parametrize("op", abi.OPS)
def test_a_key_without_checks_tells_what_a_kernel_is_told(op: str) -> None:
    spec = registry.spec(op)
    whole, less = key_of(spec), library._key_of(library.fast_binding(), spec, checks=False)
    for _, first, _ in islice(calls(spec), 0, None, 10):
        found = whole(*first)
        assert found is None or found.startswith(less(*first) or b"?")  # overlaps come after
        with Watch():
            assert less(*first) is not None
        for i, value in enumerate(first):
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                other = [*first[:i], value.flatten()[1:], *first[i + 1 :]]
                assert less(*other) != less(*first)


def test_a_gradient_through_the_reference_is_known() -> None:
    op = kernelhub.op("fused_mul_add").on("reference")
    table = table_of("fused_mul_add", "reference")
    table.clear()
    x, bias, scale = arguments()
    for want in (False, True):
        for _ in range(3):
            x = x.detach().requires_grad_(want)
            result = op(x, bias, scale)
            assert result.requires_grad == want
    assert len(table.known) == 2
    result.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((3, 8), scale))


def test_a_change_of_policy_forgets_known_calls() -> None:
    op = kernelhub.op("fused_mul_add")
    table = function._ops["fused_mul_add"].table
    try:
        with kernelhub.use("simt"):
            for _ in range(3):
                op(*arguments())
            assert op.explain(*arguments()).backend == "simt"
            assert not table.known
        for _ in range(3):
            op(*arguments())
        assert len(table.known) == 1
        with kernelhub.use("simt"):
            assert not table.known
    finally:
        function._ops["fused_mul_add"].clear()


def test_a_fallback_is_never_known(add_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_HOST_DEVICES", ())
    rules = {"rejects": lambda call: ["too small"]}
    add_backend(backend("toy", 42.0, implementation=rules))
    op, table = kernelhub.op("fused_mul_add"), function._ops["fused_mul_add"].table
    kernelhub.configure("fused_mul_add=reference")
    op(*arguments())  # asked for, and told of
    kernelhub.configure(fallback="error")
    for _ in range(3):
        with pytest.raises(BackendUnavailable, match="fallback=error"):
            op(*arguments())
        assert not table.known


def test_calls_that_differ_in_a_number_that_nobody_checks_are_alike(mul_add: Any) -> None:
    x, bias, _ = arguments()
    for scale in (0.5, -3.0, 1e30, math.inf):
        expected = torch.addcmul(bias, x, torch.full_like(x, scale))
        torch.testing.assert_close(mul_add(x, bias, scale), expected)
    assert len(known()) == 1
    name = "top_k_top_p_sampling_from_probs"
    sample, table = kernelhub.op(name).on("simt"), table_of(name, "simt")
    table.clear()
    probs = torch.full((1, 1000), 1e-3)
    drawn = [int(sample(probs, 10**6 + n, 0.9, seed=n, offset=-n)) for n in range(8)]
    assert len(table.known) == 1
    table.clear()
    exact = kernelhub.op(name).on("reference")
    assert drawn == [int(exact(probs, 10**6, 0.9, seed=n, offset=-n)) for n in range(8)]
    assert len(set(drawn)) > 4
    with pytest.raises(ArgumentError, match="seed"):
        sample(probs, 5, 0.9, seed=2**70, offset=0)
    with pytest.raises(ArgumentError, match="top_p"):
        sample(probs, 5, 1.5, seed=1, offset=0)


@pytest.mark.parametrize(
    "read",
    [
        lambda n: n > 2,
        lambda n: bool(n),
        lambda n: n + 1.0,
        lambda n: math.isnan(n),
        lambda n: {n: 1},
        lambda n: f"{n}",
        lambda n: n in (1.0, 2.0),
    ],
)
@pytest.mark.parametrize("reader", ["rejects", "prepare"])
def test_who_reads_such_a_number_reads_that_of_every_call(
    add_backend: Any, read: Callable[[Any], Any], reader: str
) -> None:
    seen: list[float] = []

    def rejects(a: Any) -> list[str]:
        if reader == "rejects" and isinstance(a.scale, float):
            read(a.scale)
            return ["too large"] if a.scale > 2 else []
        return []

    def prepare(a: Any) -> Callable[..., torch.Tensor]:
        if reader == "prepare" and isinstance(a.scale, float):
            read(a.scale)
            seen.append(a.scale)
        return lambda x, bias, scale, out: torch.full_like(x, 42.0)

    implementation = Implementation("fused_mul_add", prepare=prepare, rejects=rejects)
    add_backend(Backend("toy", (implementation,)))
    op = kernelhub.op("fused_mul_add").on("toy,auto")
    x, bias, _ = arguments()
    for scale in (1.0, 1.0, 1.0, 3.0, 2.0):
        expected = x * scale + bias
        if reader == "prepare" or scale <= 2:
            expected = torch.full_like(x, 42.0)
        torch.testing.assert_close(op(x, bias, scale), expected)
    assert seen == ([1.0, 1.0, 1.0, 3.0, 2.0] if reader == "prepare" else [])
    if reader == "prepare":
        seen.clear()
        with kernelhub.use("toy"):
            plan = kernelhub.op("fused_mul_add").plan(x, bias, 1.0)
        assert plan(x, bias).tolist() == torch.full_like(x, 42.0).tolist()
        assert seen == [1.0]


def test_known_calls_are_bounded(mul_add: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MOST_KNOWN", 5)
    for n in range(1, 13):
        for _ in range(2):
            mul_add(torch.ones(n), torch.ones(n), 1.0)
    assert 0 < len(known()) <= 5


def test_a_key_has_all_arguments_by_position() -> None:
    key = key_of(registry.spec("fused_mul_add"))
    for call in (lambda: key(1.0), lambda: key(1, 2, 3, 4, 5), lambda: key(1, 2, 3, out=4)):
        with pytest.raises(TypeError, match="expected 4 positional arguments"):
            call()
