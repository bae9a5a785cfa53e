"""The tests that `pytest --kernelhub-backend NAME` runs: one per op and case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kernelhub import plugins, registry
from kernelhub.spec import Case
from kernelhub.testing.harness import run_case, takes_some_case


def _cases(backend: str) -> Iterator[tuple[str, Case]]:
    plugins.load()
    for name, spec in registry.specs().items():
        if any(entry.backend.name == backend for entry in registry.entries(name)):
            yield from ((name, case) for case in spec.cases())


def _device(config: Any) -> torch.device:
    name = config.getoption("--kernelhub-device")
    types = registry.backends()[config.getoption("--kernelhub-backend")].device_types
    return torch.device(name or (types[0] if types else "cpu"))


def pytest_generate_tests(metafunc: Any) -> None:
    backend = metafunc.config.getoption("--kernelhub-backend")
    cases = list(_cases(backend)) if backend else []
    if backend and not cases:
        reason = plugins.failed(backend) or f"known: {', '.join(registry.backends())}"
        raise pytest.UsageError(f"backend '{backend}' implements no op ({reason})")
    if backend:
        reasons = registry.unavailable(registry.backends()[backend], _device(metafunc.config))
        if reasons:
            raise pytest.UsageError(f"backend '{backend}' cannot be used: {'; '.join(reasons)}")
    if "case" not in metafunc.fixturenames:
        metafunc.parametrize("op", sorted({op for op, _ in cases}))
        return
    metafunc.parametrize(("op", "case"), cases, ids=[f"{op}-{case.name}" for op, case in cases])


def test_case(op: str, case: Case, pytestconfig: Any) -> None:
    backend = pytestconfig.getoption("--kernelhub-backend")
    outcome = run_case(op, case, backend, _device(pytestconfig))
    if outcome.status == "declined":
        pytest.skip(outcome.message)
    assert outcome.status == "passed", f"{outcome.message} (error/bound {outcome.fraction:.3g})"


def test_takes_some_call(op: str, pytestconfig: Any) -> None:
    """A backend that declines every good case has been held to nothing."""
    backend = pytestconfig.getoption("--kernelhub-backend")
    assert takes_some_case(op, backend, _device(pytestconfig)), "declines every case"
