"""Times the tiles of compiled kernels and picks those that beat the ones in use.

All that the benchmark knows of tiles is in `kernelhub.backends.native.tiles`, used here alone.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import attrs
import torch

from kernelhub import registry
from kernelhub.backends.native import tiles
from kernelhub.bench import runs
from kernelhub.bench.cases import Case, CaseError
from kernelhub.bench.clock import Timing, ratio
from kernelhub.bench.runs import Measured, Variant

IN_USE = "in use"
"""The variant without an override: whatever the table chooses now."""


@attrs.frozen
class Choice:
    """The cases of one shape class, what was measured of them, and the tile to use.

    `best` is the tile of the least time relative to the one in use, over all numbers of rows;
    `chosen` is empty where it does not beat that one by more than the spread of both.
    """

    op: str
    shape_class: str
    measured: tuple[Measured, ...]
    best: str
    gain: float
    spread: float

    @property
    def chosen(self) -> str:
        return self.best if self.gain > self.spread else ""


def by_class(cases: Iterable[Case]) -> dict[tuple[str, str], list[Case]]:
    """The cases that can be tuned, by op and shape class. Raises `CaseError` where none can."""
    cases = list(cases)
    found: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        (first, *others) = case.sets(torch.device("meta"), 0)[0]
        if case.op in tiles.OPS and not others:  # a layer is two calls, each with a class
            call = registry.spec(case.op).bind(**first)
            found.setdefault((case.op, tiles.classes_of(case.op, call)), []).append(case)
    if not found:
        known = ", ".join(tiles.OPS) or "none"
        named = ", ".join(dict.fromkeys(case.op for case in cases))
        raise CaseError(
            f"{named}: no single call has tiles to choose from; ops with tiles: {known}"
        )
    return found


def variants(op: str, shape_class: str, backend: str) -> list[Variant]:
    return [
        Variant(IN_USE, backend),
        *(
            Variant(tile, backend, partial(_with_tile, op, shape_class, tile))
            for tile in tiles.OPS[op]
            if tiles.fits(shape_class, tile)
        ),
    ]


def _with_tile(op: str, shape_class: str, tile: str) -> contextlib.AbstractContextManager[Any]:
    return tiles.override({op: {shape_class: tile}})


def tune(
    op: str,
    shape_class: str,
    cases: Sequence[Case],
    backend: str,
    device: torch.device,
    rounds: int = runs.ROUNDS,
    graphs: bool = True,
) -> Choice:
    """Time every tile on every case of a class, interleaved with the one in use."""
    ways = variants(op, shape_class, backend)
    measured = tuple(
        runs.measure(c, ways, device, rounds=rounds, floor=False, graphs=graphs) for c in cases
    )
    return choose(op, shape_class, measured)


def choose(op: str, shape_class: str, measured: tuple[Measured, ...]) -> Choice:
    timings = [{run.variant: run.timing for run in m.runs if run.timing} for m in measured]
    gains: dict[str, tuple[float, float]] = {}
    for tile in tiles.OPS[op]:
        if all(tile in timed and IN_USE in timed for timed in timings):
            pairs = [(timed[tile], timed[IN_USE]) for timed in timings]
            mean = statistics.geometric_mean([ratio(new, old) for new, old in pairs])
            gains[tile] = (1 - mean, max(_spread(new, old) for new, old in pairs))
    if not gains:
        return Choice(op, shape_class, measured, "", 0.0, 0.0)
    best = max(gains, key=lambda tile: gains[tile][0])
    return Choice(op, shape_class, measured, best, *gains[best])


def _spread(new: Timing, old: Timing) -> float:
    """Of both together, as a share of the time in use."""
    return (new.spread_us + old.spread_us) / old.us


def document(choices: Iterable[Choice], facts: dict[str, Any]) -> dict[str, Any]:
    """The candidate table, op to class to tile, and beside it what it rests on."""
    table: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    for choice in choices:
        if choice.chosen:
            table.setdefault(choice.op, {})[choice.shape_class] = choice.chosen
        measured.setdefault(choice.op, {})[choice.shape_class] = {
            "best": choice.best or None,
            "gain": choice.gain,
            "spread": choice.spread,
            "us": {
                m.case.name: {run.variant: run.timing.us for run in m.runs if run.timing}
                for m in choice.measured
            },
            "not_timed": {
                m.case.name: {run.variant: run.reason for run in m.runs if not run.timing}
                for m in choice.measured
                if any(not run.timing for run in m.runs)
            },
        }
    return {**table, "measured": {**facts, **measured}}
