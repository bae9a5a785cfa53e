from __future__ import annotations

from pathlib import Path

import pytest

from kernelhub.backends.native import build, cache
from tests.building.toys import Toy


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, not there yet, in a process that has built nothing."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "store"))
    monkeypatch.delenv(build.LIBRARY_PATH_VARIABLE, raising=False)
    monkeypatch.setattr(build, "_done", {})
    return tmp_path / "store"


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "toy")
