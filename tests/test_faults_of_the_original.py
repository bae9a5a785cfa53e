"""The faults of the kernels that these replace, each in the situation that broke them.

Those kernels had no numerical test. Here each compiled kernel runs on the emulator, and its numbers
are held to the op's float64 truth, to the bytes around every tensor, and to the same bits for each
row alone and in company (`run_case`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernelhub
from kernelhub import registry
from kernelhub.backends.native import abi, tiles
from kernelhub.backends.simt import _kernels, configure
from kernelhub.backends.simt.options import Options, from_environment
from kernelhub.contracts._weights import fp8_arguments, int4_arguments
from kernelhub.spec import Case
from kernelhub.testing import compare, run_case
from tests.test_vendor import CSRC, clang, compile_only

BF16, FP8, HALF = torch.bfloat16, torch.float8_e4m3fn, torch.float16
FLOATS = (torch.float32, HALF, BF16)
FAR = 2**31  # elements; more than an int counts

gemv = kernelhub.op("fused_gemv").on("simt")
moe = kernelhub.op("fused_moe_gemv").on("simt")
mul_add = kernelhub.op("fused_mul_add").on("simt")
rotary = kernelhub.op("rotary_embedding").on("simt")
sample = kernelhub.op("top_k_top_p_sampling_from_probs").on("simt")


def holds(op: str, **arguments: Any) -> None:
    """The op's whole judgement of one call."""
    outcome = run_case(op, Case("fault", "hostile", lambda g: arguments), "simt")
    assert outcome.status == "passed", outcome.message


def close(op: str, got: Tensor, **arguments: Any) -> bool:
    """Whether a result is within its bound of the truth."""
    spec = registry.spec(op)
    (expected,) = spec.oracle(spec.bind(**arguments), None)
    return compare(expected, got) <= 1


def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=g()).to(dtype)


def scheme(name: str, n: int, k: int, m: int = 3, lead: tuple[int, ...] = ()) -> dict[str, Any]:
    """x and weight in one of the schemes, and the scales that it needs."""
    x = normal(m, k, dtype=BF16)
    if name == "dense":
        return {"x": x, "weight": normal(*lead, n, k, dtype=BF16)}
    if name == "int4":
        group = 32 if k % 32 == 0 else None
        return {"x": x, **int4_arguments(g(), n, k, group=group, zeros=True, lead=lead)}
    made = {"x": x, **fp8_arguments(g(), n, k, lead=lead)}
    if name == "w8a8":
        made |= {"x": x.to(FP8), "x_scale": normal(m, -(-k // 128)).abs()}
    return made


SCHEMES = ("dense", "fp8", "w8a8", "int4")


# ---- fused_moe_gemv ----------------------------------------------------------------------------


def test_the_moe_op_can_be_called_by_its_one_name() -> None:
    """It was declared under one name and implemented under another."""
    x = torch.tensor([[1.0, 2.0]])
    weight = torch.tensor([[[1.0, 0.0]], [[10.0, 100.0]]])
    ids = torch.tensor([[1, 0]], dtype=torch.int32)
    with kernelhub.use("simt"):
        by_name = kernelhub.op("fused_moe_gemv")(x, weight, ids)
    nothing = (None,) * 6
    by_torch = torch.ops.kernelhub.fused_moe_gemv(x, weight, ids, *nothing, False, None, "simt")
    assert by_name.tolist() == by_torch.tolist() == [[[210.0], [1.0]]]


@pytest.mark.parametrize("scale", ["block", "channel", "tensor"])
@pytest.mark.parametrize("n", [100, 128, 200])
def test_moe_scales_of_fp8_are_each_experts_own(n: int, scale: Any) -> None:
    """They were indexed flat over experts, as if N were a multiple of 128."""
    weights = fp8_arguments(g(), n, 192, scale=scale, lead=(3,))
    ids = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32)
    holds("fused_moe_gemv", x=normal(2, 192, dtype=BF16), topk_ids=ids, **weights)


def test_topk_ids_of_64_bits() -> None:
    """They were read as pairs of 32 bits."""
    weight = torch.arange(1.0, 5.0).view(4, 1, 1)
    ids = torch.tensor([[3, 1], [2, 0], [-1, 2**32 + 1]])
    y = moe(torch.ones(3, 1), weight, ids)
    assert y.flatten().tolist() == [4, 2, 3, 1, 0, 0]
    assert torch.equal(moe(torch.ones(2, 1), weight, ids[:2].int()), y[:2])


# ---- int4 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [128, 256, 1024])
def test_int4_per_channel_where_k_is_a_multiple_of_128(k: int) -> None:
    """The scale of group k / 128 was read, where there is one group."""
    holds("fused_gemv", x=normal(2, k, dtype=HALF), **int4_arguments(g(), 24, k, zeros=True))
    ids = torch.tensor([[1, 0]])
    weights = int4_arguments(g(), 24, k, lead=(2,))
    holds("fused_moe_gemv", x=normal(1, k, dtype=BF16), topk_ids=ids, **weights)


@pytest.mark.parametrize("k", [32, 128])
def test_int4_with_one_group_is_not_signed(k: int) -> None:
    """Nibbles became two's complement where there was one column of scales."""
    codes = torch.arange(16, dtype=torch.uint8)
    weight = (codes | codes << 4).unsqueeze(1).expand(16, k // 2).contiguous()
    y = gemv(torch.ones(1, k, dtype=BF16), weight, None, torch.full((16, 1), 0.5), group_size=k)
    assert y.flatten().tolist() == [(code - 8) / 2 * k for code in range(16)]


# ---- epilogues ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_rms_norm_of_every_row_and_gamma(m: int, gamma: torch.dtype) -> None:
    """Right for one row only, and gamma was taken for bf16."""
    holds(
        "fused_gemv",
        x=normal(m, 40, dtype=HALF),
        weight=normal(72, 40, dtype=HALF),
        norm_weight=(normal(72) + 2).to(gamma),
    )


def test_rms_norm_waits_for_no_other_block() -> None:
    """Blocks spun until all had come: for ever, where the device does not hold them at once."""
    with options(threads=1, timeout_s=60.0):
        holds(
            "fused_gemv",
            x=normal(2, 16),
            weight=normal(9001, 16),
            norm_weight=normal(9001).abs(),
        )


@pytest.mark.parametrize("order", ["forward", "reverse", "random:1", "random:2"])
@pytest.mark.parametrize("name", SCHEMES)
def test_swiglu_in_every_order_of_threads(name: str, order: str) -> None:
    """Gate and up met in shared memory without a barrier."""
    arguments = {**scheme(name, 2 * 33, 1024), "activation": "swiglu"}
    spec = registry.spec("fused_gemv")
    shape_class = tiles.classes_of("fused_gemv", spec.bind(**arguments))
    for tile in tiles.tiles_for(shape_class, "warp32"):
        with tiles.override({"fused_gemv": {shape_class: tile}}):
            first = gemv(**arguments)
            with options(*order.split(":")):
                holds("fused_gemv", **arguments)
                assert torch.equal(gemv(**arguments), first)


class options:  # noqa: N801
    """Other options of the emulator for a block."""

    def __init__(self, order: str = "forward", seed: str = "0", **others: Any) -> None:
        own = from_environment()
        self.given = Options(own.warp, order, int(seed), sanitize=own.sanitize, **others)

    def __enter__(self) -> None:
        configure(_kernels.library(None), self.given)

    def __exit__(self, *failure: object) -> None:
        configure(_kernels.library(None), from_environment())


# ---- tails and strides -------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 9, 15, 18, 31, 33, 62, 66, 130])
@pytest.mark.parametrize("name", SCHEMES)
def test_k_need_not_be_a_multiple_of_8_16_or_32(name: str, k: int) -> None:
    """Whole vectors were read at the end of a row. NaN lies behind the last one here."""
    if name == "int4" and k % 2:
        k += 1  # two codes a byte
    holds("fused_gemv", **scheme(name, 5, k))
    ids = torch.tensor([[1], [0], [1]])
    holds("fused_moe_gemv", topk_ids=ids, **scheme(name, 5, k, lead=(2,)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("numel", [*range(1, 18), 1023])
def test_mul_add_writes_nothing_past_the_end(numel: int, dtype: torch.dtype) -> None:
    """It stored 8 elements at a time, the last 8 too."""
    x, bias = normal(numel, dtype=dtype), normal(numel, dtype=dtype).flip(0)
    memory = torch.full((numel + 32,), 7.0, dtype=dtype)
    mul_add(x, bias, 2.5, out=memory[16:-16])
    assert memory[:16].eq(7).all() and memory[-16:].eq(7).all()
    assert close("fused_mul_add", memory[16:-16], x=x, bias=bias, scale=2.5)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_mul_add_of_permuted_inputs(order: tuple[int, ...]) -> None:
    """Elements were taken in the order of memory."""
    x = normal(3, 4, 5).permute(order)
    bias = normal(60).flip(0).view(x.shape)
    assert torch.equal(mul_add(x, bias, 2.0), (x.double() * 2 + bias.double()).float())


# ---- offsets beyond 2^31 -----------------------------------------------------------------------


def far_apart(t: Tensor, dim: int) -> Tensor:
    """The same values, neighbours along `dim` 2^31 elements apart; what is between is not used."""
    stride = [FAR if d == dim else step for d, step in enumerate(t.contiguous().stride())]
    memory = torch.empty((t.shape[dim] - 1) * FAR + t.numel(), dtype=t.dtype)
    placed = memory.as_strided(t.shape, stride)
    assert placed.copy_(t).stride(dim) == FAR
    return placed


@pytest.mark.parametrize("dim", [0, 1])
def test_far_offsets_of_mul_add(dim: int) -> None:
    x, bias = normal(2, 2, dtype=HALF), normal(2, 2, dtype=HALF)
    y = mul_add(far_apart(x, dim), bias, 2.0, out=far_apart(torch.zeros_like(x), dim))
    assert torch.equal(y, (x.double() * 2 + bias.double()).half())


@pytest.mark.parametrize("dim", [0, 1])
def test_far_offsets_of_rotary_embedding(dim: int) -> None:
    angle = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])  # a quarter turn, none, another
    query = normal(2, 2, 2, dtype=BF16)
    far = far_apart(query, dim)
    rotary(torch.tensor([0, 2]), far, None, None, angle)
    turned = torch.stack((-query[..., 1], query[..., 0]), -1)
    assert torch.equal(far, turned * torch.tensor([1, -1]).view(2, 1, 1))


@pytest.mark.parametrize("name", ["x", "weight", "out"])
def test_far_offsets_of_gemv(name: str) -> None:
    given = scheme("int4", 2, 64, m=2)
    near = gemv(**given)
    placed = {**given, "out": torch.zeros_like(near)}
    placed[name] = far_apart(placed[name], 0)
    assert torch.equal(gemv(**placed), near)
    assert close("fused_gemv", near, **given)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["weight_scale", "weight_zero", "x_scale"])
def test_far_offsets_of_scales(name: str, dim: int) -> None:
    # Two groups: what lies between is asked for, if not used.
    given = scheme("w8a8", 2, 256, m=2) if name == "x_scale" else scheme("int4", 2, 64, m=2)
    if name == "weight_scale":
        given[name] = given[name].half()
    placed = {**given, name: far_apart(given[name], dim)}
    assert torch.equal(gemv(**placed), gemv(**given))


@pytest.mark.parametrize(
    ("name", "dim"),
    [("weight", 0), ("topk_ids", 0), ("topk_ids", 1)],
)
def test_far_offsets_of_experts(name: str, dim: int) -> None:
    ids = torch.tensor([[1, 0], [1, 1]], dtype=torch.int32)
    given = {**scheme("fp8", 2, 64, m=2, lead=(2,)), "topk_ids": ids}
    near = moe(**given)
    assert torch.equal(moe(**{**given, name: far_apart(given[name], dim)}), near)
    assert close("fused_moe_gemv", near, **given)


@pytest.mark.parametrize("dim", [0, 1])
def test_far_offsets_of_probs(dim: int) -> None:
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).bfloat16()
    assert sample(far_apart(probs, dim), 0, 1.0, seed=3).tolist() == [0, 1]


# ---- rotary_embedding --------------------------------------------------------------------------


def cache(rows: int, rot_dim: int) -> Tensor:
    angle = torch.arange(1, rows + 1).unsqueeze(1) / torch.arange(1, rot_dim // 2 + 1)
    return torch.cat((angle.cos(), angle.sin()), -1)


def test_rotary_embedding_of_no_tokens() -> None:
    """A grid of no blocks was launched."""
    empty = torch.empty(0, 2, 8)
    rotary(torch.empty(0, dtype=torch.int64), empty, empty.clone(), None, cache(4, 8))
    positions = torch.empty(0, dtype=torch.int64)
    holds(
        "rotary_embedding",
        **{"positions": positions, "query": empty, "key": None, "head_size": None},
        cos_sin_cache=cache(4, 8),
    )


@pytest.mark.parametrize("position", [-1, 4, 2**31, -(2**62)])
def test_rotary_embedding_out_of_range_changes_nothing(position: int) -> None:
    """Rows before and behind the cache were read."""
    query = normal(3, 2, 8)
    before = query.clone()
    rotary(torch.tensor([0, position, 2]), query, None, None, cache(4, 8))
    assert torch.equal(query[1], before[1])
    assert not torch.equal(query[0], before[0]) and not torch.equal(query[2], before[2])


@pytest.mark.parametrize("is_neox", [True, False])
def test_rotary_embedding_heeds_the_head_size(is_neox: bool) -> None:
    """Heads were taken to be as wide as the cache."""
    flat = normal(3, 2 * 24)
    holds(
        "rotary_embedding",
        **{"positions": torch.tensor([3, 1, 2]), "query": flat, "key": flat[:, :24].clone()},
        **{"head_size": 24, "cos_sin_cache": cache(4, 16), "is_neox": is_neox},
    )


# ---- sampling ----------------------------------------------------------------------------------


def both(probs: Tensor, top_k: Any, top_p: Any, **rest: Any) -> tuple[list[int], list[bool]]:
    """Tokens and their validity, by the kernel and the same by the reference."""
    found = sample(probs, top_k, top_p, **rest, return_valid=True)
    reference = registry.spec("top_k_top_p_sampling_from_probs").reference
    assert all(map(torch.equal, found, reference(probs, top_k, top_p, **rest, return_valid=True)))
    return found[0].tolist(), found[1].tolist()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 3, 7, 31, 1001])
def test_sampling_of_odd_vocabularies_at_odd_addresses(vocab_size: int, dtype: torch.dtype) -> None:
    """Rows were read in vectors, aligned or not."""
    memory = torch.full((1 + 5 * vocab_size,), 9.0, dtype=dtype)
    probs = memory[1:].view(5, vocab_size)
    probs.copy_(torch.softmax(normal(5, vocab_size), -1))
    tokens, valid = both(probs, 5, 0.9, seed=11)
    assert all(valid) and max(tokens) < vocab_size


def test_sampling_of_a_row_of_zeros() -> None:
    """What came out was whatever shared memory held."""
    probs = torch.zeros(3, 100)
    probs[1, 42] = 1.0
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.9), (5, 0.9)):
        assert both(probs, top_k, top_p, seed=1) == ([0, 42, 0], [False, True, False])


def test_more_samples_than_rows() -> None:
    """Only as many as there are rows were drawn."""
    indices = torch.tensor([1, 0, 1, 1, 0, 1, 0])
    tokens, _ = both(torch.eye(2), 0, 1.0, indices=indices, seed=5)
    assert tokens == indices.tolist()


def test_a_replay_reads_its_seeds_anew() -> None:
    """The generator's state was read on the host, once, when a graph was captured."""
    launch = _kernels.library(None).launcher("top_k_top_p_sampling_from_probs", "cpu", lambda i: 0)
    probs = torch.softmax(normal(64, 500), -1)
    seed, offset = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    tokens = torch.empty(64, dtype=torch.int32)
    same = (probs, None, None, None, None, seed, offset, tokens, None, None, 9, 0.9, 0.0, 0, 0)
    drawn = []
    for new_seed, new_offset in ((1, 0), (2, 0), (2, 1)):
        seed.fill_(new_seed)
        offset.fill_(new_offset)
        launch(*same, False, 1, 0)  # all that a graph keeps is the same
        reference = registry.spec("top_k_top_p_sampling_from_probs").reference
        assert torch.equal(tokens, reference(probs, 9, 0.9, seed=new_seed, offset=new_offset))
        drawn.append(tokens.tolist())
    assert drawn[0] != drawn[1] != drawn[2]


@pytest.mark.parametrize("op", abi.OPS)
def test_the_schema_says_what_is_written(op: str) -> None:
    """The sampler's output was not declared as written; weights and caches were."""
    schema = getattr(torch.ops.kernelhub, op).default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == (["query", "key"] if op == "rotary_embedding" else [])


def test_a_compiled_program_sees_the_tokens_that_are_drawn() -> None:
    """With an output that is not declared, its reader may come before its writer."""

    def program(probs: Tensor, seed: Tensor) -> Tensor:
        return sample(probs, 0, 1.0, seed=seed) * 2

    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    probs, seed = torch.eye(4), torch.tensor([3])
    assert compiled(probs, seed).tolist() == [0, 2, 4, 6]
    assert compiled(probs.flip(0), seed).tolist() == [6, 4, 2, 0]


# ---- the compiler ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", sorted(CSRC.glob("musa/*.mu")), ids=lambda path: path.name)
def test_compiles_for_mp_22(source: Path, tmp_path: Path) -> None:
    """They used names and types that only mp_31 has. The declarations have none of those."""
    compile_only(clang("device", source), tmp_path)
    only_mp_31 = {"__mt_fp8_e4m3", "__nv_fp8_e4m3", "__hfma2_relu", "__float22bfloat162_rn"}
    assert not only_mp_31 & set(source.read_text().replace("(", " ").split())


@pytest.fixture(autouse=True)
def same_options() -> Iterator[None]:
    """However a test ends, the next one finds the emulator as it was."""
    yield
    configure(_kernels.library(None), from_environment())
