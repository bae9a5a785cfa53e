"""Which compilers are found, where, and why one will not do."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest

from kernelhub.backends.native import build, compilers
from kernelhub.backends.native.platform import CUDA, MUSA, Platform, csrc
from kernelhub.errors import BuildError
from tests.building.toys import (
    HOSTILE,
    script,
)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with no compiler. Returns the one folder on the path."""
    for name in ("CUDA_HOME", "CUDA_PATH", "MUSA_HOME", "MUSA_PATH", "PYTORCH_MCC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compilers, "_CUDA_HOMES", (tmp_path / "usual",))
    monkeypatch.setattr(compilers, "_MUSA_HOMES", (tmp_path / "usual", tmp_path / "opt"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return tmp_path / "path"


NVCC = "echo 'Cuda compilation tools, release {0}, V{0}.88'"


@pytest.mark.parametrize(
    ("name", "says", "version"),
    [
        ("g++", "echo 12.2.0", "12.2.0"),
        ("g++", "echo 9", "9"),
        ("nvcc", NVCC.format("13.0"), "13.0.88"),
        ("nvcc", NVCC.format("12.0"), "12.0.88"),
        ("mcc", "echo 'mcc version 5.2.0 (git) clang 14'", "5.2.0"),
        ("mcc", "echo 'mcc version 4.3.1' >&2", "4.3.1"),
    ],
)
def test_versions(name: str, says: str, version: str, bare: Path) -> None:
    script(bare / "g++", "echo 12.2.0")
    path = script(bare / name, says)
    assert compilers.FINDERS[name]() == compilers.Compiler(name, str(path), version)


@pytest.mark.parametrize(
    ("name", "says", "said"),
    [
        ("g++", "echo 8.5.0", "is too old, 9 or later is needed: install g++ 9 or later"),
        ("nvcc", NVCC.format("11.8"), "is too old, 12.0 or later is needed: install the CUDA tool"),
        ("g++", "echo clang", "names no version ('clang'): install g++ 9"),
        ("g++", "echo 12.2.0; exit 1", "names no version ('12.2.0')"),
        ("mcc", "exit 127", "names no version"),
        ("mcc", "exec /nowhere/mcc", "names no version"),
    ],
)
def test_compilers_that_will_not_do(name: str, says: str, said: str, bare: Path) -> None:
    script(bare / "g++", "echo 12.2.0")
    path = script(bare / name, says)
    with pytest.raises(BuildError) as caught:
        compilers.FINDERS[name]()
    assert said in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [("g++", "apt-get install g++"), ("nvcc", "set CUDA_HOME"), ("mcc", "set MUSA_HOME")],
)
def test_no_compiler_at_all(name: str, said: str, bare: Path) -> None:
    with pytest.raises(BuildError, match=f"{name.replace('+', '.')} was not found") as caught:
        compilers.FINDERS[name]()
    assert said in str(caught.value)


def test_nvcc_needs_a_host_compiler(bare: Path) -> None:
    script(bare / "nvcc", NVCC.format("13.0"))
    with pytest.raises(BuildError, match=r"g\+\+ was not found"):
        compilers.nvcc()


def test_a_compiler_that_cannot_be_run(bare: Path) -> None:
    script(bare / "g++").write_bytes(b"\x7fELF nonsense")
    with pytest.raises(BuildError, match=r"cannot be run .*: install g\+\+ 9"):
        compilers.gxx()


@pytest.mark.parametrize(
    ("name", "says", "variables"),
    [
        ("nvcc", NVCC.format("13.0"), ("CUDA_HOME", "CUDA_PATH", None, "usual")),
        ("mcc", "echo mcc version 5.2.0", ("PYTORCH_MCC", "MUSA_HOME", "MUSA_PATH", "usual", None)),
    ],
)
def test_the_order_of_places(
    name: str,
    says: str,
    variables: tuple[str | None, ...],
    bare: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the last place, which has the compiler alone, to the first, where all have it."""
    script(bare / "g++", "echo 12.2.0")
    for variable in reversed(variables):
        home = bare if variable is None else tmp_path / variable
        path = script((home if variable is None else home / "bin") / name, says)
        if variable and variable.isupper():
            monkeypatch.setenv(variable, str(path if variable == "PYTORCH_MCC" else home))
        assert compilers.FINDERS[name]().path == str(path)


def test_mcc_may_be_named_as_a_command(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(bare / "mcc-5", "echo mcc version 5.2.0")
    monkeypatch.setenv("PYTORCH_MCC", "mcc-5")
    assert compilers.mcc().path == str(path)
    monkeypatch.setenv("PYTORCH_MCC", "mcc-6")
    with pytest.raises(BuildError, match="mcc-6"):
        compilers.mcc()


def test_a_hostile_home(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUSA_HOME", HOSTILE)
    with pytest.raises(BuildError, match="mcc was not found"):
        compilers.mcc()
    path = script(tmp_path / HOSTILE / "bin" / "mcc", "echo mcc version 5.2.0")
    assert compilers.mcc().path == str(path)
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("platform", "arch", "says", "compiling", "linking"),
    [
        (
            MUSA,
            "mp_22",
            "echo mcc version 5.2.0",
            "-x musa -mtgpu --offload-arch=mp_22 -std=c++17 -O3 -Od3 -fPIC -fvisibility=hidden",
            "-shared -L{home}/lib -lmusart",
        ),
        (
            CUDA,
            "sm_80",
            NVCC.format("12.4"),
            "-x cu -std=c++17 -O3 --generate-code arch=compute_80,code=sm_80 "
            "-Xcompiler -fPIC,-fvisibility=hidden",
            "-shared",
        ),
    ],
    ids=["musa", "cuda"],
)
def test_the_command_lines(
    platform: Platform,
    arch: str,
    says: str,
    compiling: str,
    linking: str,
    bare: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a stand-in for the vendor's compiler is called with, one that lives at an odd place."""
    home = tmp_path / HOSTILE
    monkeypatch.setenv(f"{platform.name.upper()}_HOME", str(home))
    script(bare / "g++", "echo 12.2.0")
    touch = f'for last; do :; done; : >"$last"; printf "%s\\n" "$@" >"{tmp_path}/$last.arguments"'
    name = "mcc" if platform is MUSA else "nvcc"
    version = f'if [ "$1" = --version ]; then {says}; else {touch}; fi'
    script(home / "bin" / name, version)
    one = csrc() / "musa" / "library.mu"
    library = build.ensure(attrs.evolve(platform, sources=lambda: (one,)), arch)
    own = ["cuda"] if platform is CUDA else []
    folders = [f"vendor/{platform.name}", "common", "include", *own]
    includes = [f"-I{csrc() / folder}" for folder in folders]
    assert (tmp_path / "0.o.arguments").read_text().splitlines() == [
        *compiling.split(),
        *includes,
        *("-c", str(one), "-o", "0.o"),
    ]
    assert (tmp_path / "library.so.arguments").read_text().splitlines() == [
        "0.o",
        *(word.format(home=home) for word in linking.split()),
        *("-o", "library.so"),
    ]
    assert json.loads((library.parent / "manifest.json").read_text())["arch"] == arch
    assert not list(tmp_path.rglob("pwned"))
