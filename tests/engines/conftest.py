"""For the checks of every engine: all calls are counted, each test's in a census of its own."""

from __future__ import annotations

import pytest

from kernelhub.integrations import engines


@pytest.fixture(autouse=True)
def census(monkeypatch: pytest.MonkeyPatch) -> engines.counting.Census:
    counted = engines.counting.Census()
    monkeypatch.setattr(engines, "census", counted)
    monkeypatch.setattr(engines, "count_all", True)
    return counted
