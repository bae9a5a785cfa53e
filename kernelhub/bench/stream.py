"""What memory gives: torch's own reads of as many bytes as a call, and the most that it reaches."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from kernelhub.bench.clock import Call

_ROW = 4096  # elements that one sum of "sum of rows" adds up
_MOST_READS = 48
ROOF_BYTES = 2**30


@attrs.frozen
class Roof:
    """Bytes a second of a large read and a large copy."""

    read: float
    copy: float

    @property
    def most(self) -> float:
        return max(self.read, self.copy)


def reads(num_bytes: int, device: torch.device, budget: int) -> dict[str, list[Call]]:
    """Ways to move `num_bytes` with torch, each as calls that rotate over `budget` bytes."""
    rows = max(1, math.ceil(num_bytes / 4 / _ROW))
    exact = max(1, math.ceil(num_bytes / 4))
    count = min(_MOST_READS, max(1, math.ceil(budget / max(num_bytes, 1))))
    memory = torch.zeros(count, rows * _ROW, device=device)
    flat = [memory[i, :exact] for i in range(count)]
    return {
        "sum": [lambda t=t: t.sum() for t in flat],  # type: ignore[misc]
        "max": [lambda t=t: t.amax() for t in flat],  # type: ignore[misc]
        "sum of rows": [
            lambda t=t: t.view(rows, _ROW).sum(dim=1)  # type: ignore[misc]
            for t in memory
        ],
        "copy": [_copy_half(t) for t in flat],
    }


def _copy_half(t: Tensor) -> Call:
    """Reads one half and writes it to the other: as many bytes moved as `t` has."""
    half = max(1, t.numel() // 2)
    source, target = t[:half], t[-half:]
    return lambda: target.copy_(source)
