"""Builds in hostile surroundings: folders, disks, the environment, terminals."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from kernelhub.backends.native import build, cache, compilers
from tests.building.toys import (
    HOSTILE,
    Toy,
    again,
    forked,
    leftovers,
    load,
    no_compiler,
    refused,
)

ROOT = os.geteuid() == 0


# ---- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KERNELHUB_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"KERNELHUB_CACHE_DIR": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/kernelhub"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/kernelhub"),
        ({"HOME": "/c"}, "/c/.cache/kernelhub"),
    ],
)
def test_where_the_cache_is(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KERNELHUB_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(cache.folder()) == expected


def test_a_relative_cache(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache.VARIABLE, "here")
    assert build.ensure(toy.platform, "one").is_relative_to(tmp_path / "here")


@pytest.mark.parametrize(
    ("mode", "said"), [(0o770, "others may write to"), (0o707, "others may write to")]
)
def test_a_cache_that_others_write_to(toy: Toy, store: Path, mode: int, said: str) -> None:
    library = build.ensure(toy.platform, "one")
    store.chmod(mode)
    assert f"`chmod go-w {store}`" in refused(toy) and said in refused(toy)
    toy.find = no_compiler
    assert "g++ was not found" in refused(toy), f"{library} may be another's"


@pytest.mark.skipif(not ROOT, reason="needs root, to give a folder away")
def test_a_cache_of_another_user(toy: Toy, store: Path) -> None:
    store.mkdir()
    os.chown(store, 12345, 12345)
    assert "belongs to another user: set KERNELHUB_CACHE_DIR" in refused(toy)


def test_a_cache_that_is_a_file(toy: Toy, store: Path) -> None:
    store.write_text("")
    assert "is not a folder: set KERNELHUB_CACHE_DIR" in refused(toy)


def test_a_cache_below_a_file(toy: Toy, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(store / "sub"))
    assert "set KERNELHUB_CACHE_DIR to a folder of your own" in refused(toy)


@pytest.fixture
def disk(store: Path) -> Iterator[Path]:
    """The cache as a file system of half a megabyte."""
    store.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k,mode=700", "tmpfs", str(store)]
    if not ROOT or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount file systems")
    yield store
    subprocess.run(["umount", str(store)], check=True)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def test_a_read_only_cache(toy: Toy, disk: Path) -> None:
    library = build.ensure(toy.platform, "one")
    remount(disk, "ro")
    assert again(toy.platform) == library
    toy.write("answer.h", "#define ANSWER 43\n")
    assert f"{disk} is read-only: set KERNELHUB_CACHE_DIR" in refused(toy)
    assert "is read-only" in build.available(toy.platform, "two")[-1]


def test_a_full_disk(toy: Toy, disk: Path) -> None:
    toy.write("answer.cpp", "char much[1 << 20] = {1};\n")
    said = refused(toy)
    assert "No space left on device" in said and "free space, or set KERNELHUB_CACHE_DIR" in said
    assert not leftovers(disk)
    (disk / "filler").write_bytes(b"")
    with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    assert "free space, or set KERNELHUB_CACHE_DIR" in refused(toy)


def test_a_disk_that_takes_no_more_files(toy: Toy, disk: Path) -> None:
    build.ensure(toy.platform, "one")
    now = os.statvfs(disk)
    remount(disk, f"nr_inodes={now.f_files - now.f_ffree}")
    toy.write("answer.h", "#define ANSWER 43\n")
    said = refused(toy)
    assert said.startswith("building toy one failed ([Errno 28] No space left on device")
    assert "free space, or set KERNELHUB_CACHE_DIR" in said


def test_a_limit_on_the_size_of_files(toy: Toy) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        assert "failed" in refused(toy)

    assert os.waitpid(forked(limited), 0)[1] == 0


# ---- the environment -----------------------------------------------------------------------------


def test_compilers_see_a_fixed_environment(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXX", "NVCC_APPEND_FLAGS", "CPATH", "LC_ALL", "LD_PRELOAD_X", "CPLUS_X"):
        monkeypatch.setenv(name, "evil")
    toy.use(f"env >'{toy.root}/environment'", 'exec g++ "$@"')
    build.ensure(toy.platform, "one")
    lines = (toy.root / "environment").read_text().splitlines()
    seen = dict(line.split("=", 1) for line in lines)
    assert set(seen) - {"PWD", "OLDPWD", "SHLVL", "_"} <= {
        *("LANG", "PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
    }
    assert seen["LANG"] == "C" and seen["PATH"] == os.environ["PATH"]
    assert "evil" not in seen.values()


def test_hostile_names(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / HOSTILE))
    toy.sources = toy.sources.rename(tmp_path / f"sources {HOSTILE}")
    library = build.build(toy.platform, "one", tmp_path / f"output {HOSTILE}")
    assert load(library) == 42
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_hostile_names_and_nvcc(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvcc runs its steps through a shell, so nothing of the environment may reach it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / HOSTILE))
    monkeypatch.setenv("TMPDIR", HOSTILE)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "--evil")
    platform = attrs.evolve(
        toy.platform, find_compiler=compilers.nvcc, compile_flags=lambda *_: ("-Xcompiler", "-fPIC")
    )
    assert load(build.build(platform, "one", tmp_path / "output")) == 42
    assert not list(tmp_path.rglob("pwned"))


# ---- what is shown -------------------------------------------------------------------------------


def test_a_build_is_announced_with_its_log(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kernelhub"):
        library = build.ensure(toy.platform, "one")
        again(toy.platform)
    (said,) = caplog.messages
    log = library.parent.with_name(f"{library.parent.name}.log")
    assert said == f"building toy one with g++ 12.0 (files: 1, log: {log})"
    assert log.read_text().count("$ ") == 2


def test_progress_on_a_terminal(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        build.ensure(toy.platform, "one")
    shown = ""
    with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as reading:
        while some := reading.read(1000):
            shown += some.decode()
    assert shown.startswith("kernelhub: building toy one with g++ 12.0 (files: 1, log: ")
    assert "1 done" in shown and "2 done" in shown
    assert shown.endswith("\x1b[K")


def test_no_progress_elsewhere(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    build.ensure(toy.platform, "one")
    assert capfd.readouterr() == ("", "")


def test_stderr_may_be_closed(toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed = (tmp_path / "closed").open("w")
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    build.ensure(toy.platform, "one")
