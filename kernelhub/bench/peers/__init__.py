"""Other libraries' kernels for the same work, timed beside the backends: `bench --peers`.

One file a peer. None is imported before somebody asks for it, and kernelhub needs none of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable

import attrs

from kernelhub.bench.cases import Case
from kernelhub.bench.clock import Call
from kernelhub.bench.inputs import Calls
from kernelhub.errors import KernelhubError, UnknownName, nearest

NAMES = ("torch", "flashinfer", "sgl_kernel", "sglang", "vllm")


@attrs.frozen
class Offer:
    """How a kernel does a case.

    Attributes:
        calls: one for each set of inputs; returns the result, or what was changed in place.
        note: in words, how its work differs from the op's; empty where it does not.
        allowed: share of a result's size by which it may differ from the reference's; None for
            what its dtype rounds off.
        graph_safe: whether a graph can hold the calls.
    """

    calls: list[Call]
    note: str = ""
    allowed: float | None = None
    graph_safe: bool = True


@attrs.frozen
class Kernel:
    """One way of a peer to run an op; `prepare` gives an offer, or says why there is none.

    What a model's loader would do once, such as another layout of the weights, is done there.
    """

    op: str
    prepare: Callable[[Case, list[Calls]], Offer | str]
    name: str = ""


@attrs.frozen
class Peer:
    """A library: its import name, its kernels, and the devices that they run on (none: any)."""

    name: str
    module: str
    kernels: tuple[Kernel, ...]
    devices: tuple[str, ...] = ("cuda",)


@attrs.frozen
class Found:
    """A peer as it is here; `missing` says why it cannot be used."""

    peer: Peer
    version: str = ""
    missing: str = ""


@attrs.frozen
class Entrant:
    """A kernel under the name of its row."""

    name: str
    version: str
    kernel: Kernel
    devices: tuple[str, ...]


class AbsentPeer(KernelhubError):
    """A peer was asked for by name and cannot be used here."""


def find(wanted: str) -> list[Found]:
    """The peers of `none`, `all`, or names with commas. A named one must be usable."""
    peers = _all()
    names = [] if wanted == "none" else list(peers) if wanted == "all" else wanted.split(",")
    names = list(dict.fromkeys(name.strip() for name in names))
    for name in names:
        if name not in peers:
            raise UnknownName(f"no peer named '{name}'; {nearest(name, (*peers, 'all', 'none'))}")
    found = [_look(peers[name]) for name in names]
    absent = [f"peer {f.peer.name}: {f.missing}" for f in found if f.missing]
    if absent and wanted != "all":
        raise AbsentPeer("; ".join(absent))
    return found


def _all() -> dict[str, Peer]:
    return {name: importlib.import_module(f"{__name__}.{name}").PEER for name in NAMES}


def _look(peer: Peer) -> Found:
    try:
        if importlib.util.find_spec(peer.module) is None:
            return Found(peer, missing="not installed")
        version = getattr(importlib.import_module(peer.module), "__version__", "")
    except Exception as error:  # of a library that does not fit this torch or this device
        said = str(error).splitlines() or [""]
        return Found(peer, missing=f"cannot be imported: {type(error).__name__}: {said[0]}")
    return Found(peer, version=str(version))


def entrants(found: Iterable[Found], op: str) -> list[Entrant]:
    """The kernels for an op; a usable peer that has none gets one that declines."""
    made = []
    for f in found:
        if not f.missing:
            kernels = [k for k in f.peer.kernels if k.op == op] or [Kernel(op, _none)]
            for kernel in kernels:
                name = f"peer:{f.peer.name} {kernel.name}".strip()
                made.append(Entrant(name, f.version, kernel, f.peer.devices))
    return made


def _none(case: Case, sets: list[Calls]) -> str:
    return "has no kernel for this op"


def joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def whole_layer(case: Case) -> str:
    """Why a kernel of whole expert layers does not run a case; empty where it does."""
    if case.facts["stage"] != "layer" or not case.facts["reduce"]:
        return "runs whole layers and their sum only"
    return ""
