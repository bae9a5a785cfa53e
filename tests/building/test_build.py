"""Builds of compiled libraries: found, made once, whole or absent, and every failure explained."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import attrs
import pytest

from kernelhub.backends.native import build, cache, compiling, platform
from kernelhub.backends.native.platform import BINDING, Platform
from kernelhub.errors import BuildError
from tests.building.toys import (
    Toy,
    again,
    forked,
    leftovers,
    load,
    no_compiler,
    refused,
    until,
)


def test_a_binding_fits_wherever_its_python_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are no headers of Python, or those of another patch release."""
    sources = build.sources_hash(BINDING)
    monkeypatch.setattr(platform, "_python_headers", lambda: Path("/nowhere"))
    assert build.sources_hash(BINDING) == sources


# ---- the cache -----------------------------------------------------------------------------------


def test_a_library_is_built_once(toy: Toy, store: Path) -> None:
    path = build.ensure(toy.platform, "one")
    assert load(path) == 42
    assert build.ensure(toy.platform, "one") == again(toy.platform) == path
    assert toy.count == 2
    assert store.stat().st_mode & 0o777 == 0o700
    assert not leftovers(store)
    assert sorted(p.name for p in path.parent.iterdir()) == ["library.so", "manifest.json"]


def test_the_manifest(toy: Toy) -> None:
    library = build.ensure(toy.platform, "two")
    manifest = json.loads((library.parent / "manifest.json").read_text())
    assert manifest["platform"] == "toy"
    assert manifest["arch"] == "two"
    assert manifest["compiler"] == "g++ 12.0"
    assert manifest["flags"] == ["-fPIC", '-DARCH="two"', "-shared"]
    assert manifest["sources"] == build.sources_hash(toy.platform)
    assert manifest["sha256"] == cache.checksum(library)


def test_what_makes_another_library(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = toy.platform
    seen = {build.ensure(platform, "one")}

    def is_another(changed: Platform = platform, arch: str = "one") -> None:
        path = again(changed, arch)
        assert path not in seen
        seen.add(path)

    is_another(arch="two")
    is_another(attrs.evolve(platform, compile_flags=lambda compiler, arch: ("-fPIC", "-O1")))
    is_another(attrs.evolve(platform, link_flags=lambda compiler, arch: ("-shared", "-s")))
    toy.compiler = attrs.evolve(toy.compiler, version="12.1")
    is_another()
    toy.write("answer.h", "#define ANSWER 43\n")
    is_another()
    assert load(again(platform)) == 43
    toy.write("more.cpp", "int more() { return 0; }\n")
    is_another()
    monkeypatch.setattr(compiling.abi, "fingerprint", lambda: "another")
    is_another()


def test_the_hash_of_sources_is_that_of_any_copy(toy: Toy, tmp_path: Path) -> None:
    shutil.copytree(toy.sources, tmp_path / "a copy")
    copy = attrs.evolve(
        toy.platform,
        sources=lambda: (tmp_path / "a copy" / "answer.cpp",),
        includes=lambda: (tmp_path / "a copy",),
    )
    assert build.sources_hash(copy) == build.sources_hash(toy.platform)


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest", "not a manifest"])
def test_a_damaged_library_is_built_again(
    toy: Toy, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    library = build.ensure(toy.platform, "one")
    whole = library.read_bytes()
    manifest = library.parent / "manifest.json"
    if damage == "flip":
        library.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "truncate":
        library.write_bytes(whole[: len(whole) // 2])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("[]")
    with caplog.at_level(logging.WARNING, "kernelhub"):
        assert load(again(toy.platform)) == 42
    (said,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "building it again" in said and str(library.parent) in said
    assert toy.count == 4


def test_processes_that_race_share_one_build(toy: Toy) -> None:
    toy.use("sleep 0.2", 'exec g++ "$@"')
    children = [forked(lambda: build.ensure(toy.platform, "one")) for _ in range(8)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert toy.count == 2
    assert load(again(toy.platform)) == 42


def test_waiting_for_another_process_is_told(
    toy: Toy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_PATIENCE_S", 0.05)
    toy.hang.touch()
    child = forked(lambda: build.ensure(toy.platform, "one"))
    until(toy.hanging.exists, "the child's compiler")
    toy.hang.unlink()

    def end() -> None:
        until(lambda: "waiting for another process" in caplog.text, "the message")
        os.kill(child, signal.SIGKILL)

    ending = threading.Thread(target=end)
    with caplog.at_level(logging.INFO, "kernelhub"):
        ending.start()
        assert load(build.ensure(toy.platform, "one")) == 42
    ending.join()
    os.waitpid(child, 0)
    os.kill(int(toy.hanging.read_text()), signal.SIGKILL)


def test_a_killed_build_leaves_the_next_one_clean(toy: Toy, store: Path) -> None:
    toy.hang.touch()
    for arch in ("one", "two"):
        child = forked(lambda arch=arch: build.ensure(toy.platform, arch))  # type: ignore[misc]
        until(toy.hanging.exists, "the compiler")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.killpg(os.getpgid(int(toy.hanging.read_text())), signal.SIGKILL)
        toy.hanging.unlink()
    toy.hang.unlink()
    (left,) = leftovers(store)
    assert left.startswith("making-toy-two-"), "the second build has swept up after the first"
    assert load(build.ensure(toy.platform, "one")) == 42
    assert not leftovers(store)


def test_a_build_that_goes_on_is_not_swept_up(toy: Toy, store: Path) -> None:
    toy.hang.touch()
    child = forked(lambda: build.ensure(toy.platform, "two"))
    until(toy.hanging.exists, "the compiler")
    toy.hang.unlink()
    build.ensure(toy.platform, "one")
    assert len(leftovers(store)) == 1
    os.kill(int(toy.hanging.read_text()), signal.SIGKILL)  # the compiler then does its work
    assert os.waitpid(child, 0)[1] == 0
    assert not leftovers(store)


def test_an_interrupted_build_ends_its_compilers(toy: Toy, store: Path) -> None:
    toy.hang.touch()

    def interrupt() -> None:
        until(toy.hanging.exists, "the compiler")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    pressing = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
    try:
        pressing.start()
        with pytest.raises(KeyboardInterrupt):
            build.ensure(toy.platform, "one")
    finally:
        pressing.join()
        signal.signal(signal.SIGINT, before)
    until(lambda: not toy.alive(), "the compiler's end")
    assert not leftovers(store)
    toy.hang.unlink()
    assert load(build.ensure(toy.platform, "one")) == 42, "an interruption is not remembered"


def test_the_first_failure_ends_the_other_compilers(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "cores", lambda: 2)
    toy.write("bad.cpp", "")
    wait = toy.waiting
    fail = f"while [ ! -e '{toy.hanging}' ]; do sleep 0.01; done; echo 'x.cpp: error: no'; exit 1"
    toy.use(f'case "$*" in *bad.cpp*) {fail};; *) {wait};; esac')
    started = time.monotonic()
    assert "error: no" in refused(toy)
    assert time.monotonic() - started < 30
    until(lambda: not toy.alive(), "the compiler's end")


@pytest.mark.parametrize("cores", [1, 2])
def test_sources_compile_at_once_up_to_the_cores(
    toy: Toy, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "cores", lambda: cores)
    for number in range(3):
        toy.write(f"{number}.cpp", f"int f{number}() {{ return 0; }}\n")
    toy.use(f"echo + >>'{toy.root}/events'; sleep 0.3", 'g++ "$@"', f"echo - >>'{toy.root}/events'")
    build.ensure(toy.platform, "one")
    depth, deepest = 0, 0
    for event in (toy.root / "events").read_text().split():
        depth += 1 if event == "+" else -1
        deepest = max(deepest, depth)
    assert deepest == cores


# ---- ahead of time -------------------------------------------------------------------------------


@pytest.fixture
def shipped(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library built ahead of time, named by the environment, on a machine with no compiler."""
    path = build.build(toy.platform, "one", tmp_path / "to ship")
    shutil.rmtree(cache.folder())
    toy.find = no_compiler
    folders = os.pathsep.join([str(tmp_path / "nowhere"), str(path.parent)])
    monkeypatch.setenv(build.LIBRARY_PATH_VARIABLE, folders)
    return path


def test_a_shipped_library_needs_no_compiler(toy: Toy, shipped: Path, store: Path) -> None:
    assert sorted(p.name for p in shipped.parent.iterdir()) == [
        "kernelhub-toy-one.json",
        "kernelhub-toy-one.so",
    ]
    assert build.available(toy.platform, "one") == []
    assert build.ensure(toy.platform, "one") == shipped
    assert load(shipped) == 42
    assert not store.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sources": "0"}, "its sources is 0"),
        ({"arch": "two"}, "its arch is two, needed is one"),
        ({"platform": "cuda"}, "its platform is cuda"),
        ({"machine": "vax"}, "its machine is vax"),
        ({"sha256": "0"}, "is damaged"),
        (None, "cannot be read"),
    ],
)
def test_a_shipped_library_that_does_not_fit(
    toy: Toy, shipped: Path, change: dict[str, str] | None, said: str
) -> None:
    manifest = shipped.with_suffix(".json")
    if change is None:
        manifest.unlink()
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    reasons = build.available(toy.platform, "one")
    assert len(reasons) == 2
    assert str(shipped.parent) in reasons[0] and said in reasons[0]
    assert "g++ was not found" in reasons[1]
    assert said in refused(toy) and "g++ was not found" in refused(toy)


def test_a_damaged_shipped_library_gives_way_to_a_build(
    toy: Toy, shipped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shipped.write_bytes(shipped.read_bytes()[:-8])
    toy.find = lambda: toy.compiler
    assert again(toy.platform) != shipped
    assert "is damaged" in caplog.text


def test_the_output_cannot_be_written(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"kernelhub-toy-one\.so cannot be written"):
        build.build(toy.platform, "one", tmp_path / "file")


# ---- what is missing -----------------------------------------------------------------------------


def test_available_compiles_and_makes_nothing(toy: Toy, store: Path) -> None:
    assert build.available(toy.platform, "one") == []
    assert toy.count == 0
    assert not store.exists()


def test_without_compiler_the_cache_still_serves(toy: Toy) -> None:
    path = build.ensure(toy.platform, "one")
    toy.find = no_compiler
    assert again(toy.platform) == path
    build._done.clear()
    assert build.available(toy.platform, "one") == []
    assert len(build.available(toy.platform, "two")) == 2
    toy.write("answer.h", "#define ANSWER 43\n")
    assert "g++ was not found" in refused(toy)


def test_every_reason_at_once(toy: Toy, store: Path) -> None:
    toy.find = no_compiler
    store.write_text("")
    ahead, compiler, folder = build.available(toy.platform, "one")
    assert "kernelhub build toy --arch one --output DIR" in ahead
    assert compiler == "g++ was not found: install it"
    assert "is not a folder: set KERNELHUB_CACHE_DIR" in folder


def test_a_failure_is_explained_and_remembered(toy: Toy, store: Path) -> None:
    toy.write("answer.cpp", '#include "answer.h"\nint answer() { return ANSWERS; }\n')
    for _ in range(2):
        with pytest.raises(BuildError) as caught:
            build.ensure(toy.platform, "one")
    assert toy.count == 1
    first, line, command, log, mend = str(caught.value).splitlines()
    assert first == "building toy one with g++ 12.0 failed"
    assert "answer.cpp:2" in line and "error: 'ANSWERS' was not declared" in line
    assert "-fPIC" in command and "answer.cpp" in command
    kept = Path(log.removeprefix("    log: "))
    assert "'ANSWERS' was not declared" in kept.read_text() and command[13:] in kept.read_text()
    assert "KERNELHUB_BACKEND=reference" in mend
    assert build.available(toy.platform, "one") == [str(caught.value)]
    assert not leftovers(store)
    toy.write("answer.cpp", "int answer() { return 1; }\n")
    build.build(toy.platform, "one")  # asked for by hand, it is tried again
    build.ensure(toy.platform, "one")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["echo 'in file x.h:'; echo 'x.cpp(3): error: odd'; exit 2"], "x.cpp(3): error: odd"),
        (["exit 3"], "it said nothing and ended with 3"),
        (["kill -9 $$"], "it said nothing and was ended by SIGKILL"),
        (["printf '\\377\\n'; exit 1"], "\ufffd"),
        (["echo 'cannot write: No space left on device'; exit 1"], "free space, or set"),
    ],
)
def test_what_a_failing_compiler_says(toy: Toy, lines: list[str], said: str) -> None:
    toy.use(*lines)
    assert said in refused(toy)


def test_a_compiler_that_vanished(toy: Toy) -> None:
    toy.compiler = attrs.evolve(toy.compiler, path="/nowhere/g++")
    assert "/nowhere/g++ cannot be run" in refused(toy)


def test_missing_sources(toy: Toy) -> None:
    (toy.sources / "answer.cpp").unlink()
    assert "its sources are missing: install kernelhub anew" in refused(toy)


@pytest.mark.parametrize("arch", ["", "../x", "a b", "one;touch x", "one\n"])
def test_odd_architectures_go_nowhere(toy: Toy, arch: str) -> None:
    with pytest.raises(BuildError, match="is not the name of an architecture"):
        build.build(toy.platform, arch)
    assert toy.count == 0
