"""How commands write: JSON for programs, plain tables for people, all other text kept apart."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="JSON on stdout, for programs.")


class Refused(click.ClickException):
    """A call of the command line that cannot be carried out as written."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def tolerate_any_encoding() -> None:
    """A terminal that lacks a character gets its escape instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def stdout_reserved() -> Iterator[None]:
    """What plug-ins and kernels print while a command works goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def write_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, allow_nan=False))


def need_folder(path: Path) -> None:
    """Refuse a file that could not be written, before the work that it is for."""
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise Refused(f"{path} cannot be written: its folder is missing, or not yours")


def write_file(path: Path, content: str) -> None:
    try:
        path.write_text(content)
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}") from error


def console(*, stderr: bool = False) -> Console:
    """A console that takes no text for markup: names and reasons come from plug-ins."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def followed(work: Sequence[tuple[str, T]]) -> Iterator[T]:
    """The items of the work, a bar of it on stderr where that is a terminal."""
    err = console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        console=err,
        transient=True,
        disable=not (err.is_terminal and sys.stderr.isatty()),
    ) as progress:
        task = progress.add_task("", total=len(work))
        for said, item in work:
            progress.update(task, description=said)
            yield item
            progress.advance(task)


def show(rows: Table) -> None:
    """Print a table; where no terminal reads along, without the blanks that fill up its lines."""
    out = console()
    if out.is_terminal:
        out.print(rows)
        return
    with out.capture() as captured:
        out.print(rows)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def say(line: str = "", style: str = "") -> None:
    """Print a line of prose whole; a terminal wraps it as it likes."""
    console().print(text(line, style), soft_wrap=True)


def printable(text: str) -> str:
    """The text with control characters, such as terminal escapes, spelled out."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text
    )


def text(value: object, style: str = "") -> Text:
    return Text(printable(str(value)), style=style, overflow="fold")


def table(*headings: str, numbers: tuple[str, ...] = ()) -> Table:
    """An unboxed table that wraps its cells and never cuts a name short."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        right = heading in numbers
        made.add_column(heading, justify="right" if right else "left", overflow="fold")
    return made


def facts() -> Table:
    """Rows of a name, its state and what is said of it, without headings."""
    made = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(2):
        made.add_column(overflow="fold", no_wrap=True)
    made.add_column(overflow="fold")
    return made


def titled(title: str, under: str) -> RenderableType:
    """A cell with an indented second line."""
    name = text(title, "bold")
    return Group(name, Padding(text(under), (0, 0, 0, 2))) if under else name
