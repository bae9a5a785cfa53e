"""Runs the cases of an op on a backend and judges every number that comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from kernelhub import registry
from kernelhub.errors import ArgumentError, BackendUnavailable
from kernelhub.function import entry_for, get
from kernelhub.spec import Case, Expected, OpSpec, Traits

_GUARD_BYTES = 256
_POISON = 0xA5


@attrs.frozen
class Outcome:
    """What one case showed. `fraction` is the largest error as a share of its bound."""

    op: str
    backend: str
    case: str
    status: str  # "passed", "failed" or "declined"
    fraction: float = 0.0
    message: str = ""


class Buffers:
    """Copies of a call's tensors on a device, in memory with poisoned guards on both sides.

    Strides, offsets and shared memory stay as they are in the arguments, so that slices of one
    packed tensor are still slices of one tensor.
    """

    def __init__(self, arguments: dict[str, Any], device: torch.device) -> None:
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}  # storage: (bytes, bytes at the start)
        self.arguments = {
            name: self._place(value, device) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }

    def _place(self, t: Tensor, device: torch.device) -> Tensor:
        if t.layout is not torch.strided or t.device.type != "cpu":
            return t  # only bad calls have these
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._memory:
            size = -(-storage.nbytes() // 16) * 16
            raw = torch.full((size + 2 * _GUARD_BYTES,), _POISON, dtype=torch.uint8)
            source = torch.empty(0, dtype=torch.uint8).set_(storage)
            raw[_GUARD_BYTES : _GUARD_BYTES + storage.nbytes()] = source
            raw = raw.to(device)
            self._memory[key] = (raw, raw.clone())
        raw = self._memory[key][0]
        offset = t.storage_offset() + _GUARD_BYTES // t.element_size()
        placed = raw.view(t.dtype).as_strided(t.shape, t.stride(), offset)
        return placed.requires_grad_() if t.requires_grad else placed

    def changed(self, writable: tuple[str, ...]) -> bool:
        """Whether any byte changed outside the elements of the `writable` arguments."""
        for raw, before in self._memory.values():
            may_change = torch.zeros_like(raw, dtype=torch.bool)
            for name in writable:
                t = self.arguments.get(name)
                if (
                    isinstance(t, Tensor)
                    and t.untyped_storage()._cdata == raw.untyped_storage()._cdata
                ):
                    size = t.element_size()
                    start = t.storage_offset() * size
                    strides = tuple(stride * size for stride in t.stride())
                    may_change.as_strided((*t.shape, size), (*strides, 1), start).fill_(True)
            if bool(((raw != before) & ~may_change).any()):
                return True
        return False


def compare(expected: Expected, got: Tensor) -> float:
    """Largest |got - truth| as a share of the bound; infinite where a value is simply wrong.

    NaN must be met by NaN and infinity by the same infinity. A finite truth whose magnitude may
    round past the largest value of the output type may come back as infinity.
    """
    value, bound = expected.value, expected.bound.expand(expected.value.shape)
    if got.shape != value.shape:
        return math.inf
    if value.numel() == 0:
        return 0.0
    actual = got.detach().cpu().to(torch.float64)
    value = value.to(torch.float64)
    exact = (actual == value) | (actual.isnan() & value.isnan())
    overflow = torch.zeros_like(exact)
    if got.dtype.is_floating_point:
        largest = torch.finfo(got.dtype).max
        overflow = actual.isinf() & (actual.sign() == value.sign())
        overflow &= value.isfinite() & (value.abs() + bound >= largest)
    share = (actual - value).abs() / bound
    share = torch.where(share.isnan() | ~value.isfinite(), math.inf, share)
    return float(torch.where(exact | overflow, 0.0, share).max())


def _outputs(spec: OpSpec, result: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """Everything a call wrote: what it returned, then what it changed in place, in order."""
    returned = result if isinstance(result, tuple) else () if result is None else (result,)
    in_place = [
        arguments[p.name]
        for p in spec.params
        if p.role == "in_place" and arguments.get(p.name) is not None
    ]
    return [*returned, *in_place]


def _bits(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(_bits(x), _bits(y))
        for x, y in zip(a, b, strict=True)
    )


class _Fault(Exception):
    """A promise that a backend broke."""


def run_case(
    op: str, case: Case, backend: str, device: str | torch.device = "cpu", seed: int = 0
) -> Outcome:
    """Run one case on a backend and check all that the contract promises of it.

    Beside the numbers: nothing is read or written outside the tensors, inputs stay as they were,
    two runs agree bit for bit, `out=` gives the same bits, and each row alone equals the row in
    company, as far as the implementation's traits promise it.
    """
    call = get(op).on(backend)
    try:
        fraction = _judge(registry.spec(op), call, case, backend, torch.device(device), seed)
    except _Fault as fault:
        return Outcome(op, backend, case.name, "failed", math.inf, str(fault))
    except BackendUnavailable as error:
        return Outcome(op, backend, case.name, "declined", 0.0, str(error))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return Outcome(op, backend, case.name, "failed", math.inf, message)
    if not fraction <= 1:
        return Outcome(op, backend, case.name, "failed", fraction, "error past its bound")
    return Outcome(op, backend, case.name, "passed", fraction)


def _judge(
    spec: OpSpec,
    call: Callable[..., Any],
    case: Case,
    backend: str,
    device: torch.device,
    seed: int,
) -> float:
    buffers = Buffers(case.arguments(seed), device)
    if case.error is not None:
        _expect_error(spec, call, case, buffers)
        return 0.0
    result = call(**buffers.arguments)
    outputs = _outputs(spec, result, buffers.arguments)
    if buffers.changed(spec.mutated):
        raise _Fault("wrote outside its outputs")
    args = spec.bind(**case.arguments(seed))
    entry = entry_for(spec.name, backend, spec.bind(**buffers.arguments))
    assert entry is not None  # it has just run
    chain = entry.implementation.chain(args) if entry.implementation.chain else None
    truth = spec.oracle(args, chain)
    if len(truth) != len(outputs):
        raise _Fault(f"returned {len(outputs)} tensors, the contract has {len(truth)}")
    args_out = getattr(args, "out", None)
    for described, got in zip(spec.outputs(args), outputs, strict=False):
        if got.dtype != described.dtype or tuple(got.shape) != tuple(described.shape):
            raise _Fault(f"returned {list(got.shape)} {got.dtype}, the contract has {described}")
        if args_out is None and not got.is_contiguous():
            raise _Fault(f"returned strides {got.stride()}, new results are contiguous")
    fraction = max([compare(e, got) for e, got in zip(truth, outputs, strict=True)] + [0.0])
    if fraction > 1:
        return fraction
    traits = entry.implementation.traits
    if traits.deterministic:
        again = Buffers(case.arguments(seed), device)
        second = call(**again.arguments)
        if not _same_bits(outputs, _outputs(spec, second, again.arguments)):
            raise _Fault("a second run gave other bits")
        _check_out(spec, call, case, device, seed, outputs)
    _check_rows(spec, call, case, device, seed, outputs, traits)
    return fraction


def _expect_error(spec: OpSpec, call: Callable[..., Any], case: Case, buffers: Buffers) -> None:
    try:
        call(**buffers.arguments)
    except ArgumentError as error:
        if error.argument != case.error:
            raise _Fault(f"blamed '{error.argument}', not '{case.error}': {error}") from None
        if buffers.changed(()):
            raise _Fault("wrote to memory before it refused the call") from None
        return
    raise _Fault(f"accepted a bad '{case.error}'")


def _check_out(
    spec: OpSpec,
    call: Callable[..., Any],
    case: Case,
    device: torch.device,
    seed: int,
    outputs: list[Tensor],
) -> None:
    arguments = case.arguments(seed)
    if "out" not in spec.signature.parameters or arguments.get("out") is not None:
        return
    (described,) = spec.outputs(spec.bind(**arguments))
    out = torch.empty(described.shape, dtype=described.dtype)
    out.view(torch.uint8).fill_(
        0xFF
    ) if out.numel() and out.ndim else None  # NaN wherever unwritten
    buffers = Buffers({**arguments, "out": out}, device)
    result = call(**buffers.arguments)
    if result is not buffers.arguments["out"]:
        raise _Fault("did not return `out`")
    if not _same_bits(outputs, [result]):
        raise _Fault("`out=` gave other bits than a fresh result")
    if buffers.changed(spec.mutated):
        raise _Fault("wrote outside `out`")


def _check_rows(
    spec: OpSpec,
    call: Callable[..., Any],
    case: Case,
    device: torch.device,
    seed: int,
    outputs: list[Tensor],
    traits: Traits,
) -> None:
    """Each row alone gives the bits that it has in company."""
    arguments = case.arguments(seed)
    rows = _row_count(spec, arguments)
    if not traits.batch_invariant or rows is None or not 1 < rows <= 16:
        return
    for row in range(rows):
        alone = {
            name: value[row : row + 1]
            if name in spec.rows and isinstance(value, Tensor) and value.shape[:1] == (rows,)
            else value
            for name, value in arguments.items()
        }
        buffers = Buffers(alone, device)
        single = _outputs(spec, call(**buffers.arguments), buffers.arguments)
        if not _same_bits([t[row : row + 1] for t in outputs], single):
            raise _Fault(f"row {row} alone differs from row {row} in company")


def _row_count(spec: OpSpec, arguments: dict[str, Any]) -> int | None:
    if not spec.rows or arguments.get("out") is not None:
        return None
    if arguments.get("indices") is not None:
        return None  # samples are not rows
    lead = arguments[spec.rows[0]]
    if lead.ndim < 2:
        return None
    if spec.random:
        seeds = arguments.get("seed")
        if not (isinstance(seeds, Tensor) and seeds.shape == (lead.shape[0],)):
            return None  # the stream of a sample is its place in the batch
    return int(lead.shape[0])


def conform(
    op: str, backend: str, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Outcome]:
    """Run every case of an op on a backend."""
    for case in registry.spec(op).cases():
        yield run_case(op, case, backend, device, seed)
