"""Runs the cases of an op on a backend and judges every number that comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from kernelhub import registry
from kernelhub.contracts._cases import unused
from kernelhub.errors import ArgumentError
from kernelhub.function import entry_for, get
from kernelhub.policy import use
from kernelhub.spec import Case, Expected, OpSpec

_GUARD_BYTES = 256
_POISON = 0xFF  # NaN in every floating type, so that whatever is added shows


@attrs.frozen
class Outcome:
    """What one case showed. `fraction` is the largest error as a share of its bound.

    `same_bits`: whether two runs gave the same bits; None where there was no second run.
    """

    op: str
    backend: str
    case: str
    status: str  # "passed", "failed" or "declined"
    fraction: float = 0.0
    message: str = ""
    same_bits: bool | None = None


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

    def tensors(self) -> list[Tensor]:
        return [v for v in self.arguments.values() if isinstance(v, Tensor)]

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
    trial = _Trial(registry.spec(op), case, backend, torch.device(device), seed)
    try:
        if case.error is not None:
            trial.expect_error()
            return Outcome(op, backend, case.name, "passed")
        entry = trial.entry()
        if entry is None:  # decided from reasons, before anything ran
            return Outcome(op, backend, case.name, "declined", 0.0, trial.reasons())
        fraction = trial.judge(entry)
    except _Fault as fault:
        return Outcome(op, backend, case.name, "failed", math.inf, str(fault), trial.same_bits[-1])
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return Outcome(op, backend, case.name, "failed", math.inf, message)
    if not fraction <= 1:
        return Outcome(op, backend, case.name, "failed", fraction, "error past its bound")
    return Outcome(op, backend, case.name, "passed", fraction, same_bits=trial.same_bits[-1])


@attrs.frozen
class _Trial:
    """One case on one backend."""

    spec: OpSpec
    case: Case
    backend: str
    device: torch.device
    seed: int
    same_bits: list[bool | None] = attrs.field(factory=lambda: [None])

    @property
    def op(self) -> Callable[..., Any]:
        return get(self.spec.name).on(self.backend)

    def arguments(self) -> dict[str, Any]:
        return self.case.arguments(self.seed)

    def call(self, arguments: dict[str, Any]) -> tuple[Buffers, Any, list[Tensor]]:
        """Run the op on guarded copies; nothing but outputs may have changed."""
        buffers = Buffers(arguments, self.device)
        result = self.op(**buffers.arguments)
        if buffers.changed(self.spec.mutated):
            raise _Fault("wrote outside its outputs")
        return buffers, result, _outputs(self.spec, result, buffers.arguments)

    def described(self) -> Any:
        return self.spec.bind(**Buffers(self.arguments(), self.device).arguments)

    def entry(self) -> registry.Entry | None:
        return entry_for(self.spec.name, self.backend, self.described())

    def reasons(self) -> str:
        with use(self.backend):
            given = Buffers(self.arguments(), self.device).arguments
            return str(get(self.spec.name).explain(**given))

    def expect_error(self) -> None:
        buffers = Buffers(self.arguments(), self.device)
        try:
            self.op(**buffers.arguments)
        except ArgumentError as error:
            if error.argument != self.case.error:
                raise _Fault(f"blamed '{error.argument}', not '{self.case.error}'") from None
            if buffers.changed(()):
                raise _Fault("wrote to memory before it refused the call") from None
            return
        raise _Fault(f"accepted a bad '{self.case.error}'")

    def judge(self, entry: registry.Entry) -> float:
        """The largest error as a share of its bound; raises `_Fault` for a broken promise."""
        buffers, _, outputs = self.call(self.arguments())
        args = self.spec.bind(**self.arguments())
        chain = entry.implementation.chain(args) if entry.implementation.chain else None
        truth = self.spec.oracle(args, chain)
        self._check_form(args, truth, outputs, buffers)
        fraction = _worst(truth, outputs)
        if fraction > 1:
            return fraction
        kept = [t.clone() for t in outputs]
        traits = entry.implementation.traits
        _, _, again = self.call(self.arguments())
        if not _same_bits(outputs, kept):
            raise _Fault("a second call changed the first result")
        self.same_bits.append(_same_bits(outputs, again))
        if traits.deterministic and not self.same_bits[-1]:
            raise _Fault("a second run gave other bits")
        if "out" in self.spec.signature.parameters and self.arguments().get("out") is None:
            for pad in (0, 3):
                self._check_out(truth, kept if traits.deterministic else None, pad)
        if traits.batch_invariant:
            self._check_rows(kept)
        return fraction

    def _check_form(
        self, args: Any, truth: tuple[Expected, ...], outputs: list[Tensor], buffers: Buffers
    ) -> None:
        if len(truth) != len(outputs):
            raise _Fault(f"returned {len(outputs)} tensors, the contract has {len(truth)}")
        out = getattr(args, "out", None)
        memory = {t.untyped_storage()._cdata for t in buffers.tensors()}
        for desc, got in zip(self.spec.outputs(args), outputs, strict=False):
            if got.dtype != desc.dtype or tuple(got.shape) != tuple(desc.shape):
                raise _Fault(f"returned {list(got.shape)} {got.dtype}, the contract has {desc}")
            if got.device.type != self.device.type:
                raise _Fault(f"returned a tensor on {got.device} for tensors on {self.device}")
            if out is None and not got.is_contiguous():
                raise _Fault(f"returned strides {got.stride()}, new results are contiguous")
            if out is None and got.numel() and got.untyped_storage()._cdata in memory:
                raise _Fault("returned the memory of an input")

    def _check_out(self, truth: tuple[Expected, ...], bits: list[Tensor] | None, pad: int) -> None:
        """`out=` with and without gaps between its rows, NaN wherever nothing is written."""
        arguments = self.arguments()
        (desc,) = self.spec.outputs(self.spec.bind(**arguments))
        shape = desc.shape
        if pad and not shape:
            return
        wide = unused(*(*shape[:-1], shape[-1] + pad) if shape else (1,), dtype=desc.dtype)
        out = wide[..., : shape[-1]] if shape else wide[0]
        buffers, result, _ = self.call({**arguments, "out": out})
        if result is not buffers.arguments["out"]:
            raise _Fault("did not return `out`")
        if bits is not None and not _same_bits(bits, [result]):
            raise _Fault("`out=` gave other bits than a fresh result")
        if not _worst(truth, [result]) <= 1:
            raise _Fault("`out=` is past the bound")

    def _check_rows(self, outputs: list[Tensor]) -> None:
        """Each row alone gives the bits that it has in company."""
        arguments = self.arguments()
        rows = _row_count(self.spec, arguments)
        if rows is None or not 1 < rows <= 16:
            return
        for row in range(rows):
            alone = {
                name: value[row : row + 1]
                if name in self.spec.rows
                and isinstance(value, Tensor)
                and value.shape[:1] == (rows,)
                else value
                for name, value in arguments.items()
            }
            _, _, single = self.call(alone)
            if not _same_bits([t[row : row + 1] for t in outputs], single):
                raise _Fault(f"row {row} alone differs from row {row} in company")


def _worst(truth: tuple[Expected, ...], outputs: list[Tensor]) -> float:
    return max([compare(e, got) for e, got in zip(truth, outputs, strict=True)] + [0.0])


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


def takes_some_case(op: str, backend: str, device: str | torch.device = "cpu") -> bool:
    """Whether a backend runs at least one good case of an op."""
    spec = registry.spec(op)
    trials = (_Trial(spec, case, backend, torch.device(device), 0) for case in spec.cases())
    return any(trial.case.error is None and trial.entry() is not None for trial in trials)


def conform(
    op: str, backend: str, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Outcome]:
    """Run every case of an op on a backend."""
    for case in registry.spec(op).cases():
        yield run_case(op, case, backend, device, seed)
