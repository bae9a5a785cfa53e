"""A picture of figures: achieved bandwidth over bytes moved, the roof and the floor as lines."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

_MARKERS = "osD^vP*Xh<>pd8"
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def need_matplotlib() -> None:
    """Raise `ImportError` that says what to do."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            f"--plot needs matplotlib: pip install 'kernelhub[plot]' ({error})"
        ) from error


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture of a report. Raises `ValueError` where nothing in it was timed."""
    rows = [row for row in report["results"] if row["status"] == "timed"]
    if not rows:
        raise ValueError("nothing was timed")
    matplotlib: Any = importlib.import_module("matplotlib.figure")
    lines: Any = importlib.import_module("matplotlib.lines")
    figure = matplotlib.Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", xlabel="bytes moved", ylabel="GB/s", title=report["device"]["name"])

    kinds = dict(zip(_distinct(rows, "op", "scheme"), itertools.cycle(_MARKERS)))
    runners = dict(zip(_distinct(rows, "backend"), itertools.cycle(_COLOURS)))
    for row in rows:
        marker, colour = kinds[row["op"], row["scheme"]], runners[(row["backend"],)]
        hollow = "none" if row.get("note") or row["fault"] else colour
        axes.plot(row["bytes"], row["gbs"], marker, color=colour, markerfacecolor=hollow, alpha=0.8)
    _bounds(axes, report, rows)
    axes.set_ylim(bottom=0)
    grey = {"color": "grey", "linestyle": "none"}
    keys = [
        lines.Line2D([], [], marker=m, label=" ".join(kind), **grey) for kind, m in kinds.items()
    ]
    keys += [lines.Line2D([], [], color=c, label=who) for (who,), c in runners.items()]
    keys += axes.get_legend_handles_labels()[0]
    figure.legend(handles=keys, loc="outside right upper", fontsize="small")
    figure.savefig(path)


def _distinct(rows: list[dict[str, Any]], *names: str) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def _bounds(axes: Any, report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The roof is one bandwidth; the floor is what the fastest plain read of as many bytes has."""
    if report["roof"] is not None:
        axes.axhline(max(report["roof"].values()), color="black", label="roof")
    floors = {row["bytes"]: row["bytes"] / row["floor_us"] / 1e3 for row in rows if row["floor_us"]}
    if floors:
        sizes = sorted(floors)
        rates = [floors[size] for size in sizes]
        axes.plot(sizes, rates, color="black", linestyle="--", linewidth=1, label="floor")
