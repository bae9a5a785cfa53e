"""Sampling: the reference equals the exact oracle bit for bit, and both draw what they should."""

from __future__ import annotations

import bisect
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import kernelhub
from kernelhub.backends.native import top_k_top_p_sampling_from_probs as native
from kernelhub.backends.simt import backend as simt
from kernelhub.contracts.top_k_top_p_sampling_from_probs import SPEC, VOCAB_LIMIT
from kernelhub.contracts.top_k_top_p_sampling_from_probs import _uniform as uniform_in_python
from kernelhub.errors import ArgumentError, KernelError
from kernelhub.spec import Case, DeviceDesc, TensorDesc
from kernelhub.testing import run_case
from tests import exhaustive_sampling

ORDERS = ("top_k_first", "joint")
sampling = kernelhub.ops.top_k_top_p_sampling_from_probs


def sample(probs: Tensor, top_k: Any = 0, top_p: Any = 1.0, **rest: Any) -> tuple[Tensor, Tensor]:
    tokens, valid = SPEC.reference(probs, top_k, top_p, **rest, return_valid=True)
    return tokens, valid


def sample_exactly(probs: Tensor, top_k: Any = 0, top_p: Any = 1.0, **rest: Any) -> list[int]:
    """Tokens (-1 where invalid) on which the reference and the oracle agree."""
    args = SPEC.bind(probs, top_k, top_p, **rest, return_valid=True)
    SPEC.validate(args)
    expected_tokens, expected_valid = (expected.value for expected in SPEC.oracle(args, None))
    tokens, valid = sample(probs, top_k, top_p, **rest)
    assert tokens.tolist() == expected_tokens.tolist()
    assert valid.tolist() == expected_valid.bool().tolist()
    return torch.where(valid, tokens, -1).tolist()


def model_probs(seed: int, rows: int, vocab_size: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(rows, vocab_size, generator=g) * 2, -1)


def of_mass(*rows: list[int]) -> Tensor:
    return (torch.tensor(rows, dtype=torch.float64) * 2.0**-44).float()


def odd_rows(g: torch.Generator, kind: str, rows: int, vocab_size: int) -> Tensor:
    """Rows with ties, zeros, negative and huge values, denormals."""
    shape = (rows, vocab_size)
    uniform, normal = torch.rand(shape, generator=g), torch.randn(shape, generator=g)
    choice = torch.randint(0, 6, shape, generator=g)
    return {
        "softmax": torch.softmax(normal * 4, -1),
        "bf16": torch.softmax(normal * 4, -1).bfloat16(),
        "fp16": torch.softmax(normal, -1).half(),
        "quantised": torch.round(uniform * 8) / 16,
        "sparse": torch.where(choice == 0, uniform, 0.0),
        "unnormalised": uniform * 3,
        "signed": normal,
        "tiny": uniform * 2.0**-42,
        "extreme": torch.tensor([0.0, 1e-42, 2.0**-44, 0.5, 1.0, 1e30])[choice],
    }[kind]


KINDS = (
    "softmax", "bf16", "fp16", "quantised", "sparse", "unnormalised", "signed", "tiny", "extreme",
)  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_random_rows_equal_the_oracle(kind: str, order: str) -> None:
    g = torch.Generator().manual_seed(len(kind))
    for vocab_size in (1, 2, 3, 7, 16, 33, 64, 100, 257, 300):
        rows = 9
        probs = odd_rows(g, kind, rows, vocab_size)
        top_k = torch.randint(-1, vocab_size + 2, (rows,), generator=g)
        top_p = 1 - torch.rand(rows, generator=g)
        top_p[::4] = (top_p[::4] * 8).ceil() / 8
        min_p = torch.rand(rows, generator=g) ** 3
        indices = torch.randint(0, rows, (3 * rows,), generator=g)
        rest = {"indices": indices, "filter_apply_order": order, "seed": vocab_size}
        for k in (top_k, int(top_k[0])):
            for p in (top_p, float(top_p[1])):
                sample_exactly(probs, k, p, **rest)
                sample_exactly(probs, k, p, min_p=min_p, **rest)
        sample_exactly(probs, min_p=float(min_p[0]), **rest)


def chi_square_limit(freedom: int) -> float:
    """Passed with probability 1e-6 (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.7534 * math.sqrt(2 / (9 * freedom))) ** 3


FILTERS = {
    "min-p": {"min_p": 0.2},
    "top-k-first": {"top_k": 20, "top_p": 0.8},
    "joint": {"top_k": 20, "top_p": 0.8, "filter_apply_order": "joint"},
}


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_frequencies_of_a_million_draws(filters: dict[str, Any]) -> None:
    probs = model_probs(3, 1, 99)
    draws = 10**6
    tokens, valid = sample(probs, **filters, indices=torch.zeros(draws, dtype=torch.int32), seed=42)
    weights = probs[0].double()
    mass_greater = (weights * (weights[None] > weights[:, None])).sum(-1)
    among_k = (weights[None] > weights[:, None]).sum(-1) < filters.get("top_k", 99)
    total = 1.0 if "filter_apply_order" in filters else float(weights[among_k].sum())
    kept = among_k & (mass_greater < filters.get("top_p", 1.0) * total)
    kept &= weights >= filters.get("min_p", 0.0) * weights.max()
    assert 1 < kept.sum() < 99
    expected = draws * weights * kept / weights[kept].sum()
    got = tokens.long().bincount(minlength=99)
    assert valid.all() and got[~kept].sum() == 0
    chi_square = float(((got - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < chi_square_limit(int(kept.sum()) - 1)


def test_filters_off_and_scalars_equal_tensors() -> None:
    probs = model_probs(0, 8, 50)
    calls = (
        {"top_k": 5, "top_p": 0.5}, {"top_k": 0, "top_p": 0.5, "min_p": 0.01},
        {"top_k": 7, "top_p": 1.0}, {"top_k": 0, "top_p": 1.0}, {"top_k": 50, "top_p": 1.0},
    )  # fmt: skip
    for call in calls:
        many = {name: torch.full((8,), value) for name, value in call.items()}
        indices = torch.arange(8).repeat(40)
        scalars = sample(probs, **call, indices=indices, seed=1)[0]
        assert torch.equal(scalars, sample(probs, **many, indices=indices, seed=1)[0])


@pytest.mark.parametrize("order", ORDERS)
def test_share_decided_to_the_last_unit(order: str) -> None:
    """The first token has exactly the share of a total 2^24: with 2^-24 more both are kept."""
    g = torch.Generator().manual_seed(5)
    indices = torch.zeros(40, dtype=torch.int64)
    for portion in (2**23 + 1, 2**24 - 1, *torch.randint(2**23 + 2, 2**24 - 1, (6,), generator=g)):
        probs = of_mass([int(portion), 2**24 - int(portion)])
        rest = {"indices": indices, "seed": 1, "filter_apply_order": order}
        tie = sample_exactly(probs, top_p=int(portion) / 2**24, **rest)
        assert set(tie) == {0}
        past = sample(probs, top_p=(int(portion) + 1) / 2**24, min_p=0.0, **rest)[0]
        assert torch.equal(past, sample(probs, **rest)[0])


def test_the_least_share_keeps_the_maximum_and_its_ties() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.1, 0.4], [0.25, 0.25, 0.3, 0.2]])
    indices = torch.arange(2).repeat(50)
    for top_p in (2.0**-24, 2.0**-25, 1e-30, 1e-45, 1e-300):
        tokens = torch.tensor(sample_exactly(probs, top_p=top_p, indices=indices, seed=3))
        assert set(tokens[indices == 0].tolist()) == {1, 3}
        assert set(tokens[indices == 1].tolist()) == {2}


def test_a_request_with_its_own_seed_is_drawn_alike_alone_and_in_company() -> None:
    probs = model_probs(1, 12, 333)
    seeds, offsets = torch.arange(12) * 7919 - 30000, torch.arange(12) % 3
    top_k, top_p = torch.arange(12) * 10, torch.linspace(0.3, 1, 12)
    together = sample(probs, top_k, top_p, seed=seeds, offset=offsets)[0]
    assert len(set(together.tolist())) > 4
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = sample(
        probs[order], top_k[order], top_p[order], seed=seeds[order], offset=offsets[order]
    )[0]
    assert torch.equal(shuffled, together[order])
    for row in range(12):
        part = slice(row, row + 1)
        alone = sample(
            probs[part], top_k[part], top_p[part], seed=seeds[part], offset=offsets[part]
        )
        number = sample(
            probs[part], int(top_k[row]), float(top_p[row]), seed=int(seeds[row]),
            offset=int(offsets[row]),
        )  # fmt: skip
        assert alone[0] == number[0] == together[row]


def test_one_seed_numbers_its_streams() -> None:
    """With masses of 1 the token is the high part of (random bits * V)."""
    vocab_size = 4999
    probs = of_mass([1] * vocab_size).expand(20, vocab_size)
    for seed, offset in ((0, 0), (-1, 5), (2**63 - 1, -(2**63)), (1 << 40, 1 << 35)):
        expected = [(uniform_in_python(seed, offset, b) * vocab_size) >> 64 for b in range(20)]
        assert sample(probs, seed=seed, offset=offset)[0].tolist() == expected
        as_tensors = {"seed": torch.tensor([seed]), "offset": torch.tensor([offset])}
        assert sample(probs, **as_tensors)[0].tolist() == expected
        same = sample(probs, seed=torch.full((20,), seed), offset=torch.full((20,), offset))[0]
        assert same.tolist() == [expected[0]] * 20


# Faults of earlier kernels for this op.


@pytest.mark.parametrize("vocab_size", (1, 3, 5, 31, 127, 129, 1001, 32001))
def test_odd_vocabulary(vocab_size: int) -> None:
    """Rows of odd length start misaligned; the last token of each must be reached."""
    probs = torch.zeros(5, vocab_size)
    probs[:, -1] = 1.0
    assert sample(probs, 2, 0.9, seed=0)[0].tolist() == [vocab_size - 1] * 5
    probs = of_mass([1] * vocab_size).expand(5, vocab_size).contiguous()
    expected = [(uniform_in_python(8, 0, b) * vocab_size) >> 64 for b in range(5)]
    assert sample(probs, seed=8)[0].tolist() == expected


def test_row_without_mass_is_token_0_and_invalid() -> None:
    probs = torch.tensor([[0.0, 1.0], [0.0, 0.0], [-1.0, -2.0], [1e-14, 0.0], [0.0, 2.0**-44]])
    for top_k, top_p in ((0, 1.0), (1, 0.5), (2, 0.9)):
        tokens, valid = sample(probs, top_k, top_p, min_p=0.5, seed=0)
        assert tokens.tolist() == [1, 0, 0, 0, 1]
        assert valid.tolist() == [True, False, False, False, True]


def test_more_indices_than_rows() -> None:
    probs = torch.eye(3, 10)
    indices = torch.tensor([2, 0, 1] * 100, dtype=torch.int32)
    assert sample(probs, 3, 0.9, indices=indices, seed=0)[0].tolist() == indices.tolist()


def test_replayed_trace_reads_seed_and_offset_anew() -> None:
    probs = model_probs(2, 6, 500)

    def step(probs: Tensor, seed: Tensor, offset: Tensor) -> Tensor:
        return sample(probs, 100, 0.95, seed=seed, offset=offset)[0]

    replay = make_fx(step)(probs, torch.tensor([1]), torch.tensor([0]))
    seen = set()
    for seed, offset in ((1, 0), (1, 1), (1, 2), (77, 0)):
        tokens = replay(probs, torch.tensor([seed]), torch.tensor([offset]))
        assert tokens.tolist() == sample(probs, 100, 0.95, seed=seed, offset=offset)[0].tolist()
        seen.add(tuple(tokens.tolist()))
    assert len(seen) == 4


def test_no_input_is_written() -> None:
    probs = odd_rows(torch.Generator().manual_seed(1), "signed", 6, 40)
    inputs = {
        "probs": probs, "top_k": torch.arange(6), "top_p": torch.linspace(-0.5, 1.5, 6),
        "min_p": torch.linspace(-0.5, 1.5, 6), "indices": torch.arange(-1, 7),
        "seed": torch.arange(8), "offset": torch.arange(8),
    }  # fmt: skip
    before = {name: value.clone() for name, value in inputs.items()}
    sample(**inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert SPEC.mutated == ()


# Seeds that torch draws.


def test_without_a_seed_torch_decides() -> None:
    probs = model_probs(4, 64, 1000)
    torch.manual_seed(0)
    first, second = sample(probs)[0], sample(probs)[0]
    torch.manual_seed(0)
    assert torch.equal(sample(probs)[0], first)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    seed = torch.empty(1, dtype=torch.int64).random_()
    assert torch.equal(sample(probs, seed=seed)[0], first)


def test_generator_is_used_and_the_default_left_alone() -> None:
    probs = model_probs(4, 64, 1000)
    before = torch.get_rng_state()
    draw = [sample(probs, generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    sample(probs, seed=1)
    sample(probs[:0])
    assert torch.equal(torch.get_rng_state(), before)


# Size and cost.


def test_full_vocabulary_equals_a_plain_sort() -> None:
    vocab_size, top_k, top_p, seed = 128256, 5000, 0.5, 99
    probs = model_probs(6, 2, vocab_size)
    for row, order in enumerate(ORDERS):
        p = probs[row].tolist()
        ranked = sorted(range(vocab_size), key=p.__getitem__, reverse=True)
        survivors = [i for i in ranked if p[i] >= p[ranked[top_k - 1]]]
        total = sum(int(p[i] * 2.0**44) for i in (ranked if order == "joint" else survivors))
        portion = math.floor(torch.tensor(top_p).item() * 2**24)
        mass = last = 0
        while mass * 2**24 < portion * total:
            mass += int(p[survivors[last]] * 2.0**44)
            last += 1
        support = [i for i in range(vocab_size) if p[i] >= p[survivors[last - 1]]]
        assert 100 < len(support) < top_k
        running = list(itertools.accumulate(int(p[i] * 2.0**44) for i in support))
        targets = [(uniform_in_python(seed, 0, b) * running[-1]) >> 64 for b in range(200)]
        expected = [support[bisect.bisect_right(running, target)] for target in targets]
        tokens = sample(
            probs, top_k, top_p, filter_apply_order=order, seed=seed,
            indices=torch.full((200,), row),
        )[0]  # fmt: skip
        assert tokens.tolist() == expected


def test_largest_vocabulary_does_not_overflow() -> None:
    """Total mass (2^19 - 1) * 2^44, of which the larger values hold a little less than half."""
    probs = torch.full((1, VOCAB_LIMIT - 1), 2.0)
    probs[:, ::2] = 1.0
    indices = torch.zeros(50, dtype=torch.int64)
    numbers = [uniform_in_python(1, 0, b) for b in range(50)]
    every = [(u * (VOCAB_LIMIT - 1)) >> 64 for u in numbers]
    larger = [((u * (VOCAB_LIMIT // 2 - 1)) >> 64) * 2 + 1 for u in numbers]
    for top_p, expected in ((1.0, every), (0.5, every), (0.49, larger), (2.0**-24, larger)):
        for order in ORDERS:
            tokens = sample(probs, top_p=top_p, filter_apply_order=order, indices=indices, seed=1)[
                0
            ]
            assert tokens.tolist() == expected


def test_deterministic_changes_nothing() -> None:
    probs = model_probs(8, 16, 700)
    call = {"top_k": 50, "top_p": 0.9, "seed": 3}
    either = [sample(probs, **call, deterministic=choice)[0] for choice in (True, False)]
    assert torch.equal(*either)


def test_probabilities_that_require_grad() -> None:
    probs = model_probs(8, 16, 700).requires_grad_()
    top_p = torch.full((16,), 0.9, requires_grad=True)
    tokens, valid = sample(probs, 50, top_p, min_p=top_p.detach() / 90, seed=3)
    plain = sample(probs.detach(), 50, 0.9, min_p=top_p.detach() / 90, seed=3)[0]
    assert torch.equal(tokens, plain) and not valid.requires_grad


def test_cost_counts_rows_once() -> None:
    args = SPEC.bind(torch.empty(4, 100), torch.empty(4, dtype=torch.int32), 0.9, seed=1)
    assert (SPEC.cost(args).read_bytes, SPEC.cost(args).write_bytes) == (4 * 400 + 16, 16)
    indices = torch.empty(2, dtype=torch.int64)
    args = SPEC.bind(torch.empty(4, 100).half(), 5, 0.9, indices=indices, return_valid=True)
    assert (SPEC.cost(args).read_bytes, SPEC.cost(args).write_bytes) == (2 * 200 + 16, 10)
    assert SPEC.cost(args).operations == 2 * 2 * 100


# Checks that no case can hold, for cases live on the CPU and in the clear.


@pytest.mark.parametrize("device", (torch.device("cuda:0"), DeviceDesc("musa", 0)), ids=str)
def test_generator_of_another_device(device: Any) -> None:
    probs = TensorDesc((2, 10), torch.float32, device)
    SPEC.validate(SPEC.bind(probs, 1, 0.9))
    with pytest.raises(ArgumentError, match=f"'generator'.*{device}.*one on cpu"):
        SPEC.validate(SPEC.bind(probs, 1, 0.9, generator=torch.Generator()))


def test_checks_and_shapes_work_on_symbolic_sizes() -> None:
    seen: list[TensorDesc] = []

    def step(probs: Tensor, top_k: Tensor, indices: Tensor, seed: Tensor) -> Tensor:
        args = SPEC.bind(probs, top_k, 0.9, indices=indices, seed=seed, return_valid=True)
        SPEC.validate(args)
        seen.extend(SPEC.outputs(args))
        return probs + 0

    indices = torch.arange(7) % 4
    make_fx(step, tracing_mode="symbolic")(
        torch.rand(4, 10), torch.arange(4), indices, torch.arange(7)
    )
    assert [desc.dtype for desc in seen] == [torch.int32, torch.bool]
    assert all(isinstance(desc.shape[0], torch.SymInt) for desc in seen)


# The compiled kernel, on the emulator.


@pytest.mark.parametrize("seed", range(3))
def test_kernel_equals_the_reference_on_random_rows(seed: int) -> None:
    compared, difference = exhaustive_sampling.compare("simt", "cpu", 300, seed)
    assert difference is None
    assert compared >= 300


def test_random_rows_would_show_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples drawn from neighbouring streams differ, and are reported."""
    call = {"probs": model_probs(0, 9, 500), "top_k": 0, "top_p": 1.0, "return_valid": True}
    assert exhaustive_sampling.first_difference("simt", {**call, "seed": 5}) is None
    exact = exhaustive_sampling.sample
    seeds = iter((5, 6))
    monkeypatch.setattr(
        exhaustive_sampling, "sample", lambda **call: exact(**call, seed=next(seeds))
    )
    assert "samples differ" in (exhaustive_sampling.first_difference("simt", call) or "")


@pytest.mark.parametrize("batch_size", [1, 5, 8, 9, 16, 17, 33, 66, 67, 132, 133, 512, 4096])
def test_clusters_are_of_as_many_blocks_as_their_way_asks_for(batch_size: int) -> None:
    for vocab_size in (4, 8192, 8196, 16384, 16388, 32000, 65536, 65540, 128256, 2**18):
        held, listed, summed = (
            native.cluster_blocks("sm_90a", batch_size, vocab_size, way) for way in native.WAYS
        )
        assert {held, listed, summed} <= {0, 1, 2, 4, 8, 16}
        assert listed > 0
        assert held == 0 or held * 2**14 >= vocab_size  # elements that a block can hold
        assert summed == held or 0 < summed * 2**14 < vocab_size
        assert summed > 0 or not 2**14 < vocab_size <= 160_000
    for arch, vocab_size in (("sm_80", 32000), ("sm_90a", 32002), ("sm_90a", 2**18 + 4)):
        ways = (native.cluster_blocks(arch, batch_size, vocab_size, way) for way in native.WAYS)
        assert not any(ways)


@pytest.mark.parametrize(
    "case",
    [case for case in SPEC.cases() if case.error is None and case.kind != "typical"][::6],
    ids=lambda case: case.name,
)
def test_several_blocks_a_row_draw_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases of short rows, which a block has for itself otherwise."""
    monkeypatch.setattr(native, "blocks_a_row", lambda batch_size, vocab_size: 5)
    outcome = run_case(SPEC.name, case, "simt")
    assert outcome.status == "passed", outcome.message


def test_kernel_on_the_largest_vocabulary() -> None:
    """Sums of masses up to 2^63, many of them in one thread."""
    probs = torch.ones(1, VOCAB_LIMIT - 1)
    probs[:, : VOCAB_LIMIT // 2] = 2.0
    call = {"indices": torch.zeros(2, dtype=torch.int64), "seed": 1}
    drawn = []
    for top_p in (0.49, 0.51):
        with kernelhub.use("simt"):
            drawn.append(sampling(probs, VOCAB_LIMIT - 2, top_p, **call))
        assert torch.equal(drawn[-1], SPEC.reference(probs, VOCAB_LIMIT - 2, top_p, **call))
    assert not torch.equal(*drawn)


def test_kernel_draws_a_seed_as_the_reference_does() -> None:
    probs = model_probs(4, 20, 1000)
    drawn = []
    for backend in ("reference", "simt"):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        with kernelhub.use(backend):
            both = sampling(probs, 50, 0.9), sampling(probs, 50, 0.9, generator=generator)
        drawn.append((*both, torch.get_rng_state(), generator.get_state()))
    assert all(map(torch.equal, *drawn))
    assert not torch.equal(drawn[0][0], drawn[0][1])


@pytest.mark.parametrize(
    ("blocks", "size", "message"),
    [
        (3, 6 * native.WORKSPACE_BYTES - 1, "workspace must have"),
        (3, None, "workspace must have"),
        (0, 0, "blocks_a_row"),
        (native.MOST_BLOCKS + 1, 80 * native.WORKSPACE_BYTES, "blocks_a_row"),
    ],
)
def test_launcher_refuses(blocks: int, size: int | None, message: str) -> None:
    """The size is that of the kernel: one byte less is too little, as many are enough."""
    launcher = simt.kernels.library(None).launcher(SPEC.name, "cpu", lambda index: 0)
    probs, tokens = model_probs(0, 2, 300), torch.zeros(2, dtype=torch.int32)

    def run(blocks: int, size: int | None) -> None:
        workspace = None if size is None else torch.zeros(size, dtype=torch.uint8)
        launcher(probs, *[None] * 6, tokens, None, workspace, 5, 0.9, 0.0, 7, 0, False, blocks, 0)

    with pytest.raises(KernelError, match=message):
        run(blocks, size)
    run(3, 6 * native.WORKSPACE_BYTES)
    assert torch.equal(tokens, SPEC.reference(probs, 5, 0.9, seed=7))
