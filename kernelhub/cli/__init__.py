"""The command line. One file per command, imported when the command is run.

Exit codes: 0 is yes, 1 is no (what each command asks is in `docs/cli.md`), 2 is a call that cannot
be understood.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from kernelhub import __version__
from kernelhub.errors import KernelhubError, nearest

COMMANDS = {
    "ops": "List the ops, or describe one.",
    "backends": "List the backends and whether each can be used here.",
    "doctor": "Say what is here, what is missing and what to do about it.",
    "explain": "Say which backend would run a call, and why no other.",
    "check": "Hold the backends to the contracts: run every conformance case.",
    "bench": "Time the backends, beside each other and beside memory.",
    "build": "Compile a backend's kernels, for this machine or to ship.",
}
"""Each command, in the module of its name, with the line for `kernelhub --help`."""


class Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"kernelhub.cli.{cmd_name}").command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            ctx.fail(f"no command named '{args[0]}'; {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        from kernelhub.cli._output import Refused, tolerate_any_encoding

        tolerate_any_encoding()
        try:
            return super().invoke(ctx)
        except KernelhubError as error:
            raise Refused(str(error)) from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kernelhub")
def main() -> None:
    """One registry for the hot kernels of LLM inference."""
