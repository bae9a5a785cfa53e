"""`kernelhub explain`: who would run a call that is only described."""

from __future__ import annotations

import click

from kernelhub import dispatch, grammar, plugins, policy, registry
from kernelhub.cli._arguments import device_option, read_arguments
from kernelhub.cli._output import json_option, printable, stdout_reserved, write_json
from kernelhub.spec import Device


@click.command()
@click.argument("op")
@device_option
@click.option(
    "--arg", "given", multiple=True, metavar="NAME=VALUE", help="An argument; see the examples."
)
@click.option("--backend", "rules", metavar="RULES", help="A policy, as in KERNELHUB_BACKEND.")
@json_option
def command(
    op: str, device: Device, given: tuple[str, ...], rules: str | None, as_json: bool
) -> None:
    """Say which backend would run a call of OP, and why no other. Runs nothing.

    Tensors are written as dtype[shape], dtype[shape]:strides or dtype[shape]@device:

    \b
      kernelhub explain fused_gemv --device musa \\
        --arg x=bf16[1,4096] --arg weight=e4m3[12288,4096] \\
        --arg weight_scale=fp32[96,32] --arg activation=swiglu

    dtypes: bool u8 i8 i16 i32 i64 fp16 bf16 fp32 fp64 e4m3 e5m2, and torch's own names.
    Exits with 0 where a backend would run the call, with 1 where none would.
    """
    with stdout_reserved():
        spec = registry.spec(op)
        call = read_arguments(spec, given, device)
        spec.validate(call)
        wish = policy.wish(op) if rules is None else _wish(op, rules)
        ranking = dispatch.rank(spec, spec.device(call), wish)
        selection = ranking.selection(call)
        mode = policy.fallback() if ranking.falls_back(selection.backend) else None
    if as_json:
        write_json({**selection.to_dict(), "fallback": mode})
    else:
        click.echo(printable(str(selection)))
        if mode:
            click.echo(
                f"  fallback: {mode}, {_FALLBACK[mode]} ({policy.FALLBACK_VARIABLE} sets this)"
            )
    raise click.exceptions.Exit(0 if selection.chosen and mode != "error" else 1)


_FALLBACK = {
    "warn": "on this device the reference runs with a warning",
    "quiet": "on this device the reference runs without a word",
    "error": "on this device the reference is not let run: the call would raise",
}


def _wish(op: str, text: str) -> policy.Wish:
    plugins.load()
    rules = grammar.parse(text)
    rules.validate(registry.specs(), plugins.known_backends())
    choice = rules.match(op)
    return policy.wish(op) if choice is None else policy.Wish(choice, f"--backend {text}")
