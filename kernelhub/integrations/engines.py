"""What the adapters for serving engines share: who asks for which op, and calls with a way back.

KERNELHUB_ENGINE_OPS="rotary_embedding,fused_gemv"  # in the engine's environment; "*" for all

Engines load every plug-in that is installed, so an adapter does nothing without this variable.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

import kernelhub
from kernelhub import registry
from kernelhub.errors import ArgumentError, BackendUnavailable, PolicyError, nearest
from kernelhub.integrations import census as counting
from kernelhub.integrations import too_many_rows

VARIABLE = "KERNELHUB_ENGINE_OPS"
logger = logging.getLogger("kernelhub")

census = counting.Census()
"""Calls that an engine's own code ran, with the reasons; all calls where `count_all` is set."""

count_all = False
"""Whether calls that an op runs are explained and counted too, which costs time: for a look."""

_told: set[tuple[str, str, str]] = set()


def chosen(engine: str, offered: Iterable[str]) -> list[str]:
    """The ops of `offered` that the environment asks for.

    Raises `PolicyError` where it asks for an op that does not exist; says in the log which ops are
    taken, and which are asked for by name that the engine has no place for.
    """
    patterns = asked(os.environ.get(VARIABLE, ""))
    for name in set(patterns) & set(registry.specs()) - set(offered):
        logger.warning("%s has no place for %s: %s keeps its own code", engine, name, engine)
    taken = [op for op in offered if any(fnmatchcase(op, name) for name in patterns)]
    if patterns:
        logger.info("%s runs through kernelhub: %s", engine, ", ".join(taken) or "nothing")
    return taken


def asked(text: str) -> list[str]:
    """The patterns of ops in the variable's text; `PolicyError` where one matches no op."""
    known = list(registry.specs())
    patterns = [name.strip() for name in text.split(",") if name.strip()]
    for name in patterns:
        if not any(fnmatchcase(op, name) for op in known):
            raise PolicyError(f"{VARIABLE}: no op matches '{name}'; {nearest(name, known)}")
    return patterns


def run(op: str, place: str, own: Callable[[], Any], why: str, *args: Any, **kwargs: Any) -> Any:
    """Run an op, or `own()`, the engine's code: where `why` says so, or the op refuses the call.

    An op refuses before it runs anything, so nothing has been written then. What a running kernel
    raises is no refusal and goes on.
    """
    if torch.compiler.is_compiling():  # one opaque node; nothing can be counted or logged
        return own() if why else getattr(kernelhub.ops, op)(*args, **kwargs)
    function = kernelhub.op(op)
    if not why:
        try:
            if count_all:
                return counting.run((census,), op, place, *args, **kwargs)
            return function(*args, **kwargs)
        except ArgumentError as error:
            why = f"argument '{error.argument}': expected {error.expected}, got {error.got}"
            kind = f"argument '{error.argument}'"
        except BackendUnavailable:
            kind = why = counting.reasons_of(function.explain(*args, **kwargs))
    else:
        kind = why
    census.add(op, place, counting.STOCK, why)
    if (op, place, kind) not in _told:
        _told.add((op, place, kind))
        logger.warning("%s: the engine's own code runs %s (%s; said once)", op, place, why)
    return own()


def rotary(
    own: Callable[[], Any],
    why: str,
    module: Any,
    cos_sin_cache: Tensor,
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    offsets: Tensor | None = None,
) -> Any:
    """A `RotaryEmbedding` as both engines have it, which returns query and key. In place."""
    done = run(
        "rotary_embedding", "RotaryEmbedding", own, why,
        positions, query, key, module.head_size, cos_sin_cache, module.is_neox_style,
        rot_dim=module.rotary_dim, cos_sin_cache_offsets=offsets,
    )  # fmt: skip
    return (query, key) if done is None else done


def rotates_like(cls: Any, plain: Any) -> bool:
    """Whether a subclass of `RotaryEmbedding` only fills its table differently."""
    return all(getattr(cls, n) is getattr(plain, n) for n in ("forward_native", "forward_cuda"))


def linear(own: Callable[[], Any], layer: Any, x: Tensor, bias: Tensor | None) -> Any:
    """A linear layer without quantisation."""
    weight = getattr(layer, "weight", None)
    return run("fused_gemv", "linear", own, why_not_gemv(layer, x), x, weight, bias=bias)


def why_not_gemv(layer: Any, x: Any) -> str:
    """Why the engine's own code runs a product; empty where GEMV is made for it."""
    weight = getattr(layer, "weight", None)
    if torch.compiler.is_compiling():
        return "under torch.compile: the number of rows is not known"
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        return f"{type(layer).__name__} of {type(x).__name__} and {type(weight).__name__}"
    if getattr(layer, "use_intel_amx_backend", False) or not weight.numel():
        return "the engine has packed the weight"
    return too_many_rows(x)
