"""Registration checks everything before it changes anything."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

import kernelhub
from kernelhub import backend as backend_module
from kernelhub import compile as torch_ops
from kernelhub import contracts, function, plugins, registry
from kernelhub.backend import Backend, Implementation
from kernelhub.errors import RegistrationError, UnknownName
from kernelhub.spec import Cost, OpSpec, Param, TensorDesc
from tests.toys import OP, backend, call, constant


@pytest.fixture(autouse=True)
def _loaded() -> None:
    plugins.load()


def refused(made: Backend, *, shipped: bool = False) -> str:
    before = (registry.backends(), {name: registry.entries(name) for name in registry.specs()})
    with pytest.raises(RegistrationError) as caught:
        registry.add_backend(made, shipped=shipped)
    after = (registry.backends(), {name: registry.entries(name) for name in registry.specs()})
    assert before == after, "a refused registration changed the tables"
    return str(caught.value)


@pytest.mark.parametrize("name", contracts.NAMES)
def test_op_returns_the_function_of_the_ops_module(name: str) -> None:
    assert kernelhub.op(name) is getattr(kernelhub.ops, name)
    assert kernelhub.op(name).__name__ == name
    assert kernelhub.op(name).__doc__ == kernelhub.op(name).spec.prototype.__doc__


def test_unknown_op_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'fused_gemv'"):
        kernelhub.op("fused_gemm")


def test_an_op_that_does_not_exist_cannot_be_implemented() -> None:
    made = Backend("toy", (Implementation("musa_fused_moe_gemv", constant(1)),))
    assert "did you mean 'fused_moe_gemv'" in refused(made)


@pytest.mark.parametrize("name", contracts.NAMES)
def test_every_op_is_callable_under_its_torch_name(name: str) -> None:
    # The fault of the code that this replaces: schema and kernel under different names.
    spec = registry.spec(name)
    torch_op = getattr(torch.ops.kernelhub, name).default
    assert str(torch_op._schema) == f"kernelhub::{name}{torch_ops.schema(spec)}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(
        f"kernelhub::{name}", "CompositeExplicitAutograd"
    )


def test_signature_mismatch_is_shown_as_a_diff() -> None:
    def fused_mul_add(x, bias, factor, *, out=None):  # type: ignore[no-untyped-def]
        return x

    message = refused(backend(target=fused_mul_add))
    assert "-positional or keyword scale" in message
    assert "+positional or keyword factor" in message


def test_other_default_is_a_mismatch() -> None:
    def fused_mul_add(x, bias, scale=1.0, *, out=None):  # type: ignore[no-untyped-def]
        return x

    assert "+positional or keyword scale=1.0" in refused(backend(target=fused_mul_add))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("no_such_module:f", "cannot be imported"),
        ("tests.toys:no_such_function", "cannot be imported"),
        ("tests.toys:OP", "not callable"),
        ("tests.toys", "cannot be imported"),
    ],
)
def test_declared_without_a_callable_implementation(target: str, said: str) -> None:
    assert said in refused(backend(target=target))


def test_one_fault_among_good_implementations_registers_nothing() -> None:
    good = Implementation(OP, constant(1))
    bad = Implementation("fused_gemv", constant(1))
    assert "signature differs" in refused(Backend("toy", (good, bad)))


def test_all_faults_are_reported_together() -> None:
    made = backend("toy", api_version=99, priority=100, target="no_such_module:f")
    message = refused(made)
    assert "API 99" in message
    assert "priority 100" in message
    assert "no_such_module" in message


def test_duplicate_backend(add_backend) -> None:  # type: ignore[no-untyped-def]
    add_backend(backend())
    assert "registered already" in refused(backend())


def test_one_backend_may_have_many_ops(add_backend) -> None:  # type: ignore[no-untyped-def]
    ops = ("fused_mul_add", "fused_gemv", "rotary_embedding")
    own = tuple(Implementation(op, registry.spec(op).reference) for op in ops)
    add_backend(Backend("several", own))
    for op in ops:
        assert "several" in kernelhub.op(op).backends()


def test_tie_in_priority(add_backend) -> None:  # type: ignore[no-untyped-def]
    add_backend(backend("first"))
    assert "ties with 'first'" in refused(backend("second"))
    add_backend(backend("second", priority=51))
    add_backend(backend("elsewhere", device_types=("cuda",), priority=52))
    own = [name for name in kernelhub.op(OP).backends() if name not in registry.SHIPPED]
    assert own == ["elsewhere", "second", "first"]


def test_tie_is_only_on_a_shared_device(add_backend) -> None:  # type: ignore[no-untyped-def]
    add_backend(backend("first", device_types=("cuda",)))
    add_backend(backend("second", device_types=("musa", "xpu")))
    assert "ties" in refused(backend("third", device_types=("xpu",)))


def test_two_variants_of_one_name() -> None:
    twice = (Implementation(OP, constant(1)), Implementation(OP, constant(2), priority=3))
    assert "both called 'toy'" in refused(Backend("toy", twice))


@pytest.mark.parametrize("name", ["cuda", "musa", "simt", "reference"])
def test_shipped_names_are_reserved(name: str) -> None:
    assert "reserved" in refused(backend(name)) or "already" in refused(backend(name))


@pytest.mark.parametrize("name", ["auto", "", "a-b", "a b", "x=y"])
def test_names_that_a_policy_could_not_say(name: str) -> None:
    assert "must be letters" in refused(backend(name))


@pytest.mark.parametrize("priority", [0, 100, -5])
def test_outside_priority_stays_between_reference_and_vendor(priority: int) -> None:
    assert "outside 1..99" in refused(backend(priority=priority))


@pytest.mark.parametrize(("offset", "taken"), [(0, True), (-1, True), (1, False), (-2, False)])
def test_api_version_now_and_one_before(
    monkeypatch: pytest.MonkeyPatch, offset: int, taken: bool
) -> None:
    monkeypatch.setattr(registry, "API_VERSION", 5)
    made = backend(api_version=5 + offset)
    if taken:
        registry.add_backend(made)
        registry.remove_backend("toy")
    else:
        assert f"API {5 + offset}" in refused(made)
    assert backend_module.API_VERSION == 1


def test_something_that_is_no_backend() -> None:
    with pytest.raises(RegistrationError, match="got dict"):
        registry.add_backend({"name": "toy"})  # type: ignore[arg-type]


def _spec(**changes: object):  # type: ignore[no-untyped-def]
    base = registry.spec(OP)
    names = {f.name for f in attrs.fields(type(base)) if f.init}
    return type(base)(**{**{n: getattr(base, n) for n in names}, **changes})


def _op_refused(**changes: object) -> str:
    before = registry.specs()
    with pytest.raises(RegistrationError) as caught:
        function.add(_spec(**changes))
    assert registry.specs() == before
    return str(caught.value)


def other_op(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
    """An op for the tests."""


def undocumented(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
    pass


def two_parameters(x, bias):  # type: ignore[no-untyped-def]
    """Declares less than its params."""


def test_incomplete_ops_are_refused() -> None:
    assert "registered already" in _op_refused()
    assert "no docstring" in _op_refused(prototype=undocumented)
    assert "-positional" not in _op_refused(prototype=undocumented)
    assert "signature and params differ" in _op_refused(prototype=two_parameters)
    assert "reference is not callable" in _op_refused(prototype=other_op, reference=None)
    assert "signature differs" in _op_refused(prototype=other_op, reference=two_parameters)
    assert "device_param" in _op_refused(prototype=other_op, device_param="nothing")


def test_an_op_from_outside_runs_and_leaves() -> None:
    op = function.add(_spec(prototype=other_op))
    try:
        x, bias, scale = call()
        assert op is kernelhub.op("other_op")
        assert torch.equal(op(x, bias, scale), torch.full((3,), 7.0))
        assert op.backends() == ("reference",)
        assert torch.equal(torch.ops.kernelhub.other_op(x, bias, None, 3.0, ""), op(x, bias, scale))
    finally:
        function.remove("other_op")
    with pytest.raises(UnknownName):
        kernelhub.op("other_op")


def _minimal(prototype: Any, *params: Param) -> OpSpec:
    """The prototype is its own reference; the result is like the first parameter."""
    first = params[0].name
    return OpSpec(
        prototype=prototype,
        params=params,
        check=lambda args: None,
        outputs=lambda args: (TensorDesc.like(getattr(args, first)),),
        reference=prototype,
        oracle=lambda args, chain: (),
        cases=lambda: iter(()),
        cost=lambda args: Cost(0, 0, 0),
        device_param=first,
    )


FLOATS = [torch.float32]


def awkward(self, run, error=3.0, *, result=None, isinstance=1.0, out=None):  # type: ignore[no-untyped-def]
    """Parameters called as generated code might call its own."""
    made = self * run * isinstance + error + (0 if result is None else result)
    return made if out is None else out.copy_(made)


AWKWARD = _minimal(
    awkward,
    Param("self", dtypes=FLOATS),
    Param("run", dtypes=FLOATS, fixed=True),
    Param("error", dtypes=FLOATS, types=(float,), fixed=True),
    Param("result", dtypes=FLOATS, optional=True),
    Param("isinstance", "attribute", types=(float,), fixed=True),
    Param("out", "output", dtypes=FLOATS, optional=True),
)


def test_parameters_of_any_name(add_backend: Any) -> None:
    op = function.add(AWKWARD)
    try:
        prepared = Implementation("awkward", prepare=lambda a: lambda *values: awkward(*values[:3]))
        add_backend(Backend("toy", (prepared,), automatic=False))
        x, y = torch.full((3,), 2.0), torch.full((3,), 5.0)
        expected = torch.full((3,), 13.0)
        compiled = torch.compile(lambda a: op(self=a, run=y), backend="aot_eager", fullgraph=True)
        with kernelhub.use("toy"):
            plan = op.plan(self=x, run=y)
        runs = (
            op,
            op.on("reference"),
            op.on("toy"),
            lambda *given: plan(x),
            lambda *_: compiled(x),
        )
        for run in runs:
            for _ in range(3):
                assert torch.equal(run(x, y), expected)
        assert op.explain(self=x, run=y, error=1.0).backend == "reference"
        assert torch.equal(op(self=x, run=y, error=y, result=x, out=torch.empty(3)), expected + 4)
        for call in (op, compiled):
            x.requires_grad_(True).grad = None
            (call(x, y) if call is op else call(x)).sum().backward()
            assert x.grad is not None
            assert torch.equal(x.grad, y)
        with pytest.raises(RuntimeError, match="size") as caught:
            op(self=torch.ones(2), run=y, error=1.0, result=x)
        assert caught.value.kernelhub_selection.backend == "reference"  # type: ignore[attr-defined]
    finally:
        function.remove("awkward")


def test_parameters_whose_names_generated_code_has_are_refused() -> None:
    def with_backend(x, backend):  # type: ignore[no-untyped-def]
        """The torch op has a parameter of that name."""

    def with_tensor(x, x_tensor):  # type: ignore[no-untyped-def]
        """So would this one's."""

    def with_underscore(_key):  # type: ignore[no-untyped-def]
        """Names in generated code begin so."""

    before = registry.specs()
    either = Param("x", dtypes=FLOATS, types=(float,))
    for prototype, name in ((with_backend, "backend"), (with_tensor, "x_tensor")):
        with pytest.raises(RegistrationError, match=f"two parameters '{name}'"):
            function.add(_minimal(prototype, either, Param(name, dtypes=FLOATS)))
    with pytest.raises(RegistrationError, match="'_key' begins with an underscore"):
        _minimal(with_underscore, Param("_key", dtypes=FLOATS))
    assert registry.specs() == before
