"""The ops that ship with kernelhub, as functions. `kernelhub.op(name)` returns the same objects.

Generated from the contracts in `kernelhub.contracts`; the stub beside this file tells editors and
type checkers their signatures.
"""

from importlib import import_module as _import
from typing import Any as _Any

from kernelhub import function as _function
from kernelhub.contracts import NAMES as _NAMES

for _name in _NAMES:
    globals()[_name] = _function.add(_import(f"kernelhub.contracts.{_name}").SPEC)

__all__ = list(_NAMES)


def __getattr__(name: str) -> _Any:
    """An op that was added from outside with `kernelhub.function.add`."""
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return _function.get(name)
    except LookupError as error:
        raise AttributeError(str(error)) from None
