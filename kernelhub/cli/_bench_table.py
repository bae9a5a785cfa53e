"""The figures of `kernelhub bench`, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kernelhub.cli._output import say, show, table, text, titled


def print_report(report: dict[str, Any]) -> None:
    floor = "x read" if report["device"]["type"] == "cpu" else "x floor"
    numbers = ("us", "+-", "GB/s", floor, "x first")
    who = "tile" if "tiles" in report else "backend"
    rows = table("op, case", who, *numbers, numbers=numbers)
    shown = None
    for row in report["results"]:
        if row["status"] == "timed":
            this = (row["op"], row["case"])
            heading: Any = titled(*this) if this != shown else ""
            rows.add_row(heading, text(_who(row)), *map(text, _figures(row)))
            shown = this
    if shown:
        show(rows)
    _notes(report)
    for tile in report.get("tiles", ()):
        verdict = f"{tile['best']}, {tile['gain']:.1%} faster, spread {tile['spread']:.1%}"
        kept = "" if tile["tile"] else ": the one in use stays"
        say(f"{tile['op']} {tile['class']}: {verdict if tile['best'] else 'nothing timed'}{kept}")
    for problem in report["problems"]:
        say(problem, "bold red")


def _who(row: dict[str, Any]) -> str:
    return f"{row['backend']} ~" if row["note"] else str(row["backend"])


def _figures(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['us']:.2f}"
    yield f"{row['spread_us']:.2f}"
    yield f"{row['gbs']:.4g}" + ("!" if row["fault"] else "")
    yield _times(row["x_floor"])
    yield _times(row["x_first"])


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _notes(report: dict[str, Any]) -> None:
    """What the figures rest on, and all that has no figure."""
    results, roof = report["results"], report["roof"]
    ways = sorted({row["floor_way"] for row in results if row.get("floor_way")})
    if roof is not None:
        say(f"roof: read {roof['read_gbs']:.0f} GB/s, copy {roof['copy_gbs']:.0f} GB/s", "dim")
    if ways:
        what = "read" if report["device"]["type"] == "cpu" else "floor"
        say(
            f"{what}: the fastest of torch's ways to move the same bytes ({', '.join(ways)})", "dim"
        )
    eager = sorted({row["backend"] for row in results if row.get("method") == "eager"})
    if eager:
        say(f"timed without a graph, with the host's share: {', '.join(eager)}", "dim")
    notes = dict.fromkeys((r["op"], r["backend"], r["version"], r["note"]) for r in results)
    for op, backend, version, note in notes:
        if note:
            say(f"~ {op} on {backend} {version}: {note}", "dim")
    for peer in report.get("peers", ()):
        if peer["missing"]:
            say(f"peer {peer['name']}: {peer['missing']}", "dim")
    for row in results:
        if row["fault"]:
            say(f"! {row['op']} {row['case']} on {row['backend']}: {row['fault']}", "bold red")
    without: dict[tuple[str, str, str, str], list[str]] = {}
    for row in results:
        if row["status"] != "timed":
            key = (row["op"], row["backend"], row["status"], row["reason"])
            without.setdefault(key, []).append(row["case"])
    for (op, backend, status, reason), names in without.items():
        say(f"{op} on {backend} {status} ({'; '.join(names)}): {reason}")
