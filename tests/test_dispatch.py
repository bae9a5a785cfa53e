"""From a call to the implementation: checks first, reasons always, nothing in silence."""

from __future__ import annotations

import gc
import inspect
import json
import linecache
import logging
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import kernelhub
from kernelhub import (
    ArgumentError,
    BackendUnavailable,
    FallbackWarning,
    TensorDesc,
    dispatch,
    registry,
)
from kernelhub.backend import Backend, Implementation
from kernelhub.spec import DeviceDesc, Traits, parse_device
from tests.toys import OP, backend, call, constant

op = kernelhub.op(OP)


def test_signature_and_docstring_are_the_contracts() -> None:
    gemv = kernelhub.ops.fused_gemv
    assert list(inspect.signature(gemv).parameters)[:4] == [
        "x",
        "weight",
        "x_scale",
        "weight_scale",
    ]
    assert inspect.signature(gemv).parameters["group_size"].kind is inspect.Parameter.KEYWORD_ONLY
    assert "Raises:" in (gemv.__doc__ or "")
    with pytest.raises(TypeError, match="positional"):
        gemv(*[torch.ones(1)] * 5)


@pytest.mark.parametrize(
    "name",
    ["rotary_embedding", "fused_gemv", "fused_moe_gemv", OP, "top_k_top_p_sampling_from_probs"],
)
def test_supported_in_the_docstring_is_what_is_registered(name: str) -> None:
    documented = (kernelhub.op(name).__doc__ or "").split("Supported:")[1].split("\n\n")[0]
    heads = [line.split(":")[0] for line in documented.strip().splitlines() if ":" in line]
    names = {n.strip() for head in heads for n in head.split(",")}
    shipped = set(registry.SHIPPED)
    assert names & shipped == set(kernelhub.op(name).backends()) & shipped


def test_arguments_are_checked_before_any_backend_is_asked(add_backend) -> None:  # type: ignore[no-untyped-def]
    asked = []

    def fused_mul_add(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
        asked.append(x)
        return x

    add_backend(backend(target=fused_mul_add))
    with pytest.raises(ArgumentError) as caught:
        op(torch.ones(4), torch.ones(5), 1.0)
    assert (caught.value.op, caught.value.argument) == (OP, "bias")
    with pytest.raises(ArgumentError, match="argument 'x': expected a tensor"):
        op([1.0], torch.ones(1), 1.0)
    with pytest.raises(ArgumentError, match=r"argument 'scale'.*64 bits"):
        op(torch.ones(1), torch.ones(1), 10**400)
    assert asked == []
    op(*call())
    assert len(asked) == 1


def test_mixed_devices_and_described_tensors_are_refused() -> None:
    x = torch.ones(2)
    with pytest.raises(ArgumentError, match="argument 'bias': expected a tensor on cpu"):
        op(x, torch.ones(2, device="meta"), 1.0)
    described = TensorDesc((2,), torch.float32)
    with pytest.raises(ArgumentError, match="explained, not run"):
        op(described, described, 1.0)


def test_rejects_decide_per_call_and_are_told(add_backend) -> None:  # type: ignore[no-untyped-def]
    reason = "built for even sizes"
    rules = {"rejects": lambda c: [reason] if c.x.numel() % 2 else []}
    add_backend(backend("toy", 42.0, implementation=rules))
    for size in (4, 3, 4, 5, 6):  # alternating: no choice is kept for the other shape
        result = op(torch.ones(size), torch.ones(size), 1.0)
        assert float(result[0]) == (2.0 if size % 2 else 42.0)
    selection = op.explain(torch.ones(3), torch.ones(3), 1.0)
    assert selection.backend == "reference"
    assert reason in str(selection)
    with kernelhub.use("toy"), pytest.raises(BackendUnavailable, match=reason):
        op(torch.ones(3), torch.ones(3), 1.0)


def test_gradients_go_to_a_backend_that_has_them(add_backend) -> None:  # type: ignore[no-untyped-def]
    add_backend(backend("toy", 42.0, traits=Traits(differentiable=False)))
    x, bias, scale = call()
    assert float(op(x, bias, scale)[0]) == 42.0
    x.requires_grad_()
    y = op(x, bias, scale)
    assert y.tolist() == [7.0] * 3
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 3.0, 3.0]
    with kernelhub.use("toy"), pytest.raises(BackendUnavailable, match="'x' requires grad"):
        op(x, bias, scale)
    with torch.no_grad():
        assert float(op(x, bias, scale)[0]) == 42.0


def test_availability_is_asked_once_and_its_reason_told(add_backend) -> None:  # type: ignore[no-untyped-def]
    asked = []

    def probe(device):  # type: ignore[no-untyped-def]
        asked.append(str(device))
        return ["the vendor library is missing: install libvendor"]

    add_backend(backend(probe=probe))
    assert float(op(*call())[0]) == 7.0
    assert "install libvendor" in str(op.explain(*call()))
    assert asked == ["cpu"]


def test_a_probe_that_raises_is_a_reason(add_backend) -> None:  # type: ignore[no-untyped-def]
    def probe(device):  # type: ignore[no-untyped-def]
        raise OSError("broken driver")

    add_backend(backend(probe=probe))
    assert float(op(*call())[0]) == 7.0
    assert "its probe failed: OSError: broken driver" in str(op.explain(*call()))


def test_missing_modules_and_other_devices_are_reasons(add_backend) -> None:  # type: ignore[no-untyped-def]
    add_backend(backend("needs", implementation={"requires": ("no_such_module",)}))
    add_backend(backend("far", device_types=("musa",), priority=60))
    reasons = {c.backend: c.reasons for c in op.explain(*call()).candidates}
    assert reasons["needs"] == ("module 'no_such_module' is not installed",)
    assert reasons["far"] == ("runs on musa; the tensors are on cpu",)


def test_an_exception_from_a_kernel_is_not_retried_elsewhere(add_backend) -> None:  # type: ignore[no-untyped-def]
    def fused_mul_add(x, bias, scale, *, out=None):  # type: ignore[no-untyped-def]
        raise RuntimeError("launch failed")

    add_backend(backend(target=fused_mul_add))
    with pytest.raises(RuntimeError, match="launch failed") as caught:
        op(*call())
    selection = caught.value.kernelhub_selection  # type: ignore[attr-defined]
    assert selection.backend == "toy"
    assert [name for name, _ in selection.inputs] == ["x", "bias"]
    if sys.version_info >= (3, 11):
        assert "while kernelhub ran fused_mul_add: toy" in caught.value.__notes__[0]


def test_backends_come_and_go(add_backend) -> None:  # type: ignore[no-untyped-def]
    assert float(op(*call())[0]) == 7.0
    add_backend(backend())
    assert float(op(*call())[0]) == 42.0
    kernelhub.registry.remove_backend("toy")
    assert float(op(*call())[0]) == 7.0


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats the CPU as an accelerator, where landing on the reference is worth a word."""
    monkeypatch.setattr(dispatch, "_HOST_DEVICES", ())
    monkeypatch.setattr(op.explain.__self__.table, "_told", set())


def test_falling_back_warns_once_per_reason(accelerator, add_backend) -> None:  # type: ignore[no-untyped-def]
    with pytest.warns(FallbackWarning, match="no backend for 'cpu' devices is installed"):
        op(*call())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op(*call())
    add_backend(backend(probe=lambda device: ["no driver: install it"]))
    with pytest.warns(FallbackWarning, match="toy: no driver: install it"):
        op(*call())


def test_the_warning_points_at_the_caller(accelerator, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    with pytest.warns(FallbackWarning) as caught:
        op(*call())
        op.plan(*call())
    assert [warning.filename for warning in caught] == [__file__]
    monkeypatch.setattr(op.explain.__self__.table, "_told", set())
    with pytest.warns(FallbackWarning) as caught:
        op.plan(*call())
    assert [warning.filename for warning in caught] == [__file__]


def test_a_forced_reference_is_no_fall_back(accelerator) -> None:  # type: ignore[no-untyped-def]
    with warnings.catch_warnings(), kernelhub.use("reference"):
        warnings.simplefilter("error")
        op(*call())


def test_fallback_can_be_an_error_or_quiet(accelerator) -> None:  # type: ignore[no-untyped-def]
    kernelhub.configure(fallback="error")
    with pytest.raises(BackendUnavailable, match=r"fallback=error .* forbids"):
        op(*call())
    kernelhub.configure(fallback="quiet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(op(*call())[0]) == 7.0


def test_fallback_from_the_environment(accelerator, fresh_environment) -> None:  # type: ignore[no-untyped-def]
    fresh_environment(KERNELHUB_FALLBACK="error")
    with pytest.raises(BackendUnavailable):
        op(*call())


def test_an_automatic_choice_is_logged_once(add_backend, caplog) -> None:  # type: ignore[no-untyped-def]
    with caplog.at_level(logging.INFO, logger="kernelhub"):
        add_backend(backend("logged"))
        for _ in range(3):
            op(*call())
    lines = [record.getMessage() for record in caplog.records]
    assert lines.count("fused_mul_add on cpu: logged (default ranking)") == 1


def test_selection_prints_and_turns_into_json(add_backend) -> None:  # type: ignore[no-untyped-def]
    add_backend(backend(probe=lambda device: ["no driver"]))
    selection = op.explain(torch.ones(2, 3).t(), torch.ones(3, 2), 1.0)
    made = json.loads(json.dumps(selection.to_dict()))
    assert made["chosen"] == "reference"
    assert made["inputs"]["x"] == "[3, 2] float32 cpu strides (1, 3)"
    assert made["candidates"][0] == {"name": "toy", "priority": 50, "reasons": ["no driver"]}
    assert "  toy        no driver\n  reference  chosen\n" in str(selection)


def test_explain_for_a_device_that_this_torch_does_not_know() -> None:
    device = parse_device("musa:1")
    assert device == DeviceDesc("musa", 1)
    x = TensorDesc((4, 8), torch.bfloat16, device)
    selection = op.explain(x, x, 2.5)
    assert (selection.device, selection.backend) == ("musa:1", "reference")


def test_explain_and_plan_refuse_what_the_op_refuses() -> None:
    x = torch.ones(2)
    for method in (op.explain, op.plan):
        with pytest.raises(TypeError):
            method(x, x, 1.0, x)  # out is keyword-only
        with pytest.raises(ArgumentError, match="bias"):
            method(x, torch.ones(3), 1.0)


def test_plan_binds_the_fixed_and_keeps_its_choice(add_backend) -> None:  # type: ignore[no-untyped-def]
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    gemv = kernelhub.ops.fused_gemv
    planned = gemv.plan(x, weight, activation="silu")
    assert list(inspect.signature(planned).parameters) == ["x", "x_scale", "out"]
    other = torch.randn(2, 8)
    assert torch.equal(planned(other), gemv(other, weight, activation="silu"))
    assert planned.selection.backend == "reference"

    described = TensorDesc((4, 8), torch.float32)
    with pytest.raises(ArgumentError, match=r"'weight': .* cannot be bound"):
        gemv.plan(x, described)

    run = op.plan(*call())
    add_backend(backend())
    assert float(op(*call())[0]) == 42.0
    assert float(run(*call()[:2])[0]) == 7.0
    with kernelhub.use("toy"):
        assert float(op.plan(*call())(*call()[:2])[0]) == 42.0


def test_a_plan_that_has_gone_leaves_nothing() -> None:
    def sources() -> list[str]:
        gc.collect()
        return [name for name in linecache.cache if name.startswith("<kernelhub ")]

    before = sources()
    run = op.plan(*call())
    made = [linecache.getline(name, 1) for name in sources() if name not in before]
    assert any(line.startswith("def fused_mul_add_plan(") for line in made)
    del run
    assert sources() == before


def test_nothing_happens_at_import() -> None:
    """No entry-point scan, no vendor package, no compiler, no device at import."""
    code = textwrap.dedent(
        """
        import sys, subprocess, torch
        from importlib import metadata
        before = set(sys.modules)
        import entrypoints
        def refuse(*args, **kwargs): raise AssertionError("touched at import")
        entrypoints.get_group_all = metadata.entry_points = metadata.distributions = refuse
        subprocess.Popen.__init__ = refuse
        torch.cuda._lazy_init = refuse
        import kernelhub
        assert not kernelhub.plugins._loaded
        new = set(sys.modules) - before
        heavy = {"torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "rich", "click",
                 "numpy", "sympy", "pytest", "hypothesis", "torch_musa", "triton"}
        print(sorted(heavy & new))
        """
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_a_toy_that_is_wrong_is_seen_to_be_wrong() -> None:
    """Guards the other tests: the toys differ from the truth."""
    assert float(constant(42.0)(*call())[0]) != 7.0


def test_a_variant_for_another_device_lifts_nobody(add_backend) -> None:  # type: ignore[no-untyped-def]
    far = Implementation(OP, constant(1.0), "far", device_types=("musa",), priority=90)
    near = Implementation(OP, constant(2.0), "near", priority=5, traits=Traits(differentiable=True))
    add_backend(Backend("two", (far, near)))
    add_backend(backend("other", 3.0, priority=20))
    assert float(op(*call())[0]) == 3.0


def test_subclasses_that_are_ordinary_memory() -> None:
    class Weight(torch.nn.Parameter):
        """As engines attach loaders to their weights."""

    class Plain(torch.Tensor):
        pass

    weight = torch.randn(4, 8)
    with torch.no_grad():
        y = kernelhub.ops.fused_gemv(torch.ones(1, 8), Weight(weight))
    assert torch.equal(torch.as_tensor(y), kernelhub.ops.fused_gemv(torch.ones(1, 8), weight))
    x, bias, scale = call()
    assert op(x.as_subclass(Plain), bias, scale).tolist() == [7.0] * 3


def test_meta_tensors_give_shapes() -> None:
    with torch.device("meta"):
        x, weight = torch.empty(2, 64), torch.empty(4, 32, 64)
        ids = torch.empty(2, 2, dtype=torch.int64)
    y = kernelhub.ops.fused_moe_gemv(x, weight, ids)
    assert (y.device.type, tuple(y.shape)) == ("meta", (2, 2, 32))


def test_a_negated_view_is_refused() -> None:
    negated = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    assert negated.is_neg()
    with pytest.raises(ArgumentError, match="resolve_neg"):
        op(negated, torch.ones(3), 1.0)


def test_autocast_does_not_reach_the_reference() -> None:
    g = torch.Generator().manual_seed(2)
    x, weight = torch.randn(3, 64, generator=g), torch.randn(32, 64, generator=g)
    bias = torch.randn(32, generator=g)
    for more in ({}, {"bias": bias}):
        plain = kernelhub.ops.fused_gemv(x, weight, **more)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(kernelhub.ops.fused_gemv(x, weight, **more), plain)


def test_reference_named_first_is_no_fall_back(accelerator, add_backend) -> None:  # type: ignore[no-untyped-def]
    add_backend(backend())
    with warnings.catch_warnings(), kernelhub.use("reference,auto"):
        warnings.simplefilter("error")
        kernelhub.configure(fallback="error")
        assert float(op(*call())[0]) == 7.0


def test_one_bare_string_is_one_reason(add_backend) -> None:  # type: ignore[no-untyped-def]
    add_backend(backend(probe=lambda device: "driver"))
    assert op.explain(*call()).candidates[0].reasons == ("driver",)
