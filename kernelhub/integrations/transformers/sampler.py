"""Sampling as a logits processor: the op draws, transformers' own loop stops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from kernelhub.errors import ArgumentError
from kernelhub.integrations.census import Census, run

NAME = "top_k_top_p_sampling_from_probs"


class Sampler(LogitsProcessor):  # type: ignore[misc]  # a class of any type to mypy
    """Draws the next token of each sequence, exactly reproducible on every backend.

    Pass it to `model.generate(ids, logits_processor=[Sampler(...)], do_sample=False)`. It leaves
    one token of each row a score of 0 and all others minus infinity, so that the loop of
    transformers, with its stopping rules, takes that one. It keeps no state: one object may serve
    many calls and threads. The draw's offset is the length of `input_ids`, so what a request gets
    depends on its seed and on its tokens, padding included.

    Args:
        temperature: scores are divided by it before the softmax; more than 0, finite.
        top_k: number of largest tokens to keep; 0 keeps all.
        top_p: share of the mass to keep, in (0, 1].
        min_p: share of the largest probability that a token must have, in [0, 1].
        seed: one seed, of which each row uses a stream of its own, or one seed for each row, so
            that a row's tokens do not depend on its place in the batch. 64-bit, signed. With the
            default the same prompt always gets the same answer.
        census: counts the calls.

    Raises:
        ArgumentError: an option is out of range; when called, `seed` holds another number of seeds
            than there are rows, or a row of scores has no token that can be drawn (NaN).
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float | None = None,
        seed: int | Sequence[int] = 0,
        census: Census | None = None,
    ) -> None:
        if not 0 < temperature < float("inf"):
            raise ArgumentError("Sampler", "temperature", "a number above 0, finite", temperature)
        if not 0 < top_p <= 1:
            raise ArgumentError("Sampler", "top_p", "a share in (0, 1]", top_p)
        if min_p is not None and not 0 <= min_p <= 1:
            raise ArgumentError("Sampler", "min_p", "a share in [0, 1]", min_p)
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.seed = seed if isinstance(seed, int) else tuple(seed)
        self.census = census

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]` of the tokens that follow `input_ids` `[B, length]`, one of them 0."""
        probs = torch.softmax(scores.float() / self.temperature, -1)
        tokens, valid = run(
            () if self.census is None else (self.census,),
            NAME,
            "sampling",
            probs,
            self.top_k,
            self.top_p,
            min_p=self.min_p,
            return_valid=True,
            **self._random(input_ids),
        )
        if not bool(valid.all()):
            row = int(valid.logical_not().nonzero()[0, 0])
            raise ArgumentError("Sampler", "scores", "a row to draw from", f"row {row}: NaN or inf")
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter_(1, tokens.long().unsqueeze(1), 0.0)

    def _random(self, input_ids: Tensor) -> dict[str, int | Tensor]:
        rows, length = input_ids.shape
        if isinstance(self.seed, int):
            return {"seed": self.seed, "offset": length}
        if len(self.seed) != rows:
            raise ArgumentError("Sampler", "seed", f"{rows} seeds, one a row", f"{len(self.seed)}")
        seeds = torch.tensor(self.seed, dtype=torch.int64, device=input_ids.device)
        return {"seed": seeds, "offset": torch.full_like(seeds, length)}
