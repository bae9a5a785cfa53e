"""`kernelhub backends`: every backend and whether it can be used here."""

from __future__ import annotations

import click

from kernelhub import doctor, plugins, registry
from kernelhub.cli._output import json_option, say, show, stdout_reserved, table, text, write_json


@click.command()
@json_option
def command(as_json: bool) -> None:
    """List the backends: where from, for which devices and ops, and whether usable here."""
    with stdout_reserved():
        plugins.load()
        seen = doctor.devices()
        found = [doctor.describe(backend, seen) for backend in registry.backends().values()]
        problems = plugins.problems()
    if as_json:
        write_json({"backends": [_to_dict(b) for b in found], "failed": _failures(problems)})
        return
    _print(found, problems)


def _to_dict(backend: doctor.BackendReport) -> dict[str, object]:
    return {
        "name": backend.name,
        "distribution": backend.distribution,
        "description": backend.description,
        "device_types": list(backend.device_types),
        "priority": backend.priority,
        "automatic": backend.automatic,
        "available": backend.state == "usable",
        "reasons": list(backend.missing),
        "ops": list(backend.ops),
    }


def _failures(problems: tuple[plugins.Problem, ...]) -> list[dict[str, str]]:
    return [
        {"name": p.name, "distribution": p.distribution, "reason": p.reason, "details": p.details}
        for p in problems
    ]


def _print(found: list[doctor.BackendReport], problems: tuple[plugins.Problem, ...]) -> None:
    total = len(registry.specs())
    rows = table("backend", "from", "devices", "priority", "automatic", "available", "ops")
    for backend in found:
        available = backend.state == "usable"
        rows.add_row(
            text(backend.name, "bold"),
            text(backend.distribution),
            text(", ".join(backend.device_types) or "any"),
            text(backend.priority),
            text("yes" if backend.automatic else "no"),
            text("yes" if available else "no", "green" if available else "red"),
            text(f"{len(backend.ops)} of {total}"),
        )
    show(rows)
    for backend in found:
        say()
        about = f": {backend.description}" if backend.description else ""
        say(f"{backend.name}{about}")
        say(f"  ops: {', '.join(backend.ops) or 'none'}")
        for reason in backend.missing:
            say(f"  missing: {reason}")
    for problem in problems:
        say()
        name = "unreadable metadata" if problem.name == "?" else problem.name
        say(f"{name} ({problem.distribution}) failed: {problem.reason}", "red")
