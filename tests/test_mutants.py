"""The tests are tested: every planted fault of a reference is caught by its op's own cases."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from kernelhub import contracts, registry
from kernelhub.backend import Backend, Implementation
from kernelhub.testing import run_case
from tests.mutants import Mutant

MUTANTS = [
    (name, mutant)
    for name in contracts.NAMES
    for mutant in importlib.import_module(f"tests.mutants.{name}").MUTANTS
]


def execute(module: str, source: str) -> types.ModuleType:
    made = types.ModuleType(module)
    made.__package__ = module.rpartition(".")[0]
    exec(compile(source, f"<mutant of {module}>", "exec"), made.__dict__)
    return made


def mutated(op: str, mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The op's reference with the fault in it, in its own module or in one that it imports."""
    own = registry.spec(op).reference.__module__
    source = inspect.getsource(importlib.import_module(mutant.module))
    assert source.count(mutant.old) == 1, f"{mutant.name}: found {source.count(mutant.old)} times"
    patched = execute(mutant.module, source.replace(mutant.old, mutant.new))
    if mutant.module != own:
        with monkeypatch.context() as patch:
            package, _, name = mutant.module.rpartition(".")
            patch.setitem(sys.modules, mutant.module, patched)
            patch.setattr(importlib.import_module(package), name, patched)
            patched = execute(own, inspect.getsource(importlib.import_module(own)))
    function: Callable[..., Any] = getattr(patched, op)
    return function


def caught_by(op: str, backend: str) -> str | None:
    cases = sorted(registry.spec(op).cases(), key=lambda case: case.kind == "typical")
    for case in cases:
        if run_case(op, case, backend).status == "failed":
            return case.name
    return None


@pytest.mark.parametrize(("op", "mutant"), MUTANTS, ids=[f"{op}-{m.name}" for op, m in MUTANTS])
def test_mutant_is_caught(op: str, mutant: Mutant, add_backend, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    traits = registry.spec(op).reference_traits
    made = Implementation(op, mutated(op, mutant, monkeypatch), traits=traits)
    add_backend(Backend("mutant", (made,), automatic=False))
    assert caught_by(op, "mutant") is not None, "no case noticed"


@pytest.mark.parametrize("op", contracts.NAMES)
def test_there_are_mutants(op: str) -> None:
    assert sum(name == op for name, _ in MUTANTS) >= 5
