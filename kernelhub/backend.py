"""What a backend is: the frozen classes that a vendor fills in."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from kernelhub.errors import RegistrationError
from kernelhub.spec import Args, Device, Traits

API_VERSION = 1
"""Version of the classes here. A backend built for this one or the one before is taken."""

VENDOR_PRIORITY = 100
PLUGIN_PRIORITY = 50
REFERENCE_PRIORITY = 0


def _accepts_all(args: Args) -> Iterable[str]:
    return ()


def _always_available(device: Device | None) -> Iterable[str]:
    return ()


def reasons_of(answer: Iterable[str]) -> list[str]:
    """What a probe or `rejects` answered, as a list; one bare string is one reason."""
    return [answer] if isinstance(answer, str) else [str(reason) for reason in answer]


@attrs.frozen
class Implementation:
    """One way to run one op.

    Attributes:
        op: the op's name.
        target: `"module:attribute"` of a function with the op's own signature, or the function. Its
            module must import on every machine: vendor packages, compilers and devices belong into
            the backend's `probe` or behind the first call.
        prepare: instead of a target, what makes one. For the arguments of a call, a function that
            runs it and all calls like it (of the same types, dtypes, devices, sizes, strides and
            numbers) and takes every argument by position. What those tell is then worked out once.
            It keeps no tensor and relies on no address: those differ from call to call, and so do
            numbers that the op takes as they come (`Param.any_number`).
        variant: tells several implementations of one op in one backend apart.
        device_types: the device types it runs on, where not the backend's.
        requires: modules that must be installed.
        rejects: for the arguments of a call (described, fake or real), every reason why it cannot
            run, in plain words; empty means it can. Reads shapes, dtypes, strides and options;
            never data, environment or clock.
        chain: for the arguments of a call, the longest chain of fp32 additions into one result,
            where it is shorter than the worst case: a smaller one is held to a tighter bound.
        priority: rank among the backends that can run a call, where not the backend's.
    """

    op: str
    target: str | Callable[..., Any] = ""
    variant: str = ""
    device_types: tuple[str, ...] | None = None
    requires: tuple[str, ...] = ()
    rejects: Callable[[Args], Iterable[str]] = _accepts_all
    chain: Callable[[Args], int] | None = None
    traits: Traits = Traits()
    priority: int | None = None
    prepare: Callable[[Args], Callable[..., Any]] | None = None

    @property
    def has_rules(self) -> bool:
        """Whether running it depends on a call's arguments and not on its device alone."""
        return self.rejects_some or not self.traits.differentiable

    @property
    def rejects_some(self) -> bool:
        """Whether it may refuse a call for its arguments."""
        return self.rejects is not _accepts_all

    def load(self) -> Callable[..., Any]:
        """The function behind `target`; `RegistrationError` where there is none."""
        if callable(self.target):
            return self.target
        module, _, attribute = self.target.partition(":")
        where = f"implementation of '{self.op}': target '{self.target}'"
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise RegistrationError(f"{where} cannot be imported: {error}") from error
        if not callable(function):
            raise RegistrationError(f"{where} is not callable: {type(function).__name__}")
        loaded: Callable[..., Any] = function
        return loaded

    def missing_modules(self) -> list[str]:
        return [
            f"module '{name}' is not installed" for name in self.requires if not _installed(name)
        ]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _as_tuple(given: Iterable[Implementation]) -> tuple[Implementation, ...]:
    return tuple(given)


@attrs.frozen
class Backend:
    """A named set of implementations.

    Attributes:
        name: what users write in a policy.
        implementations: at most one for each (op, variant).
        device_types: the torch device types it serves; empty means every device.
        probe: for a device (or None: in general), every reason why the backend cannot be used
            there, each with what to do; empty means it can. Called lazily, and the answer is kept.
        priority: default rank of its implementations. Outside backends stay within 1..99: below the
            device's own vendor backend (100), above `reference` (0).
        automatic: whether it may be chosen without being named.
        api_version: the `API_VERSION` it was written for.
        description: one line for `kernelhub backends`.
        kernels: of a compiled backend, what `kernelhub build` compiles
            (`kernelhub.backends.native.kernels.Kernels`).
    """

    name: str
    implementations: tuple[Implementation, ...] = attrs.field(converter=_as_tuple)
    device_types: tuple[str, ...] = ()
    probe: Callable[[Device | None], Iterable[str]] = _always_available
    priority: int = PLUGIN_PRIORITY
    automatic: bool = True
    api_version: int = API_VERSION
    description: str = ""
    kernels: Any = None
