"""Measurements as rows of plain values: what the table prints and the JSON holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelhub.bench.runs import Floor, Measured, Run


def rows_of(measured: Measured, versions: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """One row a variant; ratios are of the medians. `versions` are those of peers, by name."""
    rows = [_row(measured, run) for run in measured.runs]
    return [{**row, "version": (versions or {}).get(row["backend"], "")} for row in rows]


def _row(measured: Measured, run: Run) -> dict[str, Any]:
    case, first = measured.case, measured.runs[0]
    row: dict[str, Any] = {
        "op": case.op,
        "case": case.name,
        "model": case.model,
        "facts": case.facts,
        "rows": case.rows,
        "scheme": case.scheme,
        "backend": run.variant,
        "status": run.status,
        "reason": run.reason,
        "fault": run.fault,
        "note": run.note,
    }
    if run.timing is None:
        return row
    return {
        **row,
        "method": run.method,
        "bytes": measured.bytes,
        "input_sets": measured.num_sets,
        "us": run.timing.us,
        "spread_us": run.timing.spread_us,
        "gbs": run.gbs,
        **_floor(measured.floor, run.timing.us),
        "x_first": None if first.timing is None else run.timing.us / first.timing.us,
    }


def _floor(floor: Floor | None, us: float) -> dict[str, Any]:
    if floor is None:
        return {"floor_us": None, "floor_way": None, "x_floor": None}
    return {
        "floor_us": floor.timing.us,
        "floor_way": floor.way,
        "x_floor": us / floor.timing.us,
    }
