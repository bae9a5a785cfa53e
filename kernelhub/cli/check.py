"""`kernelhub check`: holds every backend to the contracts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import attrs
import click

from kernelhub import dispatch, grammar, plugins, policy, registry
from kernelhub.cli._arguments import absent_device, check_backends, device_option
from kernelhub.cli._output import (
    followed,
    json_option,
    need_folder,
    say,
    show,
    stdout_reserved,
    table,
    text,
    titled,
    write_json,
)
from kernelhub.spec import Case, Device
from kernelhub.testing import Outcome, run_case


@attrs.define
class Pair:
    """An op on a backend, with the cases to run and, in time, what they showed."""

    op: str
    backend: str
    cases: tuple[Case, ...]
    outcomes: list[Outcome] = attrs.field(factory=list)
    seconds: float = 0.0

    def count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def held_to_nothing(self) -> bool:
        """Whether all cases of the op were here, and the backend declined every good one."""
        whole = len(self.cases) == len(tuple(registry.spec(self.op).cases()))
        tried = zip(self.cases, self.outcomes, strict=True)
        return whole and all(o.status == "declined" for case, o in tried if case.error is None)

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    @property
    def worst(self) -> Outcome | None:
        ran = [outcome for outcome in self.outcomes if outcome.status != "declined"]
        return max(ran, key=lambda outcome: outcome.fraction, default=None)

    def summary(self) -> dict[str, Any]:
        """The pair and its counts, as every report begins."""
        return {
            "op": self.op,
            "backend": self.backend,
            "cases": len(self.outcomes),
            "passed": self.count("passed"),
            "failed": self.count("failed"),
            "declined": self.count("declined"),
        }


@click.command()
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this op; may be repeated.")
@click.option(
    "--backend",
    "names",
    multiple=True,
    metavar="NAME",
    help="Only this backend; may be repeated.  [default: all automatic ones]",
)
@device_option
@click.option("--case", "glob", default="*", metavar="GLOB", help="Only cases of such names.")
@click.option("--seed", default=0, show_default=True, help="Seed of the generated numbers.")
@click.option("--verbose", is_flag=True, help="Every case, not only the failures.")
@click.option(
    "--report",
    "report_path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write a report to send in: figures and versions, nothing personal.",
)
@json_option
def command(
    ops: tuple[str, ...],
    names: tuple[str, ...],
    device: Device,
    glob: str,
    seed: int,
    verbose: bool,
    report_path: Path | None,
    as_json: bool,
) -> None:
    """Run the conformance cases of every op on every available backend.

    The backends are those that may be chosen automatically and can be used on the device, or those
    named, whatever KERNELHUB_BACKEND says. Exits with 1 where a case failed, a named backend cannot
    be used, no case ran, or a backend declines every good case of an op.
    """
    if report_path is not None:
        need_folder(report_path)
    with stdout_reserved():
        plugins.load()
        check_backends(names)
        absent = absent_device(device)
        wanted = list(dict.fromkeys(ops)) or list(registry.specs())
        found, unavailable = _backends_by_op(wanted, list(dict.fromkeys(names)), device)
        pairs = [
            Pair(
                op,
                backend,
                tuple(c for c in registry.spec(op).cases() if fnmatchcase(c.name, glob)),
            )
            for op, backends in found.items()
            for backend in (() if absent else backends)
        ]
        _run(pairs, device, seed)
        report = _to_dict(pairs, unavailable, device, seed, absent, verbose)
        if report_path is not None:
            from kernelhub.cli import _check_report

            _check_report.write(report_path, pairs, report)
    if as_json:
        write_json(report)
    else:
        _print(pairs, report, verbose)
    raise click.exceptions.Exit(0 if report["ok"] else 1)


def _backends_by_op(
    ops: list[str], names: list[str], device: Device
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The backends to check each op on; and for every named one that has none, all reasons."""
    found: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {name: [] for name in names}
    for op in ops:
        spec = registry.spec(op)
        wish = policy.Wish(grammar.Choice(tuple(names) or (grammar.AUTO,)), "check")
        ranked = dispatch.rank(spec, device, wish).ranked
        found[op] = list(dict.fromkeys(r.backend for r in ranked if r.entry and not r.reasons))
        for candidate in ranked:
            if candidate.backend in reasons and candidate.backend not in found[op]:
                reasons[candidate.backend].extend(candidate.reasons)
    checked = {backend for backends in found.values() for backend in backends}
    return found, {n: list(dict.fromkeys(r)) for n, r in reasons.items() if n not in checked}


def _run(pairs: list[Pair], device: Device, seed: int) -> None:
    work = [(f"{pair.op} on {pair.backend}", (pair, case)) for pair in pairs for case in pair.cases]
    for pair, case in followed(work):
        start = time.perf_counter()
        pair.outcomes.append(run_case(pair.op, case, pair.backend, str(device), seed))
        pair.seconds += time.perf_counter() - start


def _to_dict(
    pairs: list[Pair],
    unavailable: dict[str, list[str]],
    device: Device,
    seed: int,
    absent: str,
    verbose: bool,
) -> dict[str, Any]:
    ran = sum(pair.count("passed") + pair.count("failed") for pair in pairs)
    failed = sum(pair.count("failed") for pair in pairs)
    problems = [absent] if absent else []
    problems += [f"{failed} of {ran} cases failed"] if failed else []
    problems += [f"backend {name}: {'; '.join(why)}" for name, why in unavailable.items()]
    problems += [] if ran or absent else ["no case ran"]
    problems += [f"{p.backend} declines every case of {p.op}" for p in pairs if p.held_to_nothing]
    return {
        "ok": not problems,
        "device": str(device),
        "seed": seed,
        "problems": problems,
        "unavailable": unavailable,
        "results": [_pair_to_dict(pair, verbose) for pair in pairs],
    }


def _pair_to_dict(pair: Pair, verbose: bool) -> dict[str, Any]:
    worst = pair.worst
    found: dict[str, Any] = {
        **pair.summary(),
        "worst": None if worst is None else outcome_to_dict(worst),
        "failures": [outcome_to_dict(outcome) for outcome in pair.failures],
    }
    if verbose:
        found["outcomes"] = [outcome_to_dict(outcome) for outcome in pair.outcomes]
    return found


def outcome_to_dict(outcome: Outcome) -> dict[str, Any]:
    """The fraction is None where it is not a number of bounds: the result is simply wrong."""
    fraction = outcome.fraction if math.isfinite(outcome.fraction) else None
    return {
        "case": outcome.case,
        "status": outcome.status,
        "fraction": fraction,
        "message": outcome.message,
    }


def _print(pairs: list[Pair], report: dict[str, Any], verbose: bool) -> None:
    if pairs:
        numbers = ("cases", "passed", "failed", "declined", "worst")
        rows = table("op", "backend", *numbers, numbers=numbers)
        rows.columns[0].min_width = max(len(pair.op) for pair in pairs)
        rows.padding = (0, 1, 0, 0)  # fits 80 columns
        for pair in pairs:
            rows.add_row(*_row(pair))
        show(rows)
        say("worst: largest error as a fraction of its bound", "dim")
    for pair in pairs:
        for line in _listing(pair, verbose):
            say(line)
    if pairs:
        say()
    for problem in report["problems"]:
        say(problem, "bold red")
    if report["ok"]:
        passed = sum(result["passed"] for result in report["results"])
        cases = f"{passed} case{'s' if passed != 1 else ''}"
        say(f"{cases} passed on {report['device']}, seed {report['seed']}", "green")


def _row(pair: Pair) -> Iterator[Any]:
    worst = pair.worst
    yield titled(pair.op, worst.case if worst and worst.fraction else "")
    yield text(pair.backend)
    yield text(len(pair.outcomes))
    yield text(pair.count("passed"))
    yield text(pair.count("failed"), "bold red" if pair.failures else "")
    yield text(pair.count("declined"))
    yield text(_share(worst.fraction) if worst else "")


def _share(fraction: float) -> str:
    if not math.isfinite(fraction):
        return "wrong"
    if fraction > 1:  # what is past the bound must not read as 1.00
        fraction = math.ceil(fraction * 100) / 100
    return f"{fraction:.2f}" if fraction < 1000 else f"{fraction:.1e}"


def _listing(pair: Pair, verbose: bool) -> Iterator[str]:
    shown = pair.outcomes if verbose else pair.failures
    if not shown:
        return
    yield f"\n{pair.op} on {pair.backend}"
    for outcome in shown:
        message = outcome.message.replace("\n", "\n      ")
        said = f": {message}" if message else ""
        finite = outcome.status != "declined" and math.isfinite(outcome.fraction)
        share = f" ({_share(outcome.fraction)} times its bound)" if finite else ""
        yield f"  {outcome.status:<8}  {outcome.case}{said}{share}"
