"""The table of ops and backends. Everything is checked before anything is changed."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from kernelhub.backend import (
    API_VERSION,
    REFERENCE_PRIORITY,
    VENDOR_PRIORITY,
    Backend,
    Implementation,
    reasons_of,
)
from kernelhub.errors import RegistrationError, UnknownName, nearest
from kernelhub.spec import Args, Device, OpSpec

lock = threading.RLock()
"""Guards the tables here and the dispatch tables that are derived from them."""

if hasattr(os, "register_at_fork"):
    # A child forked while another thread holds the lock would wait for it forever.
    os.register_at_fork(
        before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
    )

REFERENCE = "reference"
SHIPPED = (REFERENCE, "musa", "cuda", "simt")
"""Names that only kernelhub's own distribution may register."""


@attrs.frozen
class Entry:
    """An implementation in the table, with the backend it belongs to.

    `run` is its function for any call; it takes every argument by position.
    """

    backend: Backend
    implementation: Implementation
    run: Callable[..., Any]
    priority: int

    def prepared(self, call: Args) -> Callable[..., Any]:
        """The function for a call and all calls like it, every argument by position."""
        prepare = self.implementation.prepare
        return prepare(call) if prepare else self.run

    @property
    def name(self) -> str:
        variant = self.implementation.variant
        return f"{self.backend.name}.{variant}" if variant else self.backend.name

    @property
    def device_types(self) -> tuple[str, ...]:
        own = self.implementation.device_types
        return self.backend.device_types if own is None else own

    def serves(self, device_type: str) -> bool:
        return not self.device_types or device_type in self.device_types


_specs: dict[str, OpSpec] = {}
_backends: dict[str, Backend] = {}
_entries: dict[str, list[Entry]] = {}
_probes: dict[tuple[str, str], tuple[str, ...]] = {}
_changed: list[Callable[[], None]] = []


def on_change(callback: Callable[[], None]) -> None:
    """Call `callback` whenever an op or backend was added or removed."""
    _changed.append(callback)


def notify() -> None:
    """Tell everyone that keeps something derived from the tables or the policy to drop it."""
    for callback in _changed:
        callback()


def specs() -> dict[str, OpSpec]:
    with lock:
        return dict(_specs)


def spec(name: str) -> OpSpec:
    with lock:
        if name not in _specs:
            raise UnknownName(f"no op named '{name}'; {nearest(name, _specs)}")
        return _specs[name]


def backends() -> dict[str, Backend]:
    with lock:
        return dict(_backends)


def entries(op: str) -> tuple[Entry, ...]:
    """The implementations of an op, best first."""
    with lock:
        return tuple(_entries[op])


def add_op(spec: OpSpec) -> None:
    """Add an op whose reference the `reference` backend runs.

    Raises `RegistrationError` where the contract is not whole: a second op of the same name, a
    parameter without a `Param` or the reverse, a missing docstring, a reference whose signature is
    not the op's.
    """
    with lock:
        _check_spec(spec)
        _specs[spec.name] = spec
        _entries[spec.name] = []
        if REFERENCE in _backends:
            _entries[spec.name].append(_reference_entry(spec))
        notify()


def remove_op(name: str) -> None:
    """Take an op and its implementations out of the tables (for tests and reloads)."""
    with lock:
        spec(name)
        del _specs[name], _entries[name]
        notify()


def _reference_entry(spec: OpSpec) -> Entry:
    implementation = Implementation(
        op=spec.name, target=spec.reference, traits=spec.reference_traits
    )
    run = spec.by_position(spec.reference)
    return Entry(_backends[REFERENCE], implementation, run, REFERENCE_PRIORITY)


def _check_spec(spec: OpSpec) -> None:
    name = spec.name
    if name in _specs:
        raise RegistrationError(f"op '{name}' is registered already")
    if not name.isidentifier() or name.startswith("_"):
        raise RegistrationError(f"op name {name!r} is not a public Python identifier")
    if not (spec.prototype.__doc__ or "").strip():
        raise RegistrationError(f"op '{name}': the prototype has no docstring")
    declared, described = list(spec.signature.parameters), [p.name for p in spec.params]
    if declared != described:
        raise RegistrationError(
            f"op '{name}': signature and params differ\n{_diff(declared, described)}"
        )
    if spec.device_param not in declared or not spec.param(spec.device_param).is_tensor:
        raise RegistrationError(
            f"op '{name}': device_param '{spec.device_param}' is not a tensor parameter"
        )
    for part in ("check", "outputs", "reference", "oracle", "cases", "cost"):
        if not callable(getattr(spec, part)):
            raise RegistrationError(f"op '{name}': {part} is not callable")
    _check_signature(spec, spec.reference, f"op '{name}': reference")


def _check_signature(spec: OpSpec, function: Callable[..., Any], what: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise RegistrationError(f"{what} has no readable signature: {error}") from error
    wanted, got = _parameters(spec.signature), _parameters(signature)
    if wanted != got:
        raise RegistrationError(f"{what}: signature differs from the op's\n{_diff(wanted, got)}")


def _parameters(signature: inspect.Signature) -> list[str]:
    """One line per parameter: kind, name and default. Annotations are the author's own affair."""
    lines = []
    for p in signature.parameters.values():
        default = "" if p.default is p.empty else f"={p.default!r}"
        lines.append(f"{p.kind.description} {p.name}{default}")
    return lines


def _diff(wanted: list[str], got: list[str]) -> str:
    lines = difflib.unified_diff(wanted, got, "expected", "got", lineterm="", n=len(wanted))
    return "\n".join(f"    {line}" for line in lines if not line.startswith("@@"))


def add_backend(backend: Backend, *, shipped: bool = False) -> None:
    """Add a backend and its implementations.

    Raises `RegistrationError`, with every fault found, before anything is changed: an API version
    that is not this one or the one before, a name in use, an unknown op, a target that cannot be
    imported or called, a signature that differs (shown as a diff), two implementations that tie.
    """
    with lock:
        if not isinstance(backend, Backend):
            raise RegistrationError(
                f"expected a kernelhub.backend.Backend, got {type(backend).__name__}"
            )
        faults = list(_faults(backend, shipped))
        new: list[Entry] = []
        for implementation in backend.implementations:
            try:
                new.append(_entry(backend, implementation))
            except RegistrationError as error:
                faults.append(str(error))
        faults.extend(_ties(new))
        if faults:
            raise RegistrationError(f"backend '{backend.name}': " + "\n".join(faults))
        _backends[backend.name] = backend
        if backend.name == REFERENCE:
            new.extend(_reference_entry(s) for s in _specs.values())
        for entry in new:
            table = _entries[entry.implementation.op]
            table.append(entry)
            table.sort(key=lambda e: -e.priority)
        notify()


def remove_backend(name: str) -> None:
    """Take a backend out of the tables (for tests and reloads)."""
    with lock:
        if name not in _backends:
            raise UnknownName(f"no backend named '{name}'; {nearest(name, _backends)}")
        del _backends[name]
        for table in _entries.values():
            table[:] = [entry for entry in table if entry.backend.name != name]
        for key in [key for key in _probes if key[0] == name]:
            del _probes[key]
        notify()


def _faults(backend: Backend, shipped: bool) -> Iterator[str]:
    if backend.name in _backends:
        yield "a backend of this name is registered already"
    if backend.name == "auto" or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", backend.name):
        yield "the name must be letters, digits and '_', no digit first, and not 'auto'"
    if backend.name in SHIPPED and not shipped:
        yield f"the name is reserved for the backend that kernelhub ships ({', '.join(SHIPPED)})"
    if backend.api_version not in (API_VERSION, API_VERSION - 1):
        yield (
            f"written for backend API {backend.api_version}, this kernelhub has {API_VERSION} "
            f"and takes {API_VERSION - 1} or {API_VERSION}: install a version made for it"
        )
    if not backend.implementations and backend.name != REFERENCE:
        yield "it declares no implementation"
    if not shipped:
        own = {i.priority for i in backend.implementations if i.priority is not None}
        for priority in {backend.priority, *own}:
            if not REFERENCE_PRIORITY < priority < VENDOR_PRIORITY:
                yield f"priority {priority} is outside 1..{VENDOR_PRIORITY - 1}"


def _entry(backend: Backend, implementation: Implementation) -> Entry:
    op = implementation.op
    if op not in _specs:
        raise RegistrationError(f"no op named '{op}'; {nearest(op, _specs)}")
    own = implementation.priority
    priority = backend.priority if own is None else own
    return Entry(backend, implementation, _run(_specs[op], implementation), priority)


def _run(spec: OpSpec, implementation: Implementation) -> Callable[..., Any]:
    label = f"implementation of '{spec.name}'" + (
        f" ({implementation.variant})" if implementation.variant else ""
    )
    prepare, bind = implementation.prepare, spec.bind
    if prepare is None:
        function = implementation.load()
        _check_signature(spec, function, label)
        return spec.by_position(function)
    if implementation.target or not callable(prepare):
        raise RegistrationError(f"{label}: it takes a target or a function 'prepare'")
    return lambda *values: prepare(bind(*values))(*values)


def _ties(new: list[Entry]) -> Iterator[str]:
    """Two implementations of one op that could both be first for a device, with equal priority."""
    for index, entry in enumerate(new):
        op = entry.implementation.op
        earlier = (e for e in new[:index] if e.implementation.op == op)
        for other in [*earlier, *_entries[op]]:
            shared = (
                not entry.device_types
                or not other.device_types
                or set(entry.device_types) & set(other.device_types)
            )
            if entry.name == other.name:
                yield f"two implementations of '{op}' are both called '{entry.name}'"
            elif (
                shared
                and entry.priority == other.priority
                and entry.backend.automatic
                and other.backend.automatic
            ):
                yield (
                    f"implementation of '{op}': priority {entry.priority} ties with "
                    f"'{other.name}' on a device that both serve; give one another priority"
                )


def unavailable(backend: Backend, device: Device | None) -> tuple[str, ...]:
    """Why the backend cannot be used on a device: the answer of its probe, asked once."""
    key = (backend.name, str(device))
    with lock:
        if key not in _probes:
            try:
                reasons = tuple(reasons_of(backend.probe(device)))
            except Exception as error:
                reasons = (f"its probe failed: {type(error).__name__}: {error}",)
            _probes[key] = reasons
        return _probes[key]
