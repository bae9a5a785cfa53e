"""Which op ran how often, where in the model, on which backend, and why there."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

import attrs
from torch.compiler import is_compiling

import kernelhub
from kernelhub.selection import Selection

STOCK = "stock"


@attrs.frozen
class Row:
    """Calls that were alike. `backend` is "stock" where the model's own code ran instead."""

    op: str
    place: str
    backend: str
    why: str
    count: int


class Census:
    """Counts the calls of ops; one may serve several models, samplers and threads.

    `accelerate(model, census=census)` and `Sampler(..., census=census)` fill it; the adapters for
    serving engines have one of theirs. Each counted call is explained (`op.explain`), which costs
    more than a small call itself: count or time, not both.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str, str, str]] = Counter()

    def add(self, op: str, place: str, backend: str, why: str) -> None:
        """Count one call."""
        with self._lock:
            self._counts[op, place, backend, why] += 1

    @property
    def rows(self) -> tuple[Row, ...]:
        """What has been counted, by op, place and backend."""
        with self._lock:
            counts = sorted(self._counts.items())
        return tuple(Row(*key, count) for key, count in counts)

    def count(self, op: str, backend: str | None = None) -> int:
        """Calls of an op, on one backend or on all but "stock"."""
        if backend is None:
            return sum(r.count for r in self.rows if r.op == op and r.backend != STOCK)
        return sum(r.count for r in self.rows if (r.op, r.backend) == (op, backend))

    def __str__(self) -> str:
        cells = [(r.op, r.place, r.backend, str(r.count), r.why) for r in self.rows]
        titles = ("op", "place", "backend", "calls", "why")
        widths = [max(len(row[i]) for row in [titles, *cells]) for i in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True))
            for row in [titles, *cells]
        )


def run(censuses: Iterable[Census], op: str, place: str, *args: Any, **kwargs: Any) -> Any:
    """Call an op, and count the call where somebody counts; torch.compile counts none."""
    function = kernelhub.op(op)
    for census in () if is_compiling() else censuses:
        selection = function.explain(*args, **kwargs)
        census.add(op, place, selection.backend or "none", reasons_of(selection))
    return function(*args, **kwargs)


def ran_stock(censuses: Iterable[Census], op: str, place: str, why: str) -> None:
    """Count a call that the model's own code made instead of the op."""
    for census in () if is_compiling() else censuses:
        census.add(op, place, STOCK, why)


def reasons_of(selection: Selection) -> str:
    """The policy, and what kept those that stand before the chosen one."""
    reasons = [selection.origin]
    for candidate in selection.candidates:
        if candidate is selection.chosen:
            break
        reasons.append(f"{candidate.name}: {', '.join(candidate.reasons)}")
    return "; ".join(reasons)
