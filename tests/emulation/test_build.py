"""The device is compiled once, and a build that fails leaves nothing behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.emulation import build


def _use_shell(monkeypatch: pytest.MonkeyPatch, cache: Path, script: str) -> None:
    """A shell script for a compiler; `$2` is where the library shall lie."""
    monkeypatch.setattr(build, "CACHE", cache)
    monkeypatch.setattr(build, "_command", lambda source: ["sh", "-c", script, "sh"])


def test_those_who_ask_at_once_get_one_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    cache = tmp_path / "cache"
    _use_shell(
        monkeypatch, cache, f'echo built >>{log}; echo half >"$2"; sleep 0.2; echo whole >>"$2"'
    )
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda _: build.library().read_text(), range(8)))
    assert paths == ["half\nwhole\n"] * 8
    assert log.read_text() == "built\n"
    assert [path.name for path in cache.iterdir() if path.suffix != ".so"] == ["lock"]


def test_other_contents_are_another_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "device.cpp"
    monkeypatch.setattr(build, "SOURCE", source)
    _use_shell(monkeypatch, tmp_path / "cache", 'echo >"$2"')
    paths = set()
    for text in ("one", "two", "one"):
        source.write_text(text)
        paths.add(build.library())
    assert len(paths) == 2


def test_a_failed_build_says_why_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _use_shell(monkeypatch, tmp_path, 'echo half >"$2"; echo "no such header" >&2; exit 1')
    with pytest.raises(RuntimeError, match="no such header"):
        build.library()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
