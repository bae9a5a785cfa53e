"""Gives torch the emulated devices as `musa`, as importing torch_musa gives it real ones."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_VERSION = "2.11.0+emulated"
_RUNTIME = "tests.emulation.runtime"


def install() -> Any:
    """`torch.musa` with two devices, the first of architecture mp_31, the second of mp_22.

    For the whole process and not to be undone: torch takes one name for a device type of others.
    """
    found = torch._C._get_privateuse1_backend_name()
    if found == "musa" and _RUNTIME in sys.modules:
        return torch.musa
    if found != "privateuseone":
        raise RuntimeError(f"torch already has the devices of a package for '{found}'")
    torch.utils.rename_privateuse1_backend("musa")
    runtime = importlib.import_module(_RUNTIME)
    torch._register_device_module("musa", runtime)
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.version.musa = "5.2 (emulated)"
    _add_torch_musa(runtime)
    return torch.musa


def _add_torch_musa(runtime: Any) -> None:
    native = _module("torch_musa._MUSAC", _musa_getCurrentRawStream=runtime._current_raw_stream)
    _module("torch_musa", _MUSAC=native, __version__=_VERSION, __path__=[])


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None, origin="tests/emulation")  # for find_spec
    vars(module).update(contents)
    sys.modules[name] = module
    return module
