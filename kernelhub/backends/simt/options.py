"""How the emulator runs: one text, `KERNELHUB_SIMT="warp=128,order=random:7"`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import attrs

from kernelhub.errors import PolicyError, nearest

VARIABLE = "KERNELHUB_SIMT"
SANITIZERS = {"": "", "address": "-asan", "thread": "-tsan"}


@attrs.frozen
class Options:
    """Options of the emulator.

    Attributes:
        warp: lanes of a warp, 32 or 128.
        order: in which order the threads of a block get their turn: `forward`, `reverse` or
            `random`.
        seed: of the random order.
        threads: OS threads that run blocks; 0 is one for each core.
        timeout_s: seconds after which a kernel counts as hanging; 0 is never.
        sanitize: `address` (with undefined behaviour) or `thread`; Python itself must then be
            started with the sanitizer's runtime preloaded.
    """

    warp: int = 32
    order: str = "forward"
    seed: int = 0
    threads: int = 0
    timeout_s: float = 0.0
    sanitize: str = ""

    @property
    def arch(self) -> str:
        """The build that has these options compiled in."""
        return f"warp{self.warp}{SANITIZERS[self.sanitize]}"


def parse(text: str) -> Options:
    """Options from `name=value,...`. Raises `PolicyError` for anything else."""
    given: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in _READERS:
            raise PolicyError(f"{VARIABLE}: '{part}': {nearest(name, _READERS)}")
        try:
            given.update(_READERS[name](value))
        except ValueError:
            raise PolicyError(f"{VARIABLE}: {name}={value}: expected {_EXPECTED[name]}") from None
    return Options(**given)


def from_environment() -> Options:
    return parse(os.environ.get(VARIABLE, ""))


def _warp(value: str) -> dict[str, Any]:
    return {"warp": _one_of(int(value), (32, 128))}


def _order(value: str) -> dict[str, Any]:
    name, colon, seed = value.partition(":")
    _one_of(name, ("forward", "reverse", "random"))
    if not colon:
        return {"order": name}
    _one_of(name, ("random",))
    return {"order": name, "seed": _at_least_zero(int(seed))}


def _threads(value: str) -> dict[str, Any]:
    return {"threads": _at_least_zero(int(value))}


def _timeout(value: str) -> dict[str, Any]:
    return {"timeout_s": _at_least_zero(float(value))}


def _sanitize(value: str) -> dict[str, Any]:
    return {"sanitize": _one_of(value, ("address", "thread"))}


def _one_of(value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(value)
    return value


def _at_least_zero(value: Any) -> Any:
    if not 0 <= value < 2**31:
        raise ValueError(value)
    return value


_READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "warp": _warp,
    "order": _order,
    "threads": _threads,
    "timeout": _timeout,
    "sanitize": _sanitize,
}
_EXPECTED = {
    "warp": "32 or 128",
    "order": "forward, reverse or random:SEED",
    "threads": "a number, 0 for one a core",
    "timeout": "seconds, 0 for none",
    "sanitize": "address or thread",
}
