"""Reads arguments of ops from the command line: `x=bf16[1,4096]`, `activation=swiglu`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import click
import torch

from kernelhub import plugins, registry
from kernelhub.cli._output import Refused
from kernelhub.errors import UnknownName, nearest
from kernelhub.spec import Args, Device, DeviceDesc, OpSpec, Param, TensorDesc, parse_device

SHORT_NAMES = {
    torch.bool: "bool",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
}

_TENSOR = re.compile(
    r"(?P<dtype>\w+)\s*\[(?P<shape>[^]]*)\]\s*(:(?P<strides>[^@]*))?(@(?P<device>.*))?"
)
_HOW = "write a tensor as bf16[4,8], with strides as bf16[4,8]:1,4"


def short_name(dtype: torch.dtype) -> str:
    return SHORT_NAMES.get(dtype) or str(dtype).removeprefix("torch.")


def read_dtype(name: str) -> torch.dtype:
    """Raises `ValueError`, with the nearest name, where torch has no such dtype."""
    own = {short: dtype for dtype, short in SHORT_NAMES.items()}
    found = own.get(name) or getattr(torch, name, None)
    if isinstance(found, torch.dtype):
        return found
    raise ValueError(f"no dtype named '{name}'; {nearest(name, [*own, 'half', 'bfloat16'])}")


def read_device(name: str) -> Device:
    """A device that torch, kernelhub or a backend knows; an accelerator without index is its first.

    Raises `ValueError` for any other.
    """
    device = parse_device(name)
    if isinstance(device, DeviceDesc):
        plugins.load()
        served = {kind for b in registry.backends().values() for kind in b.device_types}
        known = {"cpu", "cuda", "meta", "musa", *served}
        if device.type not in known:
            raise ValueError(f"no device type '{device.type}'; {nearest(device.type, known)}")
    if device.index is None and device.type not in ("cpu", "meta"):
        return parse_device(f"{device.type}:0")  # what a tensor's device says
    return device


def device_callback(ctx: click.Context, param: click.Parameter, value: str) -> Device:
    try:
        return read_device(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    callback=device_callback,
    help="Where the tensors are: cpu, cuda:0, musa, ...",
)


def check_backends(names: Iterable[str]) -> None:
    """Raise `UnknownName` for a backend that nobody knows."""
    known = set(plugins.known_backends())
    for name in names:
        if name not in known:
            raise UnknownName(f"no backend named '{name}'; {nearest(name, known)}")


def absent_device(device: Device) -> str:
    """Why torch cannot hold tensors on the device here; empty where it can."""
    if device.type == "meta":
        raise Refused("meta tensors hold no numbers to check")
    if isinstance(device, DeviceDesc):
        return f"torch has no '{device.type}' devices here: see `kernelhub doctor`"
    try:
        torch.empty(1, device=str(device))
    except Exception as error:
        return f"torch cannot use {device} here: {str(error).splitlines()[0]}"
    return ""


def read_arguments(spec: OpSpec, given: Iterable[str], device: Device) -> Args:
    """The arguments of a call, from `name=value` texts. Raises `click.UsageError`."""
    values: dict[str, Any] = {}
    names = list(spec.signature.parameters)
    for argument in given:
        name, equals, value = (part.strip() for part in argument.partition("="))
        if not equals:
            raise click.UsageError(f"--arg '{argument}': expected name=value")
        if name not in names:
            raise click.UsageError(f"{spec.name} has no argument '{name}'; {nearest(name, names)}")
        if name in values:
            raise click.UsageError(f"--arg {name} is given twice")
        try:
            values[name] = _value(spec.param(name), value, device)
        except ValueError as error:
            raise click.UsageError(f"--arg {name}={value}: {error}") from error
    required = [p for p in spec.signature.parameters.values() if p.default is p.empty]
    missing = [spec.param(p.name) for p in required if p.name not in values]
    if missing:
        lines = [f"\n  --arg {p.name}=...  {p.expected()}" for p in missing]
        how = f"\n{_HOW}" if any(p.is_tensor for p in missing) else ""
        raise click.UsageError(f"{spec.name} also needs{''.join(lines)}{how}")
    return spec.bind(**values)


def _value(param: Param, value: str, device: Device) -> Any:
    if value.lower() == "none" and param.optional:
        return None
    if param.is_tensor and "[" in value:
        return _tensor(value, device)
    for kind in param.types:
        try:
            return _plain(kind, value)
        except ValueError as error:
            if kind is torch.dtype:
                raise ValueError(f"{error}; expected {_expected(param)}") from None
    raise ValueError(f"expected {_expected(param)}")


def _expected(param: Param) -> str:
    if torch.Generator in param.types:
        return "nothing: a Generator cannot be described here, leave it out"
    return param.expected() + (f" ({_HOW})" if param.is_tensor else "")


def _plain(kind: type, value: str) -> Any:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    if kind in (int, float, str):
        return kind(value)
    if kind is torch.dtype:
        return read_dtype(value)
    raise ValueError(f"a {kind.__name__} cannot be written here")


def _tensor(value: str, device: Device) -> TensorDesc:
    match = _TENSOR.fullmatch(value)
    if match is None:
        raise ValueError(f"not a tensor; {_HOW}")
    dtype = read_dtype(match["dtype"])
    shape = _sizes(match["shape"], "size")
    strides = None if match["strides"] is None else _sizes(match["strides"], "stride")
    if strides is not None and len(strides) != len(shape):
        raise ValueError(f"expected {len(shape)} strides, one for each size, got {len(strides)}")
    at = device if match["device"] is None else read_device(match["device"].strip())
    return TensorDesc(shape, dtype, at, strides)


def _sizes(value: str, what: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",")] if value.strip() else []
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise ValueError(f"'{part}' is not a {what}; {_HOW}")
    return tuple(int(part) for part in parts)
