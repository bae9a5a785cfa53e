"""Finds and loads backends through the entry-point group `kernelhub.backends`.

The shipped backends are declared there like anyone else's. Loading happens once, when a backend is
first needed. A plug-in that fails is kept out, remembered with its reason, and stops nobody else.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterable

import attrs

from kernelhub import _entry_points, registry
from kernelhub.backend import Backend
from kernelhub.errors import RegistrationError

GROUP = "kernelhub.backends"
OWN_DISTRIBUTION = "kernelhub"


@attrs.frozen
class Problem:
    """A plug-in that could not be used, or metadata that could not be read."""

    name: str
    distribution: str
    reason: str
    details: str = ""


_loaded = False
_problems: list[Problem] = []
_origins: dict[str, str] = {}


def load() -> None:
    """Load every plug-in, once."""
    global _loaded
    with registry.lock:
        if _loaded:
            return
        _loaded = True  # before the work: a plug-in may call kernelhub while it loads
        try:
            _load_all()
        except BaseException:
            _loaded = False  # interrupted: the next call takes up the rest
            raise


def _load_all() -> None:
    entries, unreadable = _entry_points.read(GROUP)
    _problems[:] = [Problem("?", "?", line) for line in unreadable]
    own = [e for e in entries if e.distribution.split(" ")[0] == OWN_DISTRIBUTION]
    declared = {entry.name for entry in own}
    own += [_without_metadata(name) for name in registry.SHIPPED if name not in declared]
    for entry in [*own, *(e for e in entries if e not in own)]:
        if _origins.get(entry.name) != entry.distribution:
            _load_one(entry, shipped=entry in own)


def _without_metadata(name: str) -> _entry_points.Entry:
    """A shipped backend where the package runs from a source tree that is not installed."""
    module = f"kernelhub.backends.{name}"

    def load_shipped() -> Backend:
        backend: Backend = importlib.import_module(module).backend
        return backend

    return _entry_points.Entry(name, f"{module}:backend", OWN_DISTRIBUTION, load_shipped)


def _load_one(entry: _entry_points.Entry, *, shipped: bool) -> None:
    try:
        loaded = entry.load()
        if not isinstance(loaded, Backend) and callable(loaded):
            loaded = loaded()
        if isinstance(loaded, Backend) and loaded.name != entry.name:
            raise RegistrationError(
                f"entry point '{entry.name}' holds a backend that calls itself '{loaded.name}'"
            )
        registry.add_backend(loaded, shipped=shipped)
        _origins[entry.name] = entry.distribution
    except (Exception, SystemExit) as error:
        known = isinstance(error, RegistrationError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        details = "" if known else traceback.format_exc()
        _problems.append(Problem(entry.name, entry.distribution, reason, details))


def problems() -> tuple[Problem, ...]:
    """The plug-ins that could not be used, with reasons."""
    load()
    return tuple(_problems)


def failed(name: str) -> str | None:
    """Why the plug-in of this name could not be used; None where none failed or another serves."""
    if name in registry.backends():
        return None
    return next((f"{p.reason} ({p.distribution})" for p in problems() if p.name == name), None)


def failed_names() -> tuple[str, ...]:
    """Names of the plug-ins that could not be used."""
    return tuple(p.name for p in problems() if p.name != "?")


def known_backends() -> Iterable[str]:
    """Names that a policy may use, whether or not they can run anything here."""
    return {*registry.backends(), *registry.SHIPPED, *failed_names()}


def origin(name: str) -> str:
    """The distribution that a backend came from."""
    return _origins.get(name, "registered in this process")
