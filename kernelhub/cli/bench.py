"""`kernelhub bench`: how fast the backends are, beside each other and beside memory."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import click
import torch

from kernelhub import plugins, provenance, registry
from kernelhub.bench import cases, peers, plot, runs, tune
from kernelhub.bench.cases import KINDS, SUITES, Case
from kernelhub.bench.models import MODELS
from kernelhub.bench.rows import rows_of
from kernelhub.bench.stream import Roof
from kernelhub.cli._arguments import absent_device, check_backends, device_option
from kernelhub.cli._bench_table import print_report
from kernelhub.cli._output import (
    Refused,
    followed,
    need_folder,
    stdout_reserved,
    write_file,
    write_json,
)
from kernelhub.errors import nearest
from kernelhub.spec import Device, DeviceDesc

SCHEMA = 1


@click.command()
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this op; may be repeated.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help=f"The layers of a model; may be repeated: {', '.join(MODELS)}.",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="N=..,K=..",
    help="A shape of the one --op given; may be repeated.",
)
@click.option(
    "--suite", type=click.Choice(list(SUITES)), help="A list of cases that matter, of all ops."
)
@click.option(
    "--rows",
    default="1,4,8,16",
    show_default=True,
    help="Rows (tokens, samples) of a call.  [suites have their own]",
)
@click.option(
    "--scheme", "schemes", help="bf16, fp8, int4, ... with commas.  [default: op's first]"
)
@click.option(
    "--backend",
    "names",
    multiple=True,
    metavar="NAME",
    help="A backend to time; may be repeated; ratios are to the first.  [default: all automatic]",
)
@device_option
@click.option("--rounds", default=runs.ROUNDS, show_default=True, type=click.IntRange(1, 1000))
@click.option("--eager", is_flag=True, help="No graphs: time the calls, with the host's share.")
@click.option(
    "--peers",
    "wanted_peers",
    default="none",
    show_default=True,
    metavar="none|all|NAME,NAME",
    help=f"Other libraries' kernels to time in turn: {', '.join(peers.NAMES)}.",
)
@click.option("--plugin", metavar="MODULE", help="Import this first: it registers a backend.")
@click.option(
    "--tune", "tuning", is_flag=True, help="Time every tile of the one --backend instead."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --tune: where the table of the best tiles goes.",
)
@click.option("--json", "json_path", metavar="FILE", help="Write the figures here; - is stdout.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png",
    help="Draw the figures: achieved bandwidth over bytes moved. Needs matplotlib.",
)
@click.option(
    "--from",
    "kept",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="With --plot: time nothing, draw what --json wrote.",
)
def command(
    ops: tuple[str, ...],
    models: tuple[str, ...],
    shapes: tuple[str, ...],
    suite: str | None,
    rows: str,
    schemes: str | None,
    names: tuple[str, ...],
    device: Device,
    rounds: int,
    eager: bool,
    wanted_peers: str,
    plugin: str | None,
    tuning: bool,
    output: Path | None,
    json_path: str | None,
    picture: Path | None,
    kept: Path | None,
) -> None:
    """Time ops on backends, interleaved in one process, beside a read of as many bytes.

    A backend that cannot run a case is listed with its reason. Exits with 1 where a run failed, a
    figure is above what memory gives, or nothing was timed. With --tune, times each tile of the
    kernels and writes a table of those that beat the ones in use.
    """
    for path in (output, picture, None if json_path in (None, "-") else Path(json_path or "")):
        if path is not None:
            need_folder(path)
    if picture is not None:
        _check_picture(picture)
    if kept is not None:
        _draw_kept(kept, picture, bool(ops or models or shapes or suite or tuning))
        return
    with stdout_reserved():
        if plugin is not None:
            _import(plugin)
        plugins.load()
        found = _cases(ops, models, shapes, suite, rows, schemes)
        names = tuple(dict.fromkeys(names)) or _automatic(device)
        check_backends(names)
        absent = absent_device(device)
        if absent:
            raise click.ClickException(absent)
        assert not isinstance(device, DeviceDesc)
        if tuning:
            if wanted_peers != "none" or picture is not None:
                raise Refused("--tune has no --peers and no --plot")
            report = _tuned(found, names, device, rounds, not eager, output)
        else:
            if output is not None:
                raise Refused(
                    "--output is where --tune puts its table; for a report there is --json"
                )
            others = _peers(wanted_peers)
            report = _timed(found, names, others, device, rounds, not eager)
    if json_path == "-":
        write_json(report)
    else:
        if json_path:
            write_file(Path(json_path), json.dumps(report, indent=1) + "\n")
        print_report(report)
    if picture is not None and any(row["status"] == "timed" for row in report["results"]):
        plot.draw(report, picture)
    raise click.exceptions.Exit(0 if report["ok"] else 1)


def _check_picture(path: Path) -> None:
    """Refuse, before the work, what could not be drawn after it."""
    if path.suffix != ".png":
        raise Refused(f"--plot {path}: expected a name that ends in .png")
    try:
        plot.need_matplotlib()
    except ImportError as error:
        raise click.ClickException(str(error)) from error


def _draw_kept(kept: Path, picture: Path | None, more: bool) -> None:
    if picture is None or more:
        raise Refused("--from draws what is kept: it needs --plot, and no cases to time")
    try:
        report = json.loads(kept.read_text())
        plot.draw(report, picture)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{kept} holds no results of bench --json: {error}") from error


def _peers(wanted: str) -> list[peers.Found]:
    try:
        return peers.find(wanted)
    except peers.AbsentPeer as error:
        raise click.ClickException(str(error)) from error


def _import(module: str) -> None:
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        importlib.import_module(module)
    except Exception as error:
        raise Refused(f"--plugin {module}: {type(error).__name__}: {error}") from error


def _cases(
    ops: tuple[str, ...],
    models: tuple[str, ...],
    shapes: tuple[str, ...],
    suite: str | None,
    rows: str,
    schemes: str | None,
) -> list[Case]:
    for op in ops:
        registry.spec(op)  # raises with the nearest name
        if op not in KINDS:
            raise Refused(f"no inputs are known for '{op}'; {nearest(op, KINDS)}")
    wanted = tuple(dict.fromkeys(ops))
    if shapes and len(wanted) != 1:
        raise Refused("--shape is a shape of one op: name it with --op")
    if suite is None and not models and not shapes:
        raise Refused("nothing to time: give --suite, --model or --shape")
    if schemes is not None and not models and not shapes:
        raise Refused("--scheme is of --model or --shape; a suite has its own")
    found = cases.suite(suite, wanted) if suite else []
    counts = [cases.read_size("--rows", part.strip()) for part in rows.split(",")]
    listed = None if schemes is None else [part.strip() for part in schemes.split(",")]
    if models or shapes:
        found += cases.collect(wanted or tuple(KINDS), models, shapes, counts, listed)
    if not found:
        raise Refused(f"{', '.join(models)} has no layer for {', '.join(wanted)}")
    for case in found:
        case.check()
    return found


def _automatic(device: Device) -> tuple[str, ...]:
    """The backends made for the device, best first, then those for every device."""
    automatic = [
        backend
        for backend in registry.backends().values()
        if backend.automatic and (not backend.device_types or device.type in backend.device_types)
    ]
    return tuple(b.name for b in sorted(automatic, key=lambda b: -b.priority))


def _timed(
    found: list[Case],
    names: tuple[str, ...],
    others: list[peers.Found],
    device: torch.device,
    rounds: int,
    graphs: bool,
) -> dict[str, Any]:
    roof = runs.measure_roof(device, rounds, graphs)
    variants = [runs.Variant(name, name) for name in names]
    results: list[dict[str, Any]] = []
    for case in followed([(case.op, case) for case in found]):
        entrants = peers.entrants(others, case.op)
        measured = runs.measure(
            case, variants, device, roof=roof, rounds=rounds, graphs=graphs, peers=entrants
        )
        results += rows_of(measured, {e.name: e.version for e in entrants})
    return {
        **_head(device, rounds),
        "roof": _roof(roof),
        "peers": [
            {"name": f.peer.name, "version": f.version, "missing": f.missing} for f in others
        ],
        **_verdict(results),
        "results": results,
    }


def _verdict(results: list[dict[str, Any]]) -> dict[str, Any]:
    failed = sum(row["status"] == "failed" for row in results)
    faulty = sum(bool(row["fault"]) for row in results)
    problems = [f"{failed} of {len(results)} runs failed"] if failed else []
    problems += [f"{faulty} of {len(results)} figures are impossible"] if faulty else []
    problems += [] if any(row["status"] == "timed" for row in results) else ["nothing was timed"]
    return {"ok": not problems, "problems": problems}


def _head(device: torch.device, rounds: int) -> dict[str, Any]:
    module = getattr(torch, device.type, None)
    name = f"cpu, {torch.get_num_threads()} threads"
    if device.type != "cpu":
        name = str(module.get_device_name(device.index or 0)) if module else device.type
    return {
        "schema": SCHEMA,
        **provenance.facts(),
        "device": {"type": device.type, "name": name},
        "rounds": rounds,
    }


def _roof(roof: Roof | None) -> dict[str, float] | None:
    return None if roof is None else {"read_gbs": roof.read / 1e9, "copy_gbs": roof.copy / 1e9}


def _tuned(
    found: list[Case],
    names: tuple[str, ...],
    device: torch.device,
    rounds: int,
    graphs: bool,
    output: Path | None,
) -> dict[str, Any]:
    if len(names) != 1 or output is None:
        raise Refused("--tune needs one --backend and --output FILE")
    groups = tune.by_class(found)
    head = {**_head(device, rounds), "backend": names[0], "arch": _arch(names[0], device)}
    choices = [
        tune.tune(op, shape_class, groups[op, shape_class], names[0], device, rounds, graphs)
        for op, shape_class in followed([(f"{op} {cls}", (op, cls)) for op, cls in groups])
    ]
    write_file(output, json.dumps(tune.document(choices, head), indent=1) + "\n")
    results = [row for choice in choices for m in choice.measured for row in rows_of(m)]
    chosen = [
        {
            "op": c.op,
            "class": c.shape_class,
            "tile": c.chosen or None,
            "best": c.best or None,
            "gain": c.gain,
            "spread": c.spread,
        }
        for c in choices
    ]
    return {**head, "roof": None, **_verdict(results), "results": results, "tiles": chosen}


def _arch(name: str, device: torch.device) -> str | None:
    kernels = registry.backends()[name].kernels
    return None if kernels is None else str(kernels.arch_of(device))
