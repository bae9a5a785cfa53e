"""Every exception and warning that kernelhub raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class KernelhubError(Exception):
    """Parent of every error that kernelhub raises on purpose."""


class ArgumentError(KernelhubError, ValueError):
    """A call's argument breaks the contract of its op.

    Attributes name the op, the argument, what the contract asks for, and what came.
    """

    def __init__(self, op: str, argument: str, expected: str, got: Any) -> None:
        self.op = op
        self.argument = argument
        self.expected = expected
        self.got = got if isinstance(got, str) else describe(got)
        super().__init__(f"{op}: argument '{argument}': expected {expected}, got {self.got}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.op, self.argument, self.expected, self.got)


class BackendUnavailable(KernelhubError, RuntimeError):
    """No backend that the policy allows can run this call. The message lists every reason."""


class BuildError(KernelhubError, RuntimeError):
    """No library of compiled kernels can be found, built or loaded. The message says what to do."""


class KernelError(KernelhubError, RuntimeError):
    """A compiled kernel refused a call or could not be launched."""


class PolicyError(KernelhubError, ValueError):
    """Malformed policy text, or a name in it that does not exist."""

    def __init__(self, message: str, *, text: str = "", column: int | None = None) -> None:
        self.text = text
        self.column = column
        if column is not None:
            message += f"\n    {text}\n    {' ' * column}^ column {column + 1}"
        super().__init__(message)


class RegistrationError(KernelhubError):
    """An op or backend cannot be registered. Nothing was changed."""


class UnknownName(KernelhubError, LookupError):
    """No op or backend of that name exists."""


class FallbackWarning(UserWarning):
    """A call on an accelerator runs on the reference because no kernel for it is usable."""


def describe(value: Any) -> str:
    """One short line about any value: shape, dtype and device for tensors."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        shape = ", ".join(str(size) for size in value.shape)
        dtype = str(value.dtype).removeprefix("torch.")
        return f"[{shape}] {dtype} {getattr(value, 'device', '')}".rstrip()
    if isinstance(value, (bool, int, float, str, type(None))):
        return repr(value)
    return type(value).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that lists the known names, led by the nearest to `name`."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{match[0]}'? " if match else ""
    return f"{hint}known: {', '.join(names) or 'none'}"
