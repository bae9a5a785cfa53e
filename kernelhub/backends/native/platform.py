"""How each platform compiles the kernels: which compiler, which sources, which flags."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

import attrs

from kernelhub.backends.native import compilers
from kernelhub.backends.native.compilers import Compiler


def csrc() -> Path:
    """The kernels' sources: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).parents[2]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def _the_known(platform: Platform) -> Callable[[str], bool]:
    return platform.archs.__contains__


def _named_as(pattern: str) -> Callable[[str], bool]:
    return lambda arch: re.fullmatch(pattern, arch) is not None


@attrs.frozen
class Platform:
    """How one platform's library is compiled.

    Attributes:
        name: what the library calls itself; also part of its file name.
        archs: the known architectures, first the one built where no device says otherwise.
        find_compiler: finds the compiler; `BuildError`, with what to do, where there is none.
        sources: the files to compile.
        includes: the folders to look for headers in, the vendor header's first.
        compile_flags: for a compiler and an architecture.
        link_flags: the same, for the step that makes the library.
        accepts: whether `kernelhub build` takes a name for an architecture; by default the known.
    """

    name: str
    archs: tuple[str, ...]
    find_compiler: Callable[[], Compiler]
    sources: Callable[[], tuple[Path, ...]]
    includes: Callable[[], tuple[Path, ...]]
    compile_flags: Callable[[Compiler, str], tuple[str, ...]]
    link_flags: Callable[[Compiler, str], tuple[str, ...]]
    accepts: Callable[[str], bool] = attrs.field(
        default=attrs.Factory(_the_known, takes_self=True), eq=False
    )


def portable_sources() -> tuple[Path, ...]:
    return tuple(sorted((csrc() / "musa").glob("*.mu")))


def includes_of(vendor: str) -> Callable[[], tuple[Path, ...]]:
    """The include path of a vendor's folder in `csrc/vendor`."""
    return lambda: (csrc() / "vendor" / vendor, csrc() / "common", csrc() / "include")


_HIDDEN = ("-fPIC", "-fvisibility=hidden")


# ---- cuda ------------------------------------------------------------------------------------


def _cuda_flags(compiler: Compiler, arch: str) -> tuple[str, ...]:
    number = arch.removeprefix("sm_")
    code = f"arch=compute_{number},code=sm_{number}"
    return (
        "-x",
        "cu",
        "-std=c++17",
        "-O3",
        "--generate-code",
        code,
        "-Xcompiler",
        ",".join(_HIDDEN),
    )


CUDA = Platform(
    name="cuda",
    archs=("sm_90a", "sm_80", "sm_86", "sm_87", "sm_89", "sm_100", "sm_103", "sm_120", "sm_121"),
    find_compiler=compilers.nvcc,
    sources=lambda: (*portable_sources(), *sorted((csrc() / "cuda").glob("*.cu"))),
    includes=lambda: (*includes_of("cuda")(), csrc() / "cuda"),
    compile_flags=_cuda_flags,
    link_flags=lambda compiler, arch: ("-shared",),
    accepts=_named_as(r"sm_\d{2,3}[af]?"),
)


# ---- musa ------------------------------------------------------------------------------------


def _musa_flags(compiler: Compiler, arch: str) -> tuple[str, ...]:
    return (
        *("-x", "musa", "-mtgpu", f"--offload-arch={arch}"),
        *("-std=c++17", "-O3", "-Od3", *_HIDDEN),  # -Od3 is the device's level of optimisation
    )


def _musa_link(compiler: Compiler, arch: str) -> tuple[str, ...]:
    library = Path(compiler.path).resolve().parents[1] / "lib"
    return ("-shared", f"-L{library}", "-lmusart")


MUSA = Platform(
    name="musa",
    archs=("mp_31", "mp_22", "mp_21"),
    find_compiler=compilers.mcc,
    sources=portable_sources,
    includes=includes_of("musa"),
    compile_flags=_musa_flags,
    link_flags=_musa_link,
    accepts=_named_as(r"mp_\d{2,3}"),
)


# ---- simt: the emulator ----------------------------------------------------------------------

_SANITIZERS = {
    "": (),
    # Without the checks that address sanitizing makes needless: they double the compiler's time.
    "-asan": (
        *("-fsanitize=address,undefined", "-fno-sanitize=null,object-size"),
        *("-fno-sanitize-recover=all", "-DKH_SIMT_SERIAL"),
        "--param=asan-instrumentation-with-call-threshold=0",  # calls: compiles in 2/3
    ),
    "-tsan": ("-fsanitize=thread",),
}


def _sanitizer(arch: str) -> tuple[str, ...]:
    suffix = re.sub(r"^warp\d+", "", arch)
    return (*_SANITIZERS[suffix], "-g") if suffix else ()


def _simt_flags(compiler: Compiler, arch: str) -> tuple[str, ...]:
    warp = re.match(r"warp(\d+)", arch)
    assert warp is not None
    return (
        # -O2 takes half as long again to compile, and the cases run no faster.
        *("-x", "c++", "-std=c++17", "-O1", *_HIDDEN, "-fno-gnu-unique"),
        "-fstack-clash-protection",  # no frame steps over the guard of a thread's stack
        # As a GPU's compiler with explicit fmaf: products and sums are not joined unasked.
        *("-ffp-contract=off", f"-DKH_SIMT_WARP_SIZE={warp[1]}", *_sanitizer(arch)),
    )


SIMT = Platform(
    name="simt",
    archs=tuple(f"warp{warp}{suffix}" for suffix in _SANITIZERS for warp in (32, 128)),
    find_compiler=compilers.gxx,
    sources=lambda: (*portable_sources(), *sorted((csrc() / "vendor" / "host").glob("*.cpp"))),
    includes=includes_of("host"),
    compile_flags=_simt_flags,
    link_flags=lambda compiler, arch: ("-shared", "-pthread", *_sanitizer(arch)),
)


# ---- the binding -----------------------------------------------------------------------------


def _python_headers() -> Path:
    return Path(sysconfig.get_paths()["include"])


def _compiler_with_python() -> Compiler:
    compiler = compilers.gxx()
    compilers.need_file(
        _python_headers() / "Python.h",
        "the headers of Python: install them (Debian: `apt-get install python3-dev`)",
    )
    return compiler


def soabi() -> str:
    """What tells the binaries of one Python from another's; the binding's architecture."""
    return str(sysconfig.get_config_var("SOABI"))


BINDING = Platform(
    name="binding",
    archs=(soabi(),),
    find_compiler=_compiler_with_python,
    sources=lambda: (csrc() / "binding" / "binding.c",),
    includes=lambda: (csrc() / "include",),
    # Python's headers are no sources: its architecture says what a binding fits.
    compile_flags=lambda compiler, arch: (
        *("-x", "c", "-std=c11", "-O2", f"-I{_python_headers()}", *_HIDDEN),
    ),
    link_flags=lambda compiler, arch: ("-shared",),
)
