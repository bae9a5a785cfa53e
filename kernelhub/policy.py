"""What the user asked for: the environment, `configure`, `use`, and how they rank.

The nearest wish wins, op by op: `op.on(...)`, then the innermost `use`, then `configure`, then
`KERNELHUB_BACKEND`. All of them speak the grammar of `kernelhub.grammar`.
"""

from __future__ import annotations

import inspect
import os
import threading
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any, Literal

import attrs

from kernelhub import grammar, registry
from kernelhub.errors import PolicyError

Fallback = Literal["warn", "error", "quiet"]

BACKEND_VARIABLE = "KERNELHUB_BACKEND"
FALLBACK_VARIABLE = "KERNELHUB_FALLBACK"


@attrs.frozen
class Wish:
    """The choice that applies to an op, and where it came from."""

    choice: grammar.Choice | None
    origin: str


DEFAULT = Wish(None, "default ranking")


@attrs.define(eq=False)
class _Layer:
    """Rules and who set them.

    A `use` block marks its layer ended when it exits, so that a task that inherited the context and
    outlives the block no longer sees it.
    """

    rules: grammar.Rules
    origin: str
    thread: int = attrs.field(factory=threading.get_ident)
    ended: bool = False


_stack: ContextVar[tuple[_Layer, ...]] = ContextVar("kernelhub_use", default=())
_configured: _Layer | None = None
_configured_fallback: Fallback | None = None
_environment: tuple[_Layer | None, Fallback | None] | None = None
_open: set[_Layer] = set()  # of `use` blocks, in all threads

trace_key = ""
"""Text of the policy set last. Traced functions read it, so that a new policy compiles anew."""


def uses_active() -> bool:
    """Whether any thread is inside a `use` block (call under `registry.lock`)."""
    return bool(_open)


def _forget_other_threads() -> None:
    """A forked child has the thread that forked alone: blocks of others never end there."""
    mine = threading.get_ident()
    _open.intersection_update([layer for layer in _open if layer.thread == mine])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


def _parse(text: str) -> grammar.Rules:
    from kernelhub import plugins

    plugins.load()
    rules = grammar.parse(text)
    rules.validate(registry.specs(), plugins.known_backends())
    return rules


def _read_environment() -> tuple[_Layer | None, Fallback | None]:
    """Read once, on first need."""
    global _environment
    with registry.lock:
        if _environment is None:
            text = os.environ.get(BACKEND_VARIABLE, "").strip()
            mode = os.environ.get(FALLBACK_VARIABLE, "").strip()
            try:
                layer = _Layer(_parse(text), f"{BACKEND_VARIABLE}={text}") if text else None
                variable = FALLBACK_VARIABLE
                fallback = grammar.parse_fallback(mode) if mode else None
            except PolicyError as error:
                variable = FALLBACK_VARIABLE if error.text == mode != text else BACKEND_VARIABLE
                raise PolicyError(f"{variable}: {error}") from error
            _environment = (layer, fallback)
        return _environment


def wish(op: str) -> Wish:
    """The choice that applies to an op in this thread."""
    environment = _read_environment()[0]
    for layer in (*reversed(_alive()), _configured, environment):
        choice = layer.rules.match(op) if layer else None
        if layer and choice:
            return Wish(choice, layer.origin)
    return DEFAULT


def fallback() -> Fallback:
    """What to do when a call on an accelerator lands on the reference."""
    return _configured_fallback or _read_environment()[1] or "warn"


def configure(backend: str | None = None, *, fallback: Fallback | None = None) -> None:
    """Set the process's policy; it ranks below `use` and above the environment.

    Args:
        backend: rules such as `"reference"`, `"cuda,auto"`, `"-musa"` or
            `"fused_gemv=reference;*moe*=musa,reference"`; None returns to the environment's.
        fallback: `"warn"`, `"error"` or `"quiet"` for calls on an accelerator that land on the
            reference; None returns to the environment's, else `"warn"`.

    Raises:
        PolicyError: malformed rules or an unknown name; nothing is changed.
    """
    global _configured, _configured_fallback
    layer = None if backend is None else _Layer(_parse(backend), f'configure("{backend}")')
    mode = None if fallback is None else grammar.parse_fallback(fallback)
    with registry.lock:
        _configured, _configured_fallback = layer, mode
        _changed()


_RUN_LATER = (
    inspect.iscoroutinefunction,
    inspect.isgeneratorfunction,
    inspect.isasyncgenfunction,
)


class use(ContextDecorator):  # noqa: N801 - reads as a verb: `with kernelhub.use("reference"):`
    """Force or prefer backends inside a block, in this thread (or task) alone.

    `with kernelhub.use("reference"): ...` or as a decorator. Blocks nest; the inner one wins for
    the ops that it names. Raises `PolicyError` for malformed rules or unknown names.
    """

    def __init__(self, backend: str) -> None:
        self._rules = _parse(backend)
        self._text = backend
        self._entered: list[_Layer] = []

    def __call__(self, function: Any) -> Any:
        if any(runs_later(function) for runs_later in _RUN_LATER):  # after the block has ended
            raise PolicyError(
                f"use({self._text!r}) cannot decorate {function.__name__}, whose body runs after "
                "the call: put a `with` block into it"
            )
        return super().__call__(function)

    def _recreate_cm(self) -> use:
        return use(self._text)  # a decorated function may run in several threads at once

    def __enter__(self) -> use:
        layer = _Layer(self._rules, f'use("{self._text}")')
        with registry.lock:
            _open.add(layer)
            self._entered.append(layer)
            _stack.set((*_alive(), layer))
            _changed()
        return self

    def __exit__(self, *exc: object) -> None:
        with registry.lock:
            # One object may be entered by several threads: end the block that this context entered.
            # A generator that was moved to another context has none here; its last block ends.
            own = [layer for layer in _alive() if layer in self._entered]
            layer = own[-1] if own else self._entered[-1]
            self._entered.remove(layer)
            layer.ended = True
            _stack.set(_alive())
            _open.discard(layer)
            _changed()


def _alive() -> tuple[_Layer, ...]:
    return tuple(layer for layer in _stack.get() if not layer.ended)


def _changed() -> None:
    global trace_key
    texts = ["".join(layer.rules.text.split()) for layer in (_configured, *_alive()) if layer]
    trace_key = " | ".join(texts)
    registry.notify()
