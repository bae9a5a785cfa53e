"""The outcome of choosing a backend, with every candidate and every reason."""

from __future__ import annotations

from typing import Any

import attrs

from kernelhub.spec import TensorDesc


@attrs.frozen
class Candidate:
    """One implementation that was considered. It is usable where `reasons` is empty."""

    backend: str
    variant: str
    reasons: tuple[str, ...]
    priority: int

    @property
    def name(self) -> str:
        return f"{self.backend}.{self.variant}" if self.variant else self.backend


@attrs.frozen
class Selection:
    """Which implementation runs a call, and why not the others.

    Candidates stand in the order in which the policy ranks them, the excluded ones last.
    `origin` says where the policy came from, such as `KERNELHUB_BACKEND=reference`.
    """

    op: str
    device: str
    inputs: tuple[tuple[str, TensorDesc], ...]
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    origin: str

    @property
    def backend(self) -> str | None:
        return self.chosen.backend if self.chosen else None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dictionaries and strings, ready for JSON."""
        return {
            "op": self.op,
            "device": self.device,
            "inputs": {name: _desc(desc) for name, desc in self.inputs},
            "policy": self.origin,
            "chosen": self.chosen.name if self.chosen else None,
            "candidates": [
                {"name": c.name, "priority": c.priority, "reasons": list(c.reasons)}
                for c in self.candidates
            ],
        }

    def __str__(self) -> str:
        head = f"{self.op}: {self.chosen.name if self.chosen else 'no backend can run this call'}"
        width = max([len(name) for name, _ in self.inputs] + [0])
        lines = [head] + [f"    {name:<{width}}  {_desc(desc)}" for name, desc in self.inputs]
        width = max([len(c.name) for c in self.candidates] + [0])
        for candidate in self.candidates:
            chosen = "chosen" if candidate is self.chosen else "usable, ranked lower"
            verdict = "; ".join(candidate.reasons) or chosen
            lines.append(f"  {candidate.name:<{width}}  {verdict}")
        lines.append(f"  policy: {self.origin}")
        return "\n".join(lines)


def _desc(desc: TensorDesc) -> str:
    shape = ", ".join(str(size) for size in desc.shape)
    text = f"[{shape}] {str(desc.dtype).removeprefix('torch.')} {desc.device}"
    return text if desc.is_contiguous() else f"{text} strides {tuple(desc.stride())}"
