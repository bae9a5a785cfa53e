"""Finds out what is here, what is missing and what to do: the facts behind `kernelhub doctor`.

`examine` never raises, whatever is broken: what cannot be read becomes a problem of the report.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import attrs
import torch

from kernelhub import grammar, plugins, policy, registry
from kernelhub.backend import Backend
from kernelhub.errors import BuildError, PolicyError, nearest
from kernelhub.spec import parse_device

T = TypeVar("T")

# Accelerators whose torch support is a package of its own.
_TORCH_PACKAGES = {"musa": "torch_musa"}
_OTHERS_VARIABLES = ("CUDA_VISIBLE_DEVICES", "MUSA_VISIBLE_DEVICES")


@attrs.frozen
class Device:
    """A device that torch can use here, or a type of device that it cannot, with the reason."""

    name: str
    usable: bool
    detail: str

    @property
    def type(self) -> str:
        return self.name.partition(":")[0]


@attrs.frozen
class Variable:
    """An environment variable that is set. `fault` is empty where its text is well formed."""

    name: str
    value: str
    fault: str = ""
    note: str = ""


@attrs.frozen
class BackendReport:
    """One backend.

    `state`: "usable", "unusable" (its probe gives reasons), "absent" (a name of kernelhub's own
    that this installation lacks) or "failed" (a plug-in that did not load).
    """

    name: str
    state: Literal["usable", "unusable", "absent", "failed"]
    distribution: str = ""
    description: str = ""
    device_types: tuple[str, ...] = ()
    priority: int | None = None
    automatic: bool | None = None
    ops: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    details: str = ""


@attrs.frozen
class CompilerReport:
    """A compiler that was found, or why there is none and what to do. Its lack is no problem where
    libraries are there or other backends do."""

    name: str
    path: str = ""
    version: str = ""
    missing: str = ""


@attrs.frozen
class CacheReport:
    """The folder of built libraries. `fault` says why nothing can be built there."""

    path: str = ""
    fault: str = ""


@attrs.frozen
class BindingReport:
    """The compiled path from Python to a kernel. `missing` says why calls go through ctypes, which
    takes longer, and what to do; empty where it can be had."""

    missing: tuple[str, ...] = ()


@attrs.frozen
class LibraryReport:
    """A library of compiled kernels on this machine. `fault` is empty where it fits.

    `origin`: "shipped" (built ahead of time) or "cache".
    """

    platform: str
    arch: str
    origin: Literal["shipped", "cache"]
    path: str
    compiler: str = ""
    fault: str = ""


@attrs.frozen
class Report:
    versions: dict[str, str]
    devices: tuple[Device, ...]
    environment: tuple[Variable, ...]
    compilers: tuple[CompilerReport, ...]
    cache: CacheReport
    binding: BindingReport
    libraries: tuple[LibraryReport, ...]
    backends: tuple[BackendReport, ...]
    ops: tuple[str, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"ok": not self.problems, **attrs.asdict(self)}


def examine() -> Report:
    """Look at everything. Never raises."""
    problems: list[str] = []

    def guarded(what: str, look: Callable[[], T], otherwise: T) -> T:
        try:
            return look()
        except (Exception, SystemExit) as error:
            problems.append(f"{what} cannot be read: {type(error).__name__}: {error}")
            return otherwise

    versions: dict[str, str] = guarded("versions", _versions, {})
    guarded("the plug-ins", plugins.load, None)
    ops: tuple[str, ...] = guarded("the ops", lambda: tuple(registry.specs()), ())
    seen: tuple[Device, ...] = guarded("the devices", devices, ())
    found: dict[str, Backend] = guarded("the backends", registry.backends, {})
    reports = [
        guarded(f"backend '{name}'", lambda b=backend: describe(b, seen), _unreadable(name))  # type: ignore[misc]
        for name, backend in found.items()
    ]
    failures: tuple[BackendReport, ...] = guarded(
        "the failed plug-ins", lambda: tuple(_failures()), ()
    )
    known = {report.name for report in (*reports, *failures)}
    reports += [_absent(name) for name in registry.SHIPPED if name not in known]
    problems += [
        f"{f.distribution}: plug-in '{f.name}' failed to load: {'; '.join(f.missing)}"
        if f.name != "?"
        else "; ".join(f.missing)
        for f in failures
    ]
    environment: tuple[Variable, ...] = guarded("the environment", _environment, ())
    problems += [f"{variable.name}: {variable.fault}" for variable in environment if variable.fault]
    problems += guarded("the policy", lambda: list(_unmet(environment, reports)), [])
    tools: tuple[CompilerReport, ...] = guarded("the compilers", _compilers, ())
    kept = guarded("the cache", _cache, CacheReport())
    binding = guarded("the binding", _binding, BindingReport())
    libraries: tuple[LibraryReport, ...] = guarded(
        "the libraries", lambda: tuple(_libraries(found)), ()
    )
    return Report(
        versions,
        seen,
        environment,
        tools,
        kept,
        binding,
        libraries,
        (*reports, *failures),
        ops,
        tuple(problems),
    )


def _versions() -> dict[str, str]:
    from kernelhub import __version__

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if getattr(torch.version, "hip", None):
        built = f"ROCm {torch.version.hip}"
    versions = {
        "kernelhub": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} built for {built}",
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for package in _TORCH_PACKAGES.values():
        try:
            versions[package] = importlib.metadata.version(package)
        except Exception:
            continue  # not installed, or its metadata is broken: `devices` tells which
    return versions


def devices() -> tuple[Device, ...]:
    """Every device that torch can use here; for other types that matter, why it cannot."""
    cores = torch.get_num_threads()
    found = [Device("cpu", True, f"{cores} thread{'s' if cores != 1 else ''}")]
    served = [kind for b in registry.backends().values() for kind in b.device_types]
    for kind in dict.fromkeys(["cuda", "musa", *served]):
        if kind not in ("cpu", "meta"):
            found.extend(_accelerators(kind))
    return tuple(found)


def _accelerators(kind: str) -> list[Device]:
    with warnings.catch_warnings(record=True) as caught:  # a driver too old is told in a warning
        warnings.simplefilter("always")
        try:
            reason, found = "", list(_indices(kind))
        except (Exception, SystemExit) as error:
            reason, found = f"{type(error).__name__}: {error}", []
    said = [str(warning.message) for warning in caught]
    return found or [Device(kind, False, reason or "; ".join(said) or "torch sees none")]


def _indices(kind: str) -> Iterator[Device]:
    package = _TORCH_PACKAGES.get(kind)
    if package and getattr(torch, kind, None) is None:
        if importlib.util.find_spec(package) is None:
            yield Device(kind, False, f"{package} is not installed")
            return
        importlib.import_module(package)  # this is what registers the device with torch
    module = getattr(torch, kind, None)
    if module is None:
        yield Device(kind, False, f"this torch has no '{kind}' devices")
    elif kind == "cuda" and not (torch.version.cuda or getattr(torch.version, "hip", None)):
        yield Device(kind, False, "this torch is built without CUDA")
    elif module.is_available():
        for index in range(module.device_count()):
            yield Device(f"{kind}:{index}", True, _model(module, index))


def _model(module: Any, index: int) -> str:
    try:
        major, minor = module.get_device_capability(index)
        return f"{module.get_device_name(index)}, capability {major}.{minor}"
    except Exception as error:
        return f"its model cannot be read: {type(error).__name__}: {error}"


def describe(backend: Backend, seen: tuple[Device, ...]) -> BackendReport:
    """What a registered backend has, and every reason why it cannot be used here."""
    own = {
        op: [e for e in registry.entries(op) if e.backend.name == backend.name]
        for op in registry.specs()
    }
    usable, missing = _probe(backend, seen)
    for op, entries in own.items():
        for entry in entries:
            missing += [f"{op}: {reason}" for reason in entry.implementation.missing_modules()]
    return BackendReport(
        backend.name,
        "usable" if usable else "unusable",
        plugins.origin(backend.name),
        backend.description,
        tuple(backend.device_types),
        backend.priority,
        backend.automatic,
        tuple(op for op, entries in own.items() if entries),
        tuple(missing),
        () if usable else ("mend what its reasons name; until then other backends run its ops",),
    )


def _probe(backend: Backend, seen: tuple[Device, ...]) -> tuple[bool, list[str]]:
    general = registry.unavailable(backend, None)
    if general:
        return False, list(general)
    served = [d for d in seen if not backend.device_types or d.type in backend.device_types]
    usable = [device for device in served if device.usable]
    if not usable:
        return True, [f"no device of its: {d.name}: {d.detail}" for d in served]
    answers = {d.name: registry.unavailable(backend, parse_device(d.name)) for d in usable}
    reasons = [f"{name}: {reason}" for name, given in answers.items() for reason in given]
    return not all(answers.values()), reasons


def _unreadable(name: str) -> BackendReport:
    return BackendReport(name, "unusable", missing=("it cannot be examined",))


def _absent(name: str) -> BackendReport:
    return BackendReport(
        name,
        "absent",
        missing=("not part of this installation: the name is kept for kernelhub's own backend",),
        advice=("nothing; other backends run its ops",),
    )


def _failures() -> Iterator[BackendReport]:
    for problem in plugins.problems():
        owner = problem.distribution.split(" ")[0]
        advice = f"install a version of {owner} that works with this kernelhub, or uninstall it"
        if problem.name == "?":
            advice = "reinstall or remove the distribution whose metadata is broken"
        yield BackendReport(
            problem.name,
            "failed",
            problem.distribution,
            missing=(problem.reason,),
            advice=(advice,),
            details=problem.details,
        )


def _compilers() -> tuple[CompilerReport, ...]:
    from kernelhub.backends.native import compilers

    found = []
    for name, find in compilers.FINDERS.items():
        try:
            compiler = find()
            found.append(CompilerReport(name, compiler.path, compiler.version))
        except BuildError as error:
            found.append(CompilerReport(name, missing=str(error)))
    return tuple(found)


def _cache() -> CacheReport:
    from kernelhub.backends.native import cache

    try:
        path = str(cache.folder())
    except BuildError as error:
        return CacheReport(fault=str(error))
    try:
        cache.check_writable()
    except BuildError as error:
        return CacheReport(path, str(error))
    return CacheReport(path)


def _binding() -> BindingReport:
    from kernelhub.backends.native import library

    return BindingReport(library.why_not_fast())


def _libraries(found: dict[str, Backend]) -> Iterator[LibraryReport]:
    from kernelhub.backends.native import build, platform

    kernels = [getattr(backend.kernels, "platform", None) for backend in found.values()]
    compiled = {p.name: p for p in (*kernels, platform.BINDING) if isinstance(p, platform.Platform)}
    for there in build.libraries(compiled.values()):
        yield LibraryReport(
            there.platform.name,
            there.arch,
            "shipped" if there.shipped else "cache",
            str(there.path),
            there.compiler,
            there.fault,
        )


def _rules(text: str) -> grammar.Rules:
    rules = grammar.parse(text.strip())
    rules.validate(registry.specs(), plugins.known_backends())
    return rules


def _cache_dir(text: str) -> None:
    from kernelhub.backends.native import cache

    cache.check_writable()


def _library_path(text: str) -> None:
    for name in filter(None, text.split(os.pathsep)):
        if not os.path.isdir(name):
            raise BuildError(f"{name} is not a folder")


def _emulator(text: str) -> None:
    from kernelhub.backends.simt import options

    options.parse(text)


def _tiles(text: str) -> None:
    from kernelhub.backends.native import tiles

    tiles.read(text.strip())


def _engine_ops(text: str) -> None:
    from kernelhub.integrations import engines

    engines.asked(text)


_VARIABLES: dict[str, Callable[[str], Any]] = {
    policy.BACKEND_VARIABLE: _rules,
    policy.FALLBACK_VARIABLE: grammar.parse_fallback,
    "KERNELHUB_CACHE_DIR": _cache_dir,
    "KERNELHUB_ENGINE_OPS": _engine_ops,
    "KERNELHUB_LIBRARY_PATH": _library_path,
    "KERNELHUB_SIMT": _emulator,
    "KERNELHUB_TILES": _tiles,
}
"""The variables that kernelhub reads, and what reads their text."""


def _environment() -> tuple[Variable, ...]:
    found = []
    for name in sorted(os.environ):
        value, fault, note = os.environ[name], "", ""
        if name in _VARIABLES and value.strip():
            try:
                _VARIABLES[name](value)
            except (PolicyError, BuildError) as error:
                fault = str(error).removeprefix(f"{name}: ")
        elif name.startswith("KERNELHUB_") and name not in _VARIABLES:
            note = f"kernelhub reads no variable of this name; {nearest(name, _VARIABLES)}"
        elif name not in (*_VARIABLES, *_OTHERS_VARIABLES):
            continue
        found.append(Variable(name, value, fault, note))
    return tuple(found)


def _unmet(environment: tuple[Variable, ...], reports: list[BackendReport]) -> Iterator[str]:
    """Ops for which the environment allows only backends that cannot be used here."""
    usable = {report.name for report in reports if report.state == "usable"}
    for variable in environment:
        if variable.name != policy.BACKEND_VARIABLE or variable.fault or not variable.value.strip():
            continue
        rules = _rules(variable.value)
        without: dict[tuple[str, ...], list[str]] = {}
        for op in registry.specs():
            choice = rules.match(op)
            if choice and grammar.AUTO not in choice.names and not usable & set(choice.names):
                without.setdefault(choice.names, []).append(op)
        for names, ops in without.items():
            yield (
                f"{variable.name}={variable.value.strip()}: {' and '.join(names)} cannot be used "
                f"here, so nothing can run {', '.join(ops)}"
            )
