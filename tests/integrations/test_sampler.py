"""Sampling: the op's token for a seed on every backend and in any batch; stopping is stock's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kernelhub
from kernelhub.errors import ArgumentError
from kernelhub.integrations.transformers import Census, Sampler, accelerate
from tests.integrations.models import make

sample = kernelhub.ops.top_k_top_p_sampling_from_probs
IDS = torch.tensor([[5, 17, 3, 40], [1, 2, 3, 4]])


def generate(model: Any, ids: torch.Tensor, sampler: Sampler, **options: Any) -> torch.Tensor:
    made: torch.Tensor = model.generate(
        ids, logits_processor=[sampler], do_sample=False, max_new_tokens=10, **options
    )
    return made


def test_it_forces_the_token_that_the_op_draws() -> None:
    scores = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)) * 2
    options: dict[str, Any] = {"top_k": 20, "top_p": 0.8, "min_p": 0.2}
    for seed in range(50):
        forced = Sampler(temperature=0.7, seed=seed, **options)(IDS, scores)
        probs = torch.softmax(scores / 0.7, -1)
        expected = sample(probs, 20, 0.8, min_p=0.2, seed=seed, offset=4)
        assert torch.equal(forced.argmax(-1), expected)
        assert forced.isfinite().sum() == 2
        assert forced.max() == 0
        forced = Sampler(seed=[seed, -seed])(IDS, scores)
        seeds, offsets = torch.tensor([seed, -seed]), torch.tensor([4, 4])
        expected = sample(torch.softmax(scores, -1), 0, 1.0, seed=seeds, offset=offsets)
        assert torch.equal(forced.argmax(-1), expected)


def test_the_same_text_on_every_backend_and_another_for_another_seed() -> None:
    model = make("qwen3_moe")
    texts = set()
    for seed in range(3):
        sampler, found = Sampler(temperature=1.5, top_k=30, top_p=0.95, seed=seed), []
        for backend in ("reference", "simt"):
            with kernelhub.use(backend), accelerate(model):
                found.append(generate(model, IDS, sampler))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0][0, 4:], found[0][1, 4:]), "streams of their own"
        texts.add(tuple(found[0].flatten().tolist()))
    assert len(texts) == 3


def test_a_seed_for_each_row_makes_it_its_own() -> None:
    model = make("llama")
    both = generate(model, IDS, Sampler(temperature=2.0, seed=[7, -8]))
    swapped = generate(model, IDS.flip(0), Sampler(temperature=2.0, seed=[-8, 7]))
    alone = generate(model, IDS[1:], Sampler(temperature=2.0, seed=[-8]))
    assert torch.equal(both, swapped.flip(0))
    assert torch.equal(both[1:], alone)
    with pytest.raises(ArgumentError, match="'seed': expected 2 seeds, one a row, got 3"):
        generate(model, IDS, Sampler(seed=[1, 2, 3]))


def test_stopping_is_transformers_own() -> None:
    model = make("qwen2")
    sampler = Sampler(temperature=2.0, seed=3)
    free = generate(model, IDS[:1], sampler)
    assert free.shape == (1, 14)
    stop = int(free[0, 8])
    first = free[0, 4:].tolist().index(stop)
    stopped = generate(model, IDS[:1], sampler, eos_token_id=stop)
    assert stopped.tolist() == free[:, : 4 + first + 1].tolist()


def test_do_sample_takes_the_same_token() -> None:
    """The loop's own draw finds one token left."""
    model, sampler = make("qwen2"), Sampler(temperature=2.0, top_p=0.9, seed=5)
    expected = generate(model, IDS, sampler)
    torch.manual_seed(1)
    got = model.generate(
        IDS, logits_processor=[sampler], do_sample=True, top_k=7, top_p=0.5, max_new_tokens=10
    )
    assert torch.equal(got, expected)


def test_it_counts() -> None:
    census = Census()
    generate(make("qwen2"), IDS, Sampler(census=census))
    assert census.count("top_k_top_p_sampling_from_probs", "reference") == 10
    (row,) = census.rows
    assert (row.place, row.why) == ("sampling", "default ranking")
    assert "sampling" in str(census)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": float("nan")}),
        ("top_p", {"top_p": 0.0}),
        ("min_p", {"min_p": 1.5}),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"Sampler: argument '{name}'"):
        Sampler(**options)


def test_a_row_of_nan_is_an_error_not_token_0() -> None:
    scores = torch.zeros(2, 9)
    scores[1, 3] = float("nan")
    with pytest.raises(ArgumentError, match="a row to draw from, got row 1: NaN"):
        Sampler()(IDS, scores)
