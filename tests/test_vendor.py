"""What the kernels' sources may say, and that they compile wherever there is a compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernelhub.backends.native import abi
from tests.vendor import first_reads, registers

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
HERE = Path(__file__).parent / "vendor"
NAMES = HERE / "names.mu"  # uses each allowed name once
NIGHTLY = os.environ.get("KERNELHUB_NIGHTLY") == "1"
KERNELS = [*sorted(CSRC.glob("musa/*.mu")), NAMES]
FOR_CUDA = (f"-I{CSRC / 'vendor/cuda'}",)
SHARED = (f"-I{CSRC / 'common'}", f"-I{CSRC / 'include'}")

VENDOR_WORDS = re.compile(
    r"\b(__CUDACC__|__CUDA_ARCH__|__MUSACC__|__MUSA_ARCH__|__MUSA__|USE_MUSA|USE_CUDA|USE_ROCM"
    r"|__HIP\w*|cuda[A-Z]\w*|musa[A-Z]\w*|cu[A-Z]\w+|mu[A-Z]\w+)\b"
)
PORTABLE = sorted([*CSRC.glob("musa/*"), *CSRC.glob("common/*"), *CSRC.glob("include/**/*.h")])


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


def vendor_words(source: str) -> list[str]:
    return VENDOR_WORDS.findall(without_comments(source))


@pytest.mark.parametrize("path", PORTABLE, ids=lambda path: path.name)
def test_no_platform_is_named_outside_its_vendor_header(path: Path) -> None:
    source = path.read_text()
    assert not vendor_words(source)
    assert not re.findall(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b.*$", source, re.MULTILINE) or (
        path.name == "abi.h"
    ), "a conditional belongs into a vendor header"
    assert not re.search(r"#\s*include\s*<(torch|ATen|c10)/", source)
    assert "<<<" not in source, "launch through kh::launch"
    assert not re.search(r"\basm\b|__nv_|\bdouble\b", without_comments(source)) or (
        path.name == "abi.h"
    )


@pytest.mark.parametrize(
    "line",
    ["#ifdef USE_MUSA", "#if defined(__CUDACC__)", "cudaGetLastError();", "musaStream_t s;"],
)
def test_a_platform_name_would_be_found(line: str) -> None:
    assert vendor_words(line)


def test_the_abi_header_is_current() -> None:
    header = CSRC / "include" / "kernelhub" / "abi.h"
    assert header.read_text() == abi.header(), "run `python scripts/make_abi.py`"


def test_the_fingerprint_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    before = abi.fingerprint()
    fields = abi.OPS["fused_mul_add"]
    monkeypatch.setitem(abi.OPS, "fused_mul_add", (fields[1], fields[0], *fields[2:]))
    assert abi.fingerprint() != before


# ---- compilers: their lanes are skipped only where the compiler is not installed -----------------


def compile_only(command: list[str], tmp_path: Path) -> None:
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def need(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"{names[0]} is not installed")
    return found


# What a compiler says of names and types it says at once. Machine code of all GEMV kernels takes
# ten minutes; it is made at night.
def quickly(arch: str) -> tuple[str, ...]:
    return ("-Xcicc", "-O0", f"-gencode=arch=compute_{arch},code=compute_{arch}")


QUICKLY = quickly("90a")
THOROUGHLY = ("-O3", "-arch=sm_90a")


def nvcc(vendor: tuple[str, ...], source: Path, how: tuple[str, ...] = QUICKLY) -> list[str]:
    return [
        *(need("nvcc"), "-x", "cu", "-std=c++17", *how),
        *("--Werror", "all-warnings", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"),
        *(*vendor, *SHARED, "-c", str(source), "-o", "kernel.o"),
    ]


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_compiles_for_cuda(source: Path, tmp_path: Path) -> None:
    how = THOROUGHLY if NIGHTLY else QUICKLY
    compile_only(nvcc(FOR_CUDA, source, how), tmp_path)


CUDA_ALONE = sorted(CSRC.glob("cuda/*.cu"))


@pytest.mark.parametrize("arch", ["80", "100"])
@pytest.mark.parametrize("source", CUDA_ALONE, ids=lambda path: path.name)
def test_kernels_of_cuda_alone_compile(source: Path, arch: str, tmp_path: Path) -> None:
    compile_only(nvcc(FOR_CUDA, source, quickly(arch)), tmp_path)


@pytest.mark.parametrize("source", CUDA_ALONE, ids=lambda path: path.name)
def test_machine_code(source: Path, tmp_path: Path) -> None:
    """With nvcc 13.0 for sm_90a: each kernel's registers and the bytes that it spills are those on
    record, and no kernel touches memory, or lets the next one come, before it has waited for the
    work before it.

    `python -m tests.vendor.registers` records them anew.
    """
    version = subprocess.run([need("nvcc"), "--version"], capture_output=True, text=True).stdout
    if registers.RECORDED_WITH not in version:
        pytest.skip(f"the record is of {registers.RECORDED_WITH}")
    command = nvcc(FOR_CUDA, source, (*THOROUGHLY, "-Xptxas", "-v"))
    command[command.index("-c")] = "-cubin"
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    kept = registers.record().get(source.name, {})
    assert registers.read(run.stderr) == kept
    touched = first_reads.before_the_wait(tmp_path / "kernel.o")
    assert len(touched) == len(kept)
    assert not any(touched.values()), touched


# All that the header has is in names.mu. One source takes half a minute: at night.
WITH_THE_MUSA_HEADER = [path for path in KERNELS if NIGHTLY or path.name != "gemv_matrix_int4.mu"]


@pytest.mark.parametrize("source", WITH_THE_MUSA_HEADER, ids=lambda path: path.name)
def test_compiles_with_the_musa_header_on_cuda(source: Path, tmp_path: Path) -> None:
    vendor = (f"-I{CSRC / 'vendor/musa'}", f"-I{HERE / 'musa_on_cuda'}")
    compile_only(nvcc(vendor, source), tmp_path)


def clang(side: str, source: Path) -> list[str]:
    return [
        *(need("clang++-14", "clang++-16", "clang++"), "-x", "cuda", "-nocudainc", "-nocudalib"),
        *(f"--cuda-{side}-only", "--cuda-gpu-arch=sm_70", "-std=c++17", "-fsyntax-only"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-cuda-version"),
        *(f"-I{HERE / 'declarations'}", *SHARED, str(source)),
    ]


@pytest.mark.parametrize("side", ["host", "device"])
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_clang_knows_every_name(source: Path, side: str, tmp_path: Path) -> None:
    compile_only(clang(side, source), tmp_path)


@pytest.fixture(scope="module", params=[32, 128])
def names(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`names.mu` on the emulator."""
    folder = tmp_path_factory.mktemp("names")
    host, library = CSRC / "vendor/host", folder / "names.so"
    command = [
        *(need("g++"), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"),
        *("-fPIC", "-shared", "-pthread", f"-DKH_SIMT_WARP_SIZE={request.param}", f"-I{host}"),
        *("-fvisibility=hidden", "-fno-gnu-unique"),
        *("-x", "c++", str(NAMES), *map(str, host.glob("*.cpp")), "-o", str(library)),
    ]
    compile_only(command, folder)
    loaded = ctypes.CDLL(str(library))
    assert loaded.kh_matrix_unit() == (request.param == 32)
    return loaded


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def test_every_name_means_the_same_on_the_emulator(names: Any) -> None:
    floats, integers = (ctypes.c_float * 16)(), (ctypes.c_ulonglong * 32)()
    integers[2] = 100
    assert names.kh_names(floats, integers, None) == 0
    ones = 2**64 - 1
    whole = [96, 31, 0, 64, (1 << 40) + (32 << 32), 31, 31, 8 + 10, ones - 13, 16]
    whole += [bin(0xF0 + 40).count("1"), 4, 26, ones - 1, 47, 49, 0x3FC00000]
    whole += [0xBFC00000, 64]
    assert list(integers)[: len(whole)] == whole
    x = 1.5
    real = [2 * x, x / 2, math.exp(x), math.tanh(x), math.sqrt(x), x**-0.5, x, -2.0]
    real += [x * x + 1, x * x + 1 / x, x + 2, x + 8, 2 * x, 0.0]
    assert list(floats)[: len(real)] == pytest.approx(real, rel=2.0**-22, abs=0)


def test_pairs_are_rounded_once(names: Any) -> None:
    """Every 16-bit float, twice, with another: special ones, neighbours, and at random."""
    every = torch.arange(-(1 << 15), 1 << 15).short()
    special = [0, 1, 2, 0x3FF, 0x400, 0x3C00, 0x3F80, 0x7BFF, 0x7C00, 0x7F7F, 0x7F80, 0x7FFF]
    other = [every.roll(n) for n in (1, 0x4000, 12345)] + [every.new_full((), n) for n in special]
    other += [every[torch.randperm(1 << 16)] for _ in range(4)]
    b = torch.stack([o.expand(1 << 16) for o in other])
    a = every.expand_as(b).contiguous()
    found = torch.empty(4, *a.shape, dtype=torch.int16)
    assert names.kh_pairs(pointer(a), pointer(b), pointer(found), a.numel() // 2, None) == 0
    for i, dtype in ((0, torch.float16), (2, torch.bfloat16)):
        # Exact, or, for differences of bf16, with so many bits that rounding again is no other.
        x, y = a.view(dtype).double(), b.view(dtype).double()
        for got, exact in ((found[i], x - y), (found[i + 1], x * y)):
            truth = exact.to(dtype)
            nan = truth.isnan()
            assert torch.equal(got.view(dtype).isnan(), nan)
            assert torch.equal(got[~nan], truth.view(torch.int16)[~nan])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_matrix_unit_multiplies(names: Any, dtype: torch.dtype) -> None:
    memory = torch.randint(-8, 9, (2, 16 * 32 + 16)).to(dtype)  # sums of theirs are exact
    a, b = (row[(-row.data_ptr() % 32) // 2 :][: 16 * 32].view(16, 32) for row in memory)
    given = torch.randint(-100, 100, (16 * 16 + 8,)).float()
    y = given[(-given.data_ptr() % 32) // 4 :][:256].view(16, 16)
    truth = 2 * (y.double() + a.double() @ b.double().T) if names.kh_matrix_unit() else y.clone()
    code = names.kh_multiplies(dtype is torch.bfloat16, pointer(a), pointer(b), pointer(y), None)
    assert code == 0
    assert torch.equal(y.double(), truth.double())


LEAKS = {
    "cuda-name": "__global__ void k(float* x) { *x = __cosf(*x); }",
    "host-call": "void h(float*); __global__ void k(float* x) { h(x); }",
    "narrowing": "__global__ void k(float* x, long n) { int v[] = {n}; *x = v[0]; }",
    "atomic-of-long": "__global__ void k(uint64_t* x) { atomicAdd(x, uint64_t{1}); }",
    "place-of-elements": "__global__ void k(float* x) { namespace m = kh::matrix; m::fragment<"
    "m::matrix_a, 16, 16, 16, kh::native_half_t, m::row_major> a; *x = a.x[0]; }",
    "wide-shuffle": "__global__ void k(float* x) { *x = __shfl_xor_sync(1u, *x, 1); }",
}


@pytest.mark.parametrize("leak", LEAKS)
def test_clang_refuses(leak: str, tmp_path: Path) -> None:
    source = tmp_path / "leak.mu"
    source.write_text(f"#include <kh_vendor.h>\n{LEAKS[leak]}\n")
    run = subprocess.run(clang("device", source), capture_output=True, text=True)
    assert run.returncode != 0, run.stderr


# ---- MUSA's names ------------------------------------------------------------------------------


def torchada_table() -> dict[str, str]:
    """CUDA's names to MUSA's, read without importing torchada, which patches torch."""
    spec = importlib.util.find_spec("torchada")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    table: dict[str, str] = {}
    for file in ("cuda_runtime", "data_types"):
        path = Path(spec.submodule_search_locations[0]) / "_mappings" / f"{file}.py"
        names: dict[str, Any] = {}
        exec(compile(path.read_text(), str(path), "exec"), names)
        for value in names.values():
            if isinstance(value, dict):
                table.update({k: v for k, v in value.items() if isinstance(v, str)})
    assert len(table) > 100
    return table


def test_musa_names_agree_with_torchada() -> None:
    """Every MUSA name in the vendor header is what torchada makes of CUDA's name for it."""
    table = torchada_table()
    header = without_comments((CSRC / "vendor/musa/kh_vendor.h").read_text())
    names = set(re.findall(r"\b(?:musa[A-Z_]|__mt_)\w*(?:\.h)?", header)) - {"musa_runtime.h"}
    assert len(names) > 5
    for name in sorted(names):
        cuda_name = name.replace("musa", "cuda", 1).replace("__mt_", "__nv_")
        assert table.get(cuda_name) == name, f"{cuda_name} is {table.get(cuda_name)}"


def test_the_shim_names_all_that_the_musa_header_uses() -> None:
    header = without_comments((CSRC / "vendor/musa/kh_vendor.h").read_text())
    shim = "".join(path.read_text() for path in (HERE / "musa_on_cuda").iterdir())
    for name in set(re.findall(r"\b(?:musa[A-Z]|__mt_)\w*", header)):
        assert re.search(rf"\b{name}\b", shim), name
