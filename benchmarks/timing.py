"""Timing on shared machines: variants interleaved in one process, compared as ratios."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kernelhub import provenance


def interleaved(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int = 15, budget_s: float = 0.02
) -> dict[str, list[float]]:
    """Seconds per call of each variant in each round.

    In every round each variant runs in turn for about `budget_s`, so that whatever else the machine
    does hits all of them alike.
    """
    counts = {}
    for name, run in variants.items():
        run()
        start = time.perf_counter()
        run()
        once = max(time.perf_counter() - start, 1e-8)
        counts[name] = max(1, int(budget_s / once))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            count = counts[name]
            start = time.perf_counter()
            for _ in range(count):
                run()
            times[name].append((time.perf_counter() - start) / count)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of one variant's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def save(path: Path | None, results: Any) -> None:
    """Write results as JSON with the date, the machine, the versions and the commit."""
    if path is None:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    record = {
        **provenance.facts(),
        "device": device,
        "threads": torch.get_num_threads(),
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
