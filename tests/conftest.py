from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import kernelhub
from kernelhub import plugins, policy, registry
from kernelhub.backend import Backend

# The test processes share the cores; threads of their own would only fight over them.
torch.set_num_threads(1)

settings.register_profile(
    "ci", max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
settings.register_profile(
    "nightly", max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("nightly" if os.environ.get("KERNELHUB_NIGHTLY") else "ci")


@pytest.fixture(autouse=True)
def default_policy() -> Iterator[None]:
    """Every test starts and ends with the default ranking."""
    kernelhub.configure()
    yield
    kernelhub.configure()


@pytest.fixture
def add_backend() -> Iterator[Callable[[Backend], Backend]]:
    """Registers backends for one test."""
    added: list[str] = []

    def add(backend: Backend) -> Backend:
        plugins.load()
        registry.add_backend(backend)
        added.append(backend.name)
        return backend

    yield add
    for name in added:
        with contextlib.suppress(kernelhub.UnknownName):
            registry.remove_backend(name)


@pytest.fixture
def fresh_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets environment variables and makes kernelhub read them anew."""

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(policy, "_environment", None)
        registry.notify()

    yield set_variables
    monkeypatch.undo()
    policy._environment = None
    registry.notify()
