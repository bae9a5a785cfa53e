"""`kernelhub ops`: the ops, or all about one."""

from __future__ import annotations

import inspect
from typing import Any

import click
import torch

from kernelhub import compile as torch_ops
from kernelhub import plugins, registry
from kernelhub.cli._arguments import short_name
from kernelhub.cli._output import (
    json_option,
    say,
    show,
    stdout_reserved,
    table,
    text,
    titled,
    write_json,
)
from kernelhub.function import get
from kernelhub.spec import OpSpec, Param

_ANY_RANK = range(0, 65)


@click.command()
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the ops, or describe the op NAME: its docstring, parameters and torch schema."""
    with stdout_reserved():
        plugins.load()  # a plug-in may bring ops of its own
        specs = registry.specs() if name is None else {name: registry.spec(name)}
        found = {op: to_dict(spec) for op, spec in specs.items()}
    if as_json:
        write_json({"ops": list(found.values())} if name is None else found[name])
    elif name is None:
        _print_all(list(found.values()))
    else:
        _print_one(specs[name], found[name])


def to_dict(spec: OpSpec) -> dict[str, Any]:
    doc = inspect.cleandoc(spec.prototype.__doc__ or "")
    return {
        "name": spec.name,
        "version": spec.version,
        "summary": " ".join(doc.split("\n\n")[0].split()),
        "signature": _signature(spec),
        "schema": f"{torch_ops.NAMESPACE}::{spec.name}{torch_ops.schema(spec)}",
        "backends": list(get(spec.name).backends()),
        "differentiable": spec.differentiable,
        "params": [_param_to_dict(spec, param) for param in spec.params],
        "doc": doc,
    }


def _signature(spec: OpSpec) -> str:
    """The signature without annotations: the table of parameters says more."""
    plain = spec.signature.replace(
        parameters=[p.replace(annotation=p.empty) for p in spec.signature.parameters.values()],
        return_annotation=spec.signature.empty,
    )
    return f"{spec.name}{plain}"


def _param_to_dict(spec: OpSpec, param: Param) -> dict[str, Any]:
    formal = spec.signature.parameters[param.name]
    return {
        "name": param.name,
        "role": param.role,
        "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in param.dtypes),
        "ranks": _ranks(param),
        "shape": param.shape,
        "types": [kind.__name__ for kind in param.types],
        "choices": [_plain(choice) for choice in param.choices],
        "optional": param.optional,
        "fixed": param.fixed,
        "required": formal.default is formal.empty,
        "default": None if formal.default is formal.empty else _plain(formal.default),
    }


def _ranks(param: Param) -> list[int] | None:
    """The least and the largest number of dimensions; None where no tensor is allowed."""
    return [param.ranks.start, param.ranks.stop - 1] if param.is_tensor else None


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return str(value).removeprefix("torch.")


def _print_all(ops: list[dict[str, Any]]) -> None:
    rows = table("op", "backends", "summary")
    rows.columns[0].min_width = max((len(op["name"]) for op in ops), default=0)
    for op in ops:
        required = [p["name"] for p in op["params"] if p["required"]]
        rest = ["..."] if len(required) < len(op["params"]) else []
        call = titled(op["name"], f"({', '.join(required + rest)})")
        rows.add_row(call, text("\n".join(op["backends"])), text(op["summary"]))
    show(rows)


def _print_one(spec: OpSpec, op: dict[str, Any]) -> None:
    say(op["signature"], "bold")
    say(f"\n{op['doc']}\n")
    rows = table("parameter", "role", "accepts", "rank", "shape", "default")
    for param in spec.params:
        described = next(p for p in op["params"] if p["name"] == param.name)
        rows.add_row(
            text(param.name),
            text(f"{param.role}, fixed" if param.fixed else param.role),
            text(_accepts(param)),
            text(_rank_text(param)),
            text(param.shape),
            text("required" if described["required"] else described["default"]),
        )
    show(rows)
    say()
    say(f"torch schema  {op['schema']}")
    say(f"backends      {', '.join(op['backends'])}")


def _accepts(param: Param) -> str:
    kinds = sorted(short_name(dtype) for dtype in param.dtypes)
    if param.choices:
        kinds += [_choice(choice) for choice in param.choices]
    else:
        kinds += [kind.__name__ for kind in param.types]
    return " ".join(kinds + ["None"] * param.optional)


def _choice(value: Any) -> str:
    return short_name(value) if isinstance(value, torch.dtype) else repr(value)


def _rank_text(param: Param) -> str:
    if not param.is_tensor:
        return ""
    if param.ranks == _ANY_RANK:
        return "any"
    first, last = param.ranks.start, param.ranks.stop - 1
    if first == last:
        return str(first)
    return f"{first}+" if last == _ANY_RANK.stop - 1 else f"{first} to {last}"
