"""Times cases on backends: every variant of a case in turn, in one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from kernelhub import registry
from kernelhub.bench import clock, stream
from kernelhub.bench.cases import Case
from kernelhub.bench.clock import Clock, Sampler, Timing
from kernelhub.bench.inputs import Calls, rotated_bytes
from kernelhub.bench.peers import Entrant, check
from kernelhub.bench.stream import Roof
from kernelhub.function import entry_for, get
from kernelhub.policy import use

ROUNDS = 15
_TOLERANCE = 1.06
"""A figure further above the roof is a fault of the measurement. The roof is of torch's own reads,
which stay 4 % below what a kernel reaches on an H200."""


@attrs.frozen
class Variant:
    """One way to run a case: a backend, under conditions that hold while it runs."""

    name: str
    backend: str
    scope: clock.Scope = contextlib.nullcontext


@attrs.frozen
class Run:
    """What one variant of one case showed.

    `status`: "timed", "declined" (the backend says that it cannot, `reason`) or "failed" (it said
    that it could). `fault` says why a time is not to be believed, `note` how a peer's work differs.
    """

    variant: str
    status: str
    reason: str = ""
    method: str = ""
    timing: Timing | None = None
    gbs: float | None = None
    fault: str = ""
    note: str = ""


@attrs.frozen
class Ready:
    """A variant that can be timed: what samples it, how, and how its work differs."""

    sampler: Sampler
    method: str
    note: str = ""


@attrs.frozen
class Floor:
    """The fastest of torch's ways to move as many bytes as the case does."""

    way: str
    timing: Timing


@attrs.frozen
class Measured:
    """A case with what each variant showed, in the order in which they were named."""

    case: Case
    bytes: int
    num_sets: int
    runs: tuple[Run, ...]
    floor: Floor | None


def measure_roof(device: torch.device, rounds: int = ROUNDS, graphs: bool = True) -> Roof | None:
    """What memory gives to large transfers; None on a CPU: its caches are part of all figures."""
    if device.type == "cpu":
        return None
    timer = clock.clock_of(device, graphs)
    size = min(stream.ROOF_BYTES, memory_limit(device) // 4)
    timings, _ = clock.interleaved(_streams(size, device, size, timer), rounds)
    timer.release()
    rates = {way: size / timing.us * 1e6 for way, timing in timings.items()}
    copy = rates.pop("copy", 0.0)
    read = max(rates.values(), default=0.0)
    return Roof(read, copy) if read or copy else None


def _streams(num_bytes: int, device: torch.device, budget: int, timer: Clock) -> dict[str, Sampler]:
    """What samples torch's ways to move bytes; a way that a device's torch lacks is left out."""
    found = {}
    for way, calls in stream.reads(num_bytes, device, budget).items():
        with contextlib.suppress(Exception):
            found[way] = timer.sampler(calls, contextlib.nullcontext)
    return found


def measure(
    case: Case,
    variants: Sequence[Variant],
    device: torch.device,
    *,
    roof: Roof | None = None,
    rounds: int = ROUNDS,
    floor: bool = True,
    graphs: bool = True,
    peers: Sequence[Entrant] = (),
) -> Measured:
    """Time one case: all variants, the peers and the floor interleaved."""
    timer = clock.clock_of(device, graphs)
    everyone: tuple[Variant | Entrant, ...] = (*variants, *peers)
    try:
        declined = _declined(case, variants, device) | _elsewhere(peers, device)
        needed, limit = case.memory_bytes(rotated_bytes(device)), memory_limit(device)
        if needed > limit:
            reason = f"needs {needed / 1e9:.2f} GB of {device}, which has {limit / 1e9:.2f} GB left"
            declined = {v.name: Run(v.name, "declined", reason) for v in everyone} | declined
        if len(declined) == len(everyone):  # nobody needs the inputs
            return Measured(case, 0, 0, tuple(declined[v.name] for v in everyone), None)
        with torch.no_grad():
            return _measure(case, everyone, declined, device, timer, roof, rounds, floor)
    except Exception as error:  # no inputs, or a device that an earlier kernel broke
        reason = f"{type(error).__name__}: {error}"
        failed = tuple(Run(v.name, "failed", reason) for v in everyone)
        return Measured(case, 0, 0, failed, None)
    finally:
        timer.release()


def _declined(case: Case, variants: Sequence[Variant], device: torch.device) -> dict[str, Run]:
    """The variants whose backend says that it cannot run the case."""
    found = {}
    for variant in variants:
        for call in case.described(device):
            if _entry(case.op, variant.backend, call) is None:
                reason = why_not(case.op, variant.backend, call)
                found[variant.name] = Run(variant.name, "declined", reason)
                break
    return found


def _elsewhere(peers: Sequence[Entrant], device: torch.device) -> dict[str, Run]:
    return {
        p.name: Run(p.name, "declined", f"runs on {', '.join(p.devices)}")
        for p in peers
        if p.devices and device.type not in p.devices
    }


def _entry(op: str, backend: str, call: dict[str, Any]) -> registry.Entry | None:
    return entry_for(op, backend, registry.spec(op).bind(**call))


def _measure(
    case: Case,
    variants: Sequence[Variant | Entrant],
    declined: dict[str, Run],
    device: torch.device,
    timer: Clock,
    roof: Roof | None,
    rounds: int,
    floor: bool,
) -> Measured:
    budget = rotated_bytes(device)
    sets = case.sets(device, budget)
    num_bytes = sum(map(case.cost, sets)) // len(sets)
    prepared: dict[str, Run | Ready] = {}
    for variant in variants:
        prepared[variant.name] = declined.get(variant.name) or (
            _prepare(case, variant, sets, timer)
            if isinstance(variant, Variant)
            else _prepare_peer(case, variant, sets, timer)
        )
    samplers = {f"variant {n}": p.sampler for n, p in prepared.items() if isinstance(p, Ready)}
    if floor and samplers:
        ways = _streams(num_bytes, device, budget, timer)
        samplers.update({f"floor {way}": sampler for way, sampler in ways.items()})
    timings, failures = clock.interleaved(samplers, rounds)
    runs = []
    for name, found in prepared.items():
        if isinstance(found, Run):
            runs.append(found)
        elif f"variant {name}" in failures:
            runs.append(Run(name, "failed", failures[f"variant {name}"]))
        else:
            run = _judged(name, found.method, timings[f"variant {name}"], num_bytes, roof)
            runs.append(attrs.evolve(run, note=found.note))
    floors = [
        Floor(n.removeprefix("floor "), t) for n, t in timings.items() if n.startswith("floor ")
    ]
    best = min(floors, key=lambda found: found.timing.us, default=None)
    return Measured(case, num_bytes, len(sets), tuple(runs), best)


def _prepare(case: Case, variant: Variant, sets: list[Calls], timer: Clock) -> Run | Ready:
    """What samples a variant and how, or why it cannot be timed."""
    name, backend = variant.name, variant.backend
    entries = [_entry(case.op, backend, call) for call in sets[0]]
    graph_safe = all(entry.implementation.traits.graph_safe for entry in entries if entry)
    function = get(case.op).on(backend)
    try:
        with variant.scope():
            wrong = _not_finite(function, sets[0])
        if wrong:
            return Run(name, "failed", wrong)
        calls = [_together(function, calls) for calls in sets]
        sampler = timer.sampler(calls, variant.scope, graph_safe)
    except Exception as error:  # a kernel's, a build's or of memory: the others go on
        return Run(name, "failed", f"{type(error).__name__}: {error}")
    return Ready(sampler, timer.method(graph_safe))


def _prepare_peer(case: Case, entrant: Entrant, sets: list[Calls], timer: Clock) -> Run | Ready:
    """The same for a peer, which must also give what the reference gives."""
    name = entrant.name
    try:
        offer = entrant.kernel.prepare(case, sets)
        if isinstance(offer, str):
            return Run(name, "declined", offer)
        wanted = check.expected(case.op, sets[0])  # before the call: it may write to its inputs
        wrong = check.fault(case.op, wanted, offer.calls[0](), offer.allowed)
        if wrong:
            return Run(name, "failed", f"fault: {wrong}")
        sampler = timer.sampler(offer.calls, contextlib.nullcontext, offer.graph_safe)
    except torch.OutOfMemoryError:
        return Run(name, "declined", "its own copies of the inputs do not fit beside these")
    except Exception as error:  # of a library: the others go on
        return Run(name, "failed", f"{type(error).__name__}: {error}")
    return Ready(sampler, timer.method(offer.graph_safe), offer.note)


def why_not(op: str, backend: str, call: dict[str, Any]) -> str:
    """Every reason why a backend does not run a call."""
    with use(backend):
        candidates = get(op).explain(**call).candidates
    reasons = [r for c in candidates if c.backend == backend for r in c.reasons]
    return "; ".join(dict.fromkeys(reasons)) or "declined"


def _together(function: Callable[..., Any], calls: Calls) -> clock.Call:
    if len(calls) == 1:
        (only,) = calls
        return lambda: function(**only)

    def run() -> None:
        for call in calls:
            function(**call)

    return run


def _not_finite(function: Callable[..., Any], calls: Calls) -> str:
    """Run a set once and look at what it wrote; a time of nonsense would mean nothing."""
    for call in calls:
        returned = function(**call)
        for value in (returned, call.get("query"), call.get("key")):
            if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                return "its result is not finite"
    return ""


def _judged(name: str, method: str, timing: Timing, num_bytes: int, roof: Roof | None) -> Run:
    rate = num_bytes / timing.us * 1e6  # bytes a second
    fault = ""
    if roof is not None and rate > roof.most * _TOLERANCE:
        fault = (
            f"{rate / 1e9:.0f} GB/s is above the roof of {roof.most / 1e9:.0f} GB/s: the "
            "measurement is wrong, or the bytes came from a cache"
        )
    return Run(name, "timed", method=method, timing=timing, gbs=rate / 1e9, fault=fault)


def memory_limit(device: torch.device) -> int:
    """Bytes that inputs may take: most of what is free on a device, half of a host's memory."""
    if device.type != "cpu":
        ask = getattr(getattr(torch, device.type), "mem_get_info", None)
        # Where nobody tells, an allocation that fails does.
        return 2**62 if ask is None else int(ask(device.index or 0)[0] * 0.9)
    return min(_host_memory()) // 2


def _host_memory() -> Iterator[int]:
    yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        yield int(Path("/sys/fs/cgroup/memory.max").read_text())
