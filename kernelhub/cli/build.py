"""`kernelhub build`: compile a backend's library, for the cache or to ship."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from kernelhub import doctor, plugins, registry
from kernelhub.backends.native import build, cache
from kernelhub.backends.native import platform as platforms
from kernelhub.backends.native.platform import Platform
from kernelhub.cli._output import (
    Refused,
    json_option,
    printable,
    say,
    stdout_reserved,
    write_json,
)
from kernelhub.errors import BuildError, nearest


@click.command()
@click.argument("name", metavar="BACKEND")
@click.option(
    "--arch",
    "archs",
    multiple=True,
    help="An architecture, such as sm_90a, mp_31 or warp32; may be repeated. By default those of "
    "the devices here, else the platform's first (sm_90a, mp_31, warp32).",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Put libraries to ship into this folder; KERNELHUB_LIBRARY_PATH names it where they run.",
)
@click.option("--force", is_flag=True, help="Compile even what the cache has.")
@json_option
def command(
    name: str, archs: tuple[str, ...], output: Path | None, force: bool, as_json: bool
) -> None:
    """Compile the library of BACKEND: cuda, musa, simt or a plug-in's; the first use does it too.

    The BACKEND `binding` is the small extension that makes calls of all of them faster; it is built
    for this Python. Exits with 1 where a library could not be built.
    """
    with stdout_reserved():
        plugins.load()
        platform, kernels = _platform(name)
        chosen = tuple(dict.fromkeys(archs)) or _present(kernels) or platform.archs[:1]
        for arch in chosen:
            if not platform.accepts(arch):
                hint = nearest(arch, platform.archs)
                raise Refused(f"{name} has no architecture named '{arch}'; {hint}")
        with _told_on_stderr():
            made = [_build(platform, arch, output, force) for arch in chosen]
    problems = [library["problem"] for library in made if library["problem"]]
    if as_json:
        write_json({"ok": not problems, "backend": name, "libraries": made})
    else:
        _print(name, made)
    raise click.exceptions.Exit(1 if problems else 0)


def _platform(name: str) -> tuple[Platform, Any]:
    """What `kernelhub build` compiles under a name, and the kernels of the backend behind it."""
    compiled = {
        backend.name: backend.kernels
        for backend in registry.backends().values()
        if isinstance(getattr(backend.kernels, "platform", None), Platform)
    }
    if name == platforms.BINDING.name:
        return platforms.BINDING, None
    if name not in compiled:
        known = [*compiled, platforms.BINDING.name]
        what = "is not compiled" if name in registry.backends() else "is no backend"
        raise Refused(f"'{name}' {what}; {nearest(name, known)}")
    return compiled[name].platform, compiled[name]


def _present(kernels: Any) -> tuple[str, ...]:
    """The architectures of the devices here."""
    if kernels is None:
        return ()
    found = []
    for device in doctor.devices():
        if device.usable and device.type == kernels.device_type:
            try:
                found.append(kernels.arch_of(torch.device(device.name)))
            except Exception as error:  # a driver's, or of malformed options
                raise Refused(f"{device.name}: {error}; name its architecture: --arch") from error
    return tuple(dict.fromkeys(found))


@contextlib.contextmanager
def _told_on_stderr() -> Iterator[None]:
    """Where no terminal shows progress, the log does."""
    logger = logging.getLogger("kernelhub")
    handler, before = logging.StreamHandler(), logger.level
    handler.setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
    handler.setFormatter(logging.Formatter("kernelhub: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _build(platform: Platform, arch: str, output: Path | None, force: bool) -> dict[str, Any]:
    started = time.monotonic()
    path, manifest, problem = None, {}, ""
    try:
        path = build.build(platform, arch, output, force=force)
        beside = cache.MANIFEST if output is None else path.with_suffix(".json").name
        manifest = cache.read_manifest(path.with_name(beside))
    except BuildError as error:
        problem = str(error)
    return {
        "arch": arch,
        "path": None if path is None else str(path),
        "problem": problem,
        "seconds": round(time.monotonic() - started, 3),
        "manifest": manifest,
    }


def _print(name: str, made: list[dict[str, Any]]) -> None:
    for library in made:
        if library["problem"]:
            click.echo(printable(library["problem"]), err=True)
        else:
            say(f"{name} {library['arch']}  {library['path']}")
