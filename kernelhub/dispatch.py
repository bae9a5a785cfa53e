"""From a call to the implementation that runs it.

Each op keeps one table from device object to the function to run, which takes every argument by
position. An entry is made on the first call for a device; a change of policy or of backends empties
the tables. While any thread is inside a `use` block nothing is kept: each call then asks the policy
of its own thread.

A second table, from what a call is like to the function, saves the checks of calls that are like
one that has passed them. What a call is like must be found faster than the checks take, so the
compiled binding does it (`use_keys`); without it every call is checked.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import attrs
import torch
from torch.autograd import forward_ad

from kernelhub import plugins, policy, registry
from kernelhub.backend import Implementation, reasons_of
from kernelhub.errors import BackendUnavailable, FallbackWarning
from kernelhub.grammar import Choice
from kernelhub.registry import Entry
from kernelhub.selection import Candidate, Selection
from kernelhub.spec import NOT_REAL, Args, Device, OpSpec, TensorDesc

logger = logging.getLogger("kernelhub")

KeyOf = Callable[..., bytes | None]
"""From the arguments of a call, by position, to bytes that are equal for calls that an op's checks
and implementations' rules cannot tell apart, whether a gradient may be asked for among them. None
where it cannot say, and where a transform or an observer of torch's ops must be asked first."""

MakeKey = Callable[[OpSpec, bool], KeyOf]
"""Makes one for an op. False asks for less: for calls that nobody checks, what `prepare` reads."""

Known = dict[bytes | None, Callable[..., Any]]

_MOST_KNOWN = 4096  # calls of a table; more empty it

_HOST_DEVICES = ("cpu", "meta")


@attrs.frozen
class Ranked:
    """A candidate with the reasons that do not depend on a call's arguments."""

    entry: Entry | None
    backend: str
    reasons: tuple[str, ...]

    def candidate(self, more: tuple[str, ...] = ()) -> Candidate:
        implementation = self.entry.implementation if self.entry else None
        return Candidate(
            self.backend,
            implementation.variant if implementation else "",
            self.reasons + more,
            self.entry.priority if self.entry else 0,
        )


@attrs.frozen
class Ranking:
    """All candidates for an op on a device under one policy, in the order to try them."""

    spec: OpSpec
    device: Device
    wish: policy.Wish
    ranked: tuple[Ranked, ...]

    @property
    def depends_on_arguments(self) -> bool:
        """Whether the first candidate that the device allows may still refuse a call."""
        return self._first is not None and self._first.implementation.has_rules

    @property
    def without_rules(self) -> Callable[..., Any] | None:
        """The first candidate's function, where only a derivative can keep it from running."""
        first = self._first
        return first.run if first and not first.implementation.rejects_some else None

    @property
    def _first(self) -> Entry | None:
        """The first candidate that the device allows."""
        return next((r.entry for r in self.ranked if r.entry and not r.reasons), None)

    def pick(self, args: Args) -> Entry | None:
        """The first candidate that takes this call."""
        for ranked in self.ranked:
            entry = ranked.entry
            if entry and not (ranked.reasons or _refusals(self.spec, entry.implementation, args)):
                return entry
        return None

    def falls_back(self, backend: str | None) -> bool:
        """Whether it is the reference, on an accelerator, and was not what was named first."""
        choice = self.wish.choice
        asked_for = choice is not None and choice.names[0] == registry.REFERENCE
        on_host = self.device.type in _HOST_DEVICES
        return backend == registry.REFERENCE and not on_host and not asked_for

    def selection(self, args: Args) -> Selection:
        candidates, chosen = [], None
        for ranked in self.ranked:
            more: tuple[str, ...] = ()
            if ranked.entry and not ranked.reasons:
                more = _refusals(self.spec, ranked.entry.implementation, args)
            candidate = ranked.candidate(more)
            candidates.append(candidate)
            if chosen is None and not candidate.reasons:
                chosen = candidate
        inputs = tuple((n, TensorDesc.like(t)) for n, t in self.spec.tensors(args).items())
        return Selection(
            self.spec.name, str(self.device), inputs, tuple(candidates), chosen, self.wish.origin
        )


def _refusals(spec: OpSpec, implementation: Implementation, args: Args) -> tuple[str, ...]:
    reasons = reasons_of(implementation.rejects(args))
    if not implementation.traits.differentiable:
        reasons += _underivable(spec.tensors(args))
    return tuple(reasons)


def _underivable(tensors: dict[str, Any]) -> list[str]:
    """Why a backend without derivatives would lose something of a call."""
    if _transformed():
        return ["called inside a torch.func transform, which sees torch ops alone: use 'reference'"]
    mend = "call it under torch.no_grad() or use 'reference'"
    if torch.is_grad_enabled():
        for name, value in tensors.items():
            if value.requires_grad:
                return [f"'{name}' requires grad and this backend has no derivative: {mend}"]
    if forward_ad._current_level >= 0:
        for name, value in tensors.items():
            if (
                isinstance(value, torch.Tensor)
                and forward_ad.unpack_dual(value).tangent is not None
            ):
                return [f"'{name}' carries a tangent and this backend has no derivative: {mend}"]
    return []


def _derivable(values: tuple[Any, ...]) -> bool:
    """Whether a derivative of the call may be asked for (a quick yes to whatever is unusual)."""
    if _transformed() or forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _transformed() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp, ...) runs: tensors may be wrapped."""
    return torch._C._functorch.peek_interpreter_stack() is not None


OBSERVERS = (torch._C._len_torch_dispatch_stack, torch._C._is_tracing)
"""One returns something true where what follows a call sees torch ops alone: a dispatch mode
(make_fx, a FLOP counter) or torch.jit.trace."""


def _observed() -> bool:
    return any(ask() for ask in OBSERVERS)


WATCHERS = (torch._C._functorch.peek_interpreter_stack, *OBSERVERS)
"""`_transformed` and `_observed` for who makes keys: one returns something true where either is."""


def rank(spec: OpSpec, device: Device, wish: policy.Wish) -> Ranking:
    """Rank every candidate of an op for a device. Reads no argument of a call."""
    plugins.load()
    choice = wish.choice or Choice(names=("auto",), excluded=frozenset())
    named = [name for name in choice.names if name != "auto"]
    by_backend: dict[str, list[Entry]] = {}
    for entry in registry.entries(spec.name):
        by_backend.setdefault(entry.backend.name, []).append(entry)

    def rest() -> list[str]:
        """Best first: a backend stands where its best implementation for this device does; after
        all that may be chosen automatically, the others."""

        def best(name: str) -> tuple[bool, int]:
            served = (e.priority for e in by_backend[name] if e.serves(device.type))
            return registry.backends()[name].automatic, max(served, default=-1)

        return sorted((n for n in by_backend if n not in named), key=best, reverse=True)

    order = [n for name in choice.names for n in (rest() if name == "auto" else [name])]
    automatic = "auto" in choice.names
    everyone = dict.fromkeys([*by_backend, *registry.backends(), *plugins.failed_names()])
    left_out = [name for name in everyone if name not in order]
    ranked: list[Ranked] = []
    for name in order:
        allowed = () if name in named else _not_automatic(name)
        excluded = (f"excluded by {wish.origin}",) if name in choice.excluded else allowed
        ranked.extend(_candidates(spec, device, name, by_backend.get(name, []), excluded))
    for name in left_out:
        reason = () if automatic else (f"excluded by {wish.origin}",)
        ranked.extend(_candidates(spec, device, name, by_backend.get(name, []), reason))
    return Ranking(spec, device, wish, tuple(ranked))


def _not_automatic(name: str) -> tuple[str, ...]:
    if registry.backends()[name].automatic:
        return ()
    return (f"never chosen automatically: name it, as in kernelhub.use('{name}')",)


def _candidates(
    spec: OpSpec, device: Device, name: str, entries: list[Entry], excluded: tuple[str, ...]
) -> list[Ranked]:
    if not entries:
        return [Ranked(None, name, excluded or (_why_absent(spec, name),))]
    found = []
    for entry in entries:
        reasons = excluded
        if not reasons and not entry.serves(device.type):
            reasons = (f"runs on {', '.join(entry.device_types)}; the tensors are on {device}",)
        if not reasons:
            reasons = registry.unavailable(entry.backend, device)
            reasons += tuple(entry.implementation.missing_modules())
        found.append(Ranked(entry, name, reasons))
    return found


def _why_absent(spec: OpSpec, name: str) -> str:
    failure = plugins.failed(name)
    if failure is not None:
        return f"failed to load: {failure}"
    if name in registry.backends():
        return f"does not implement {spec.name}"
    return "is not part of this installation: see `kernelhub doctor`"


def _no_key(*values: Any) -> None:
    return None


_make_key: MakeKey | None = None
_tables: weakref.WeakSet[Table | Planned] = weakref.WeakSet()


def key_for(spec: OpSpec, checks: bool) -> KeyOf:
    """What tells what calls of an op are like; says nothing where nobody can."""
    return _make_key(spec, checks) if _make_key else _no_key


def use_keys(make: MakeKey) -> None:
    """From now on let what `make` makes tell what calls of an op are like."""
    global _make_key
    with registry.lock:
        _make_key = make
        for table in list(_tables):
            table.namespace["_key"] = make(table.spec, table.checks)


def _put(known: Known, key: bytes, run: Callable[..., Any]) -> None:
    if len(known) >= _MOST_KNOWN:
        known.clear()
    known[key] = run


class Planned:
    """What the implementation of a plan has prepared for its calls. Nothing is checked."""

    checks = False

    def __init__(self, spec: OpSpec, entry: Entry) -> None:
        self.spec = spec
        self.entry = entry
        self.known: Known = {}
        self.namespace: dict[str, Any] = {}
        with registry.lock:
            _tables.add(self)

    def prepared(self, key: bytes | None, *values: Any) -> Callable[..., Any]:
        """The function for a call whose key is not known, all arguments by position."""
        if key is None:
            return self.entry.run
        try:
            run = self.entry.prepared(self.spec.without_numbers(self.spec.bind(*values)))
        except TypeError:  # it read a number that no key tells
            return self.entry.run
        _put(self.known, key, run)
        return run


class Table:
    """The functions of one op by device, under the thread's policy or under one `op.on` choice."""

    checks = True

    def __init__(self, spec: OpSpec, on: policy.Wish | None = None) -> None:
        self.spec = spec
        self.on = on
        self.by_device: dict[Any, Callable[..., Any]] = {}
        self.known: Known = {}
        self.namespace: dict[str, Any] = {}
        with registry.lock:
            _tables.add(self)
        self.not_real: Callable[..., Any]
        self._rankings: dict[tuple[Device, policy.Wish], Ranking] = {}
        self._told: set[tuple[str, str]] = set()

    def clear(self) -> None:
        self.by_device.clear()
        self.known.clear()
        self._rankings.clear()

    def ranking(self, device: Device) -> Ranking:
        wish = self.on or policy.wish(self.spec.name)
        with registry.lock:
            if (device, wish) not in self._rankings:
                self._rankings[device, wish] = rank(self.spec, device, wish)
            return self._rankings[device, wish]

    def checked(self, key: bytes | None, *values: Any) -> Callable[..., Any]:
        """The function for a call whose key is not known; it, too, takes all by position.

        Raises `ArgumentError` where the call breaks the contract.
        """
        call = self.spec.bind(*values)
        device = self.spec.validate(call)
        run = self.by_device.get(device)
        if run is None:
            return self._miss(call, device)
        if key is not None:
            self._keep(key, device, run, call)
        return run

    def _keep(self, key: bytes, device: Device, run: Callable[..., Any], call: Args) -> None:
        ranking = self.ranking(device)
        call = self.spec.without_numbers(call)
        try:
            entry = ranking.pick(call)
            if entry is None:
                return
            if ranking.depends_on_arguments:
                if entry.backend.name == registry.REFERENCE:
                    return  # perhaps a fallback, of which more must be said than once
                if (entry.name, str(device)) not in self._told:
                    return
            prepared = entry.prepared(call)
        except TypeError:  # a rule or `prepare` read a number that no key tells
            return
        with registry.lock:
            still = self._rankings.get((device, ranking.wish)) is ranking
            if not still or self.by_device.get(device) is not run:
                return  # the policy has changed meanwhile
            _put(self.known, key, prepared)

    def _miss(self, call: Args, device: Any) -> Callable[..., Any]:
        """The function for a call whose device has no entry; keeps it where it may."""
        if device is NOT_REAL or device.type == "meta":
            return self.not_real
        with registry.lock:
            ranking = self.ranking(device)
            if ranking.depends_on_arguments:
                run: Callable[..., Any] = self._chooser(ranking, ranking.without_rules)
            else:
                run = self.select(ranking, call, stacklevel=6).run
            if self.on is not None or not policy.uses_active():
                self.by_device[device] = run
        return run

    def _chooser(self, ranking: Ranking, first: Callable[..., Any] | None) -> Callable[..., Any]:
        """Chooses on every call, for implementations whose rules look at the arguments.

        `first` is what runs where no derivative may be asked for, once it has been told of.
        """
        bind, select = self.spec.bind, self.select
        told = False

        def run(*values: Any) -> Any:
            nonlocal told
            if _observed():
                return self.not_real(*values)
            if told and first is not None and not _derivable(values):
                return first(*values)
            told = True
            return select(ranking, bind(*values)).run(*values)

        return run

    def select(self, ranking: Ranking, call: Args, stacklevel: int = 5) -> Entry:
        """The entry for a call, after what must be said of it has been said.

        `stacklevel` makes a warning point at whoever called the op function.
        """
        entry = ranking.pick(call)
        if entry is None:
            raise BackendUnavailable(str(ranking.selection(call)))
        device = ranking.device
        if ranking.falls_back(entry.backend.name):
            self._fell_back(ranking, call, stacklevel)
        elif (entry.name, str(device)) not in self._told:
            self._told.add((entry.name, str(device)))
            logger.info(
                "%s on %s: %s (%s)", self.spec.name, device, entry.name, ranking.wish.origin
            )
        return entry

    def _fell_back(self, ranking: Ranking, call: Args, stacklevel: int) -> None:
        mode = policy.fallback()
        if mode == "quiet":
            return
        selection = ranking.selection(call)
        # Those that came first, and those made for the device that have no kernel for this op.
        known, kind = registry.backends(), ranking.device.type
        made = {n for n, b in known.items() if b.automatic and kind in b.device_types}
        before = [*takewhile(lambda c: c is not selection.chosen, selection.candidates)]
        missed = [c for c in selection.candidates if c in before or c.backend in made]
        reasons = "; ".join(f"{c.name}: {', '.join(c.reasons)}" for c in missed)
        reasons = reasons or f"no backend for '{ranking.device.type}' devices is installed"
        if mode == "error":
            raise BackendUnavailable(
                f"{self.spec.name} on {ranking.device} would fall back to the reference, which "
                f"fallback=error ({policy.FALLBACK_VARIABLE} or configure) forbids\n{selection}"
            )
        key = (str(ranking.device), reasons)
        if key in self._told:
            return
        self._told.add(key)
        warnings.warn(
            f"{self.spec.name} on {ranking.device} runs on the PyTorch reference ({reasons}). "
            f"`kernelhub doctor` says what to do; {policy.FALLBACK_VARIABLE}=quiet hides this.",
            FallbackWarning,
            stacklevel=stacklevel,
        )

    def failed(self, error: BaseException, /, *args: Any, **kwargs: Any) -> None:
        """Attach the Selection to an exception that came out of an implementation."""
        if isinstance(error, BackendUnavailable) or hasattr(error, "kernelhub_selection"):
            return
        try:
            call = self.spec.bind(*args, **kwargs)
            selection = self.ranking(self.spec.device(call)).selection(call)
            error.kernelhub_selection = selection  # type: ignore[attr-defined]
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"while kernelhub ran {selection}")
        except Exception:
            logger.debug("no Selection for %r", error, exc_info=True)
