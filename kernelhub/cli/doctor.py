"""`kernelhub doctor`: what is here, what is missing, what to do."""

from __future__ import annotations

import click

from kernelhub.cli._output import facts, json_option, say, show, stdout_reserved, text, write_json
from kernelhub.doctor import BackendReport, Report, examine

_STYLES = {"usable": "green", "failed": "bold red", "malformed": "bold red"}


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Say what is here, what is missing and what to do about it.

    Exits with 1 where something is wrong: a plug-in that failed, a malformed variable.
    """
    with stdout_reserved():
        report = examine()
    if as_json:
        write_json(report.to_dict())
    else:
        _print(report)
    raise click.exceptions.Exit(1 if report.problems else 0)


def _print(report: Report) -> None:
    rows = facts()

    def row(name: str, state: str, *said: str) -> None:
        """The name and state stand on the first line of what is said."""
        style = _STYLES.get(state, "")
        rows.add_row(text(f"  {name}"), text(state, style), text("\n".join(filter(None, said))))

    rows.add_row(text("versions", "bold"))
    for name, version in report.versions.items():
        row(name, "", version)
    rows.add_row(text("devices", "bold"))
    for device in report.devices:
        row(device.name, "usable" if device.usable else "absent", device.detail)
    rows.add_row(text("environment", "bold"))
    for variable in report.environment:
        state = "malformed" if variable.fault else "ignored" if variable.note else "set"
        row(variable.name, state, variable.value, variable.fault, variable.note)
    if not report.environment:
        row("none", "", "no KERNELHUB_ variable is set")
    rows.add_row(text("compilers", "bold"))
    for compiler in report.compilers:
        state = "missing" if compiler.missing else "usable"
        row(compiler.name, state, f"{compiler.version} {compiler.path}".strip(), compiler.missing)
    rows.add_row(text("libraries", "bold"))
    row("cache", "unusable" if report.cache.fault else "", report.cache.path, report.cache.fault)
    if report.binding.missing:
        slower = "calls of compiled kernels go through ctypes, which takes longer:"
        row("binding", "missing", slower, *report.binding.missing)
    for library in report.libraries:
        state = "unfit" if library.fault else library.origin
        made = f" with {library.compiler}" if library.compiler else ""
        row(library.platform, state, f"{library.arch}{made}: {library.path}", library.fault)
    rows.add_row(text("backends", "bold"))
    for backend in report.backends:
        row(backend.name, backend.state, *_said(backend, len(report.ops)))
    show(rows)
    say()
    _print_problems(report)


def _said(backend: BackendReport, num_ops: int) -> list[str]:
    there = []
    if backend.distribution:
        there.append(f"from {backend.distribution}")
    if backend.state in ("usable", "unusable"):
        there.append(f"{len(backend.ops)} of {num_ops} ops")
        there.append(f"devices: {', '.join(backend.device_types) or 'any'}")
    lines = ["; ".join(there)]
    lines += [f"missing: {reason}" for reason in backend.missing]
    lines += [f"to do: {advice}" for advice in backend.advice]
    return lines


def _print_problems(report: Report) -> None:
    if not report.problems:
        say("nothing is wrong", "green")
        return
    count = len(report.problems)
    say(f"{count} problem{'s' if count > 1 else ''}", "bold red")
    for problem in report.problems:
        say("  " + problem.replace("\n", "\n  "))
    if any(backend.details for backend in report.backends):
        say("tracebacks: kernelhub doctor --json")
