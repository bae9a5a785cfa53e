"""The report of `kernelhub check --report`: what somebody else needs to judge a run.

It names no user, host or folder and quotes no environment variable: every text in it that does not
come from kernelhub's own tables goes through `scrubbed`.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import kernelhub
from kernelhub import doctor, provenance, registry
from kernelhub.cli._output import write_file
from kernelhub.testing import Outcome

if TYPE_CHECKING:
    from kernelhub.cli.check import Pair

SCHEMA = 1
_LONGEST = 2000  # characters of one message
_PATH = re.compile(r"""(?<![\w.\])])(-[A-Za-z])?~?(?:/[^\s:;,'"()\[\]<>]+)+/?""")
_ASSIGNMENT = re.compile(r"\b[A-Z][A-Z0-9_]{3,}=\S+")


def write(path: Path, pairs: list[Pair], checked: dict[str, Any]) -> None:
    write_file(path, json.dumps(make(pairs, checked), indent=1) + "\n")


def make(pairs: list[Pair], checked: dict[str, Any]) -> dict[str, Any]:
    """The report; `checked` is what `kernelhub check --json` prints."""
    found = doctor.examine()
    return {
        "schema": SCHEMA,
        **provenance.facts(),
        "ok": checked["ok"],
        "versions": {name: scrubbed(version) for name, version in found.versions.items()},
        "devices": [
            {"name": d.name, "usable": d.usable, "detail": scrubbed(d.detail)}
            for d in found.devices
        ],
        "compilers": [
            {"name": c.name, "version": scrubbed(c.version), "found": not c.missing}
            for c in found.compilers
        ],
        "device": checked["device"],
        "seed": checked["seed"],
        "backends": [_backend(name, checked["device"]) for name in _names(pairs, checked)],
        "problems": [scrubbed(problem) for problem in checked["problems"]],
        "results": [_result(pair) for pair in pairs],
    }


def _names(pairs: list[Pair], checked: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys([*(pair.backend for pair in pairs), *checked["unavailable"]]))


def _backend(name: str, device: str) -> dict[str, Any]:
    """A backend and, where its kernels are compiled, the library that this device gets."""
    backend = registry.backends().get(name)
    said: dict[str, Any] = {"name": name, "arch": None, "warp_size": None, "library": ""}
    if backend is None or backend.kernels is None:
        return said
    try:
        at = torch.device(device)
        said["arch"] = str(backend.kernels.arch_of(at))
        said["warp_size"] = backend.kernels.library(at).warp_size
    except Exception as error:  # a driver's, a compiler's: part of what the report is for
        said["library"] = scrubbed(f"{type(error).__name__}: {error}")
    return said


def _result(pair: Pair) -> dict[str, Any]:
    compared = [o.same_bits for o in pair.outcomes if o.same_bits is not None]
    return {
        **pair.summary(),
        "seconds": round(pair.seconds, 3),
        "same_bits": all(compared) if compared else None,
        "worst": None if pair.worst is None else _share(pair.worst),
        "failures": [_share(outcome) for outcome in pair.failures],
        "declined_cases": [o.case for o in pair.outcomes if o.status == "declined"],
    }


def _share(outcome: Outcome) -> dict[str, Any]:
    from kernelhub.cli.check import outcome_to_dict

    said = outcome_to_dict(outcome)
    return {**said, "message": scrubbed(said["message"]), "same_bits": outcome.same_bits}


def scrubbed(text: str) -> str:
    """The text without folders, names of the user and the host, and variables' values."""
    for folder in sorted(set(_folders()), key=len, reverse=True):
        text = text.replace(folder, "/_")  # a path without blanks
    text = _ASSIGNMENT.sub(lambda found: f"{found[0].partition('=')[0]}=...", text)
    text = _PATH.sub(lambda found: f"{found[1] or ''}<path>", text)
    for name in _identities():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<name>", text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _folders() -> Iterator[str]:
    """Folders that may hold blanks, which the pattern of a path ends at."""
    for folder in (
        *(Path.home(), Path.cwd(), Path(kernelhub.__file__).parents[1]),
        *(Path(sys.prefix), Path(tempfile.gettempdir()), Path(sysconfig.get_paths()["purelib"])),
    ):
        if folder != Path(folder.anchor):
            yield str(folder)


def _identities() -> Iterator[str]:
    """What this machine and its user are called. `root` and `localhost` say nothing of anybody."""
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    with contextlib.suppress(Exception):  # a user without an entry
        names.add(getpass.getuser())
    names.update(os.environ.get(name, "") for name in ("USER", "LOGNAME", "HOSTNAME"))
    yield from sorted(names - {"", "root", "localhost"}, key=len, reverse=True)
