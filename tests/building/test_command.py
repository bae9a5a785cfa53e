"""`kernelhub build`, what doctor says of builds, and what a wheel ships."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kernelhub
from kernelhub.backend import Backend
from kernelhub.backends.native import build, cache
from kernelhub.backends.native.kernels import Kernels
from kernelhub.errors import BuildError
from tests.building.toys import HOSTILE, Toy, load, no_compiler
from tests.commands import run, run_json

ROOT = Path(kernelhub.__file__).parents[1]


def compiled(name: str, toy: Toy, device_type: str) -> Backend:
    kernels = Kernels(toy.platform, device_type, lambda device: "two")
    return Backend(
        name,
        kernels.implementations(("fused_mul_add",)),
        device_types=(device_type,),
        automatic=False,
        kernels=kernels,
    )


@pytest.fixture
def backend(toy: Toy, add_backend: Callable[[Backend], Backend]) -> Backend:
    """A plug-in's compiled backend, for the toy's platform."""
    return add_backend(compiled("toy", toy, "cpu"))


# ---- kernelhub build ---------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
class TestBuild:
    def test_the_architecture_of_the_device_here(self, toy: Toy) -> None:
        result = run("build", "toy")
        name, arch, path = result.stdout.split()
        assert (name, arch) == ("toy", "two")
        assert load(Path(path)) == 42
        assert "kernelhub: building toy two with g++ 12.0 (files: 1, log: " in result.stderr
        assert build.ensure(toy.platform, "two") == Path(path)
        assert toy.count == 2

    def test_without_a_device_the_first(
        self, toy: Toy, add_backend: Callable[[Backend], Backend]
    ) -> None:
        add_backend(compiled("absent", toy, "musa"))
        assert run("build", "absent").stdout.startswith("absent one  ")

    def test_json_and_output(self, toy: Toy, tmp_path: Path) -> None:
        shipped = tmp_path / f"out {HOSTILE}"
        arguments = ("--arch", "one", "--arch", "two", "--arch", "one", "--output", str(shipped))
        found = run_json("build", "toy", *arguments)
        assert found["ok"] and found["backend"] == "toy"
        one, two = found["libraries"]
        assert one["path"] == str(shipped / "kernelhub-toy-one.so")
        assert one["manifest"]["sha256"] == cache.checksum(Path(one["path"]))
        assert two["arch"] == "two" and two["problem"] == ""
        assert len(list(shipped.iterdir())) == 4

    def test_force(self, toy: Toy) -> None:
        for count in (2, 2):
            run("build", "toy")
            assert toy.count == count
        run("build", "toy", "--force")
        assert toy.count == 4

    def test_a_failure(self, toy: Toy) -> None:
        toy.write("answer.cpp", "#ifdef ARCH\nint f() { return ARCH == 2; }\n#endif\n")
        result = run("build", "toy", code=1)
        assert result.stdout == ""
        assert "building toy two with g++ 12.0 failed\n    " in result.stderr
        found = run_json("build", "toy", "--arch", "one", code=1)
        assert not found["ok"]
        assert found["libraries"][0]["path"] is None
        assert "error: " in found["libraries"][0]["problem"]

    def test_no_compiler(self, toy: Toy) -> None:
        toy.find = no_compiler
        assert "g++ was not found: install it" in run("build", "toy", code=1).stderr

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["tyo"], "'tyo' is no backend; did you mean 'toy'?"),
            (["reference"], "'reference' is not compiled; known: binding, cuda, musa, simt, toy"),
            (["toy", "--arch", "tow"], "toy has no architecture named 'tow'; did you mean 'two'?"),
            (["cuda", "--arch", "sm90"], "did you mean 'sm_90a'?"),
            (["musa", "--arch", "sm_90"], "musa has no architecture named 'sm_90'"),
            (["simt", "--arch", "warp64"], "did you mean 'warp32'?"),
        ],
    )
    def test_unknown_names(self, toy: Toy, arguments: list[str], said: str) -> None:
        result = run("build", *arguments, code=2)
        assert said in result.stderr
        assert result.stdout == "" and toy.count == 0

    def test_a_malformed_option_of_the_emulator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kernelhub.backends import simt

        simt._options.cache_clear()
        monkeypatch.setenv("KERNELHUB_SIMT", "warp=33")
        assert "expected 32 or 128" in run("build", "simt", code=2).stderr

    def test_architectures_beyond_the_known(self) -> None:
        from kernelhub.backends.native import platform

        assert platform.CUDA.accepts("sm_110") and platform.CUDA.accepts("sm_100f")
        assert not platform.CUDA.accepts("sm_90a;x") and not platform.CUDA.accepts("mp_31")
        assert platform.MUSA.accepts("mp_41") and not platform.MUSA.accepts("31")
        assert platform.SIMT.accepts("warp128-tsan") and not platform.SIMT.accepts("warp16")


def test_the_real_binding(tmp_path: Path) -> None:
    found = run_json("build", "binding", "--output", str(tmp_path / "out"))
    (library,) = found["libraries"]
    assert library["arch"] in library["path"]
    program = (
        "import importlib.machinery as m, importlib.util as u, sys; "
        "l = m.ExtensionFileLoader('kernelhub_binding', sys.argv[1]); "
        "x = u.module_from_spec(u.spec_from_loader(l.name, l)); l.exec_module(x); x.fingerprint"
    )
    subprocess.run([sys.executable, "-c", program, library["path"]], check=True)


# ---- kernelhub doctor --------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
class TestDoctor:
    def test_compilers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kernelhub.backends.native import compilers

        found = compilers.Compiler("g++", "/usr/[bin]/g++", "12.2.0")
        monkeypatch.setattr(compilers, "FINDERS", {"g++": lambda: found, "mcc": no_compiler})
        report = run_json("doctor")
        assert report["compilers"] == [
            {"name": "g++", "path": "/usr/[bin]/g++", "version": "12.2.0", "missing": ""},
            {"name": "mcc", "path": "", "version": "", "missing": "g++ was not found: install it"},
        ]
        output = " ".join(run("doctor").output.split())
        assert "g++ usable 12.2.0 /usr/[bin]/g++" in output
        assert "mcc missing g++ was not found: install it" in output

    def test_libraries(self, toy: Toy, store: Path, tmp_path: Path) -> None:
        library = build.ensure(toy.platform, "one")
        shipped = build.build(toy.platform, "two", tmp_path / "out")
        shipped.write_bytes(b"")
        report = run_json("doctor", env={"KERNELHUB_LIBRARY_PATH": str(shipped.parent)})
        assert report["cache"] == {"path": str(store), "fault": ""}
        first, second, third = report["libraries"]
        assert first["origin"] == "shipped" and first["arch"] == "two"
        assert f"{shipped} is damaged" in first["fault"]
        assert second == {
            "platform": "toy",
            "arch": "one",
            "origin": "cache",
            "path": str(library),
            "compiler": "g++ 12.0",
            "fault": "",
        }
        assert third["arch"] == "two"
        toy.write("answer.h", "")
        assert "its sources is" in run_json("doctor")["libraries"][0]["fault"]
        assert "toy unfit one with g++ 12.0: " in " ".join(run("doctor").output.split())

    def test_variables(self, store: Path, tmp_path: Path) -> None:
        store.write_text("")
        (tmp_path / "there").mkdir()
        env = {
            "KERNELHUB_CACHE_DIR": str(store),
            "KERNELHUB_LIBRARY_PATH": f"{tmp_path}/there{os.pathsep}/nowhere",
            "KERNELHUB_SIMT": "wrap=32",
        }
        problems = run_json("doctor", code=1, env=env)["problems"]
        assert problems == [
            f"KERNELHUB_CACHE_DIR: the cache folder {store} is not a folder: "
            "set KERNELHUB_CACHE_DIR to a folder of your own",
            "KERNELHUB_LIBRARY_PATH: /nowhere is not a folder",
            "KERNELHUB_SIMT: 'wrap=32': did you mean 'warp'? "
            "known: order, sanitize, threads, timeout, warp",
        ]
        fine = {**env, "KERNELHUB_SIMT": "warp=128", "KERNELHUB_LIBRARY_PATH": f"{tmp_path}/there"}
        assert run_json("doctor", env={**fine, "KERNELHUB_CACHE_DIR": str(tmp_path)})["ok"]

    def test_a_default_cache_that_cannot_be_is_no_problem(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "home").write_text("")
        monkeypatch.delenv(cache.VARIABLE)
        report = run_json("doctor", env={"HOME": f"{tmp_path}/home", "XDG_CACHE_HOME": ""})
        assert report["ok"]
        assert "set KERNELHUB_CACHE_DIR" in report["cache"]["fault"]

    def test_looking_makes_nothing(self, toy: Toy, store: Path) -> None:
        run("doctor")
        assert not store.exists() and toy.count == 0

    def test_a_finder_that_breaks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kernelhub.backends.native import compilers

        def pulled() -> Any:
            raise RuntimeError("pulled out")

        monkeypatch.setattr(compilers, "FINDERS", {"g++": pulled})
        (problem,) = run_json("doctor", code=1)["problems"]
        assert problem == "the compilers cannot be read: RuntimeError: pulled out"


# ---- imports and wheels ------------------------------------------------------------------------


def test_import_loads_nothing_of_builds() -> None:
    program = "import sys, kernelhub; print([m for m in sys.modules if '.native' in m])"
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout == "[]\n"


def test_a_wheel_ships_the_sources_and_the_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hatchling.build import build_wheel

    from kernelhub.backends.native import platform, tiles

    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path))) as wheel:
        wheel.extractall(tmp_path / "site")
    program = (
        "from kernelhub.backends.native import build, tiles, platform as p; print(p.csrc());"
        "print(*[build.sources_hash(x) for x in (p.CUDA, p.MUSA, p.SIMT, p.BINDING)]);"
        "print(tiles._SHIPPED.read_text())"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    where, hashes, *table = shown.stdout.splitlines()
    assert where == str(tmp_path / "site" / "kernelhub" / "csrc")
    compiled = (platform.CUDA, platform.MUSA, platform.SIMT, platform.BINDING)
    assert hashes.split() == [build.sources_hash(each) for each in compiled]
    assert json.loads("".join(table)) == json.loads(tiles._SHIPPED.read_text())


def test_a_build_error_is_an_error_of_kernelhub() -> None:
    assert issubclass(BuildError, kernelhub.KernelhubError)
    assert issubclass(BuildError, RuntimeError)
