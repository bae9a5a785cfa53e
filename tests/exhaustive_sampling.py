"""Compares a backend's sampling with the reference on random rows, bit for bit.

    python tests/exhaustive_sampling.py BACKEND [DEVICE] [--rows N] [--seed S]

Rows of every kind, over vocabularies of 1 to 262144: run it on a GPU after a change of the kernel.
Ends with 1, and the call that differs, at the first difference.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from torch import Tensor

import kernelhub

LARGEST_VOCABULARY = 2**18
LIMITS_OF_A_CALL = {"cpu": (100, 2**17)}
LIMITS_OF_A_CALL_ON_A_GPU = (1000, 2**25)
"""Rows and elements: many calls, each large enough to be worth its launches."""

sample = kernelhub.ops.top_k_top_p_sampling_from_probs


class Source:
    """Seeded numbers: single ones in Python, tensors on the device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._host = torch.Generator().manual_seed(seed)
        self._device = torch.Generator(device).manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """Of [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self._host))

    def share(self) -> float:
        return float(torch.rand((), generator=self._host))

    def one_of(self, *choices: Any) -> Any:
        return choices[self.integer(0, len(choices) - 1)]

    def size(self, largest: int) -> int:
        """Of [1, largest], as often in each power of two."""
        return min(int(2 ** (self.share() * (largest.bit_length()))), largest)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Of [low, high]."""
        return torch.randint(low, high + 1, shape, generator=self._device, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._device, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._device, device=self.device)


def _rows(source: Source, rows: int, vocab_size: int) -> Tensor:
    """Rows of one kind."""
    shape = (rows, vocab_size)
    kind = source.integer(0, 8)
    if kind <= 1:  # a language model's
        return torch.softmax(source.normal(*shape) * source.uniform(rows, 1) * 8, -1)
    if kind == 2:  # ranked, which is also in descending order
        power = -0.5 - source.uniform(rows, 1)
        ranked = torch.arange(1, vocab_size + 1, device=source.device).float() ** power
        return ranked / ranked.sum(-1, keepdim=True)
    if kind == 3:  # few values, many ties
        few = source.integers(0, source.size(1000), *shape).float()
        return few / vocab_size * source.share()
    if kind == 4:  # all nearly equal: one bin of any histogram
        width = source.one_of(0.0, 1e-7, 1e-5, 1e-3, 1e-2)
        return (1 + width * source.uniform(*shape)) * (source.share() + 0.01) / vocab_size
    if kind == 5:  # every order of magnitude, below what has mass and above 1
        return 2.0 ** (source.uniform(*shape) * 60 - source.one_of(50, 57, 60))
    if kind == 6:  # mostly zeros, among them negative ones
        return source.uniform(*shape) * (source.uniform(*shape) < source.share() ** 4) - 0.0
    if kind == 7:  # negative values too
        return source.uniform(*shape) - source.share()
    # Two clusters far apart.
    return torch.where(source.uniform(*shape) < source.share(), 2.0**-13, 2.0**-30) * (
        1 + source.uniform(*shape) * source.one_of(1e-6, 1e-2)
    )


def _probs(source: Source, rows: int, vocab_size: int) -> Tensor:
    probs = _rows(source, rows, vocab_size)
    if source.integer(0, 3) == 0:  # some rows cannot be sampled
        at = source.integers(0, vocab_size - 1, rows, 1)
        bad = source.one_of(float("nan"), float("inf"), -float("inf"))
        hit = source.uniform(rows, 1) < 0.1
        probs = torch.where(hit, probs.scatter(1, at, bad), probs)
    probs = probs.to(source.one_of(torch.float32, torch.float32, torch.float16, torch.bfloat16))
    layout = source.integer(0, 5)
    if layout == 0:  # rows that start anywhere
        wide = probs.new_full((rows, vocab_size + source.integer(1, 9)), float("nan"))
        wide[:, 1 : vocab_size + 1] = probs
        return wide[:, 1 : vocab_size + 1]
    return probs.t().contiguous().t() if layout == 1 else probs


def random_call(source: Source, rows_left: int) -> dict[str, Any]:
    """Arguments of one call, of at most so many samples."""
    most_rows, most_elements = LIMITS_OF_A_CALL.get(source.device.type, LIMITS_OF_A_CALL_ON_A_GPU)
    vocab_size = source.size(min(LARGEST_VOCABULARY, most_elements))
    rows = min(most_rows, most_elements // vocab_size, rows_left)
    if source.integer(0, 1):
        rows = min(rows, source.integer(1, 40))
    call: dict[str, Any] = {
        "probs": _probs(source, rows, vocab_size),
        "filter_apply_order": source.one_of("top_k_first", "joint"),
        "return_valid": True,
    }
    call["top_k"] = source.one_of(0, 1, 40, vocab_size, source.size(vocab_size))
    if source.integer(0, 3) == 0:  # per row
        sizes = 2 ** (source.uniform(rows) * vocab_size.bit_length())
        call["top_k"] = sizes.to(source.one_of(torch.int32, torch.int64)) - 1
    shares = source.uniform(rows) * 1.2 - 0.1
    call["top_p"] = source.one_of(1.0, 0.9, 0.95, max(source.share(), 1e-9), shares)
    call["min_p"] = source.one_of(None, None, 0.0, source.share() ** 3, shares**3)
    batch_size = rows
    if source.integer(0, 2) == 0:
        batch_size = min(source.integer(1, 4) * rows, rows_left)
        index_type = source.one_of(torch.int32, torch.int64)
        call["indices"] = source.integers(-1, rows, batch_size).to(index_type)
    words = (
        source.integer(-(2**62), 2**62),
        source.integers(-(2**62), 2**62, 1),
        source.integers(-(2**62), 2**62, batch_size),
    )
    call["seed"] = source.one_of(*words)
    call["offset"] = source.one_of(None, *words)
    return call


def _described(call: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        return repr(value)

    return ", ".join(f"{name}={text(value)}" for name, value in call.items())


def first_difference(backend: str, call: dict[str, Any]) -> str | None:
    """What the backend answers otherwise than the reference, or nothing."""
    with kernelhub.use("reference"):
        expected = torch.stack([part.long() for part in sample(**call)])
    with kernelhub.use(backend):
        got = torch.stack([part.long() for part in sample(**call)])
    differs = (expected != got).any(0).nonzero()[:, 0].tolist()
    if not differs:
        return None
    first = differs[0]
    return (
        f"{len(differs)} samples differ, the first is {first}: token, valid "
        f"{expected[:, first].tolist()} expected, {got[:, first].tolist()} got: {_described(call)}"
    )


def compare(backend: str, device: str, rows: int, seed: int) -> tuple[int, str | None]:
    """How many samples were compared, and the first difference."""
    source = Source(torch.device(device), seed)
    done = 0
    while done < rows:
        call = random_call(source, rows - done)
        difference = first_difference(backend, call)
        if difference is not None:
            return done, difference
        samples = call["indices"] if "indices" in call else call["probs"]
        done += len(samples)
    return done, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("device", nargs="?", default="cpu")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    done, difference = compare(options.backend, options.device, options.rows, options.seed)
    print(f"{done} samples equal on {options.backend} in {time.monotonic() - start:.0f} s")
    if difference is not None:
        print(difference)
    return 1 if difference is not None else 0


if __name__ == "__main__":
    sys.exit(main())
