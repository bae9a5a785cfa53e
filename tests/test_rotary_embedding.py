"""rotary_embedding: the definition against complex numbers, and the faults of earlier kernels."""

from __future__ import annotations

import cmath
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from kernelhub.contracts import rotary_embedding as contract
from kernelhub.contracts.rotary_embedding import SPEC
from kernelhub.errors import ArgumentError
from kernelhub.spec import Case, Cost, DeviceDesc, TensorDesc

CASES = list(SPEC.cases())
MOST = 2**63 - 1


def rotate(*arguments: Any, **options: Any) -> None:
    SPEC.validate(SPEC.bind(*arguments, **options))
    assert SPEC.reference(*arguments, **options) is None


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angle(row: int, frequency: int) -> float:
    return (row + 1) * 0.7**frequency


def cache(num_rows: int, rot_dim: int) -> Tensor:
    """`[P, rot_dim]` of the angles above; no row is the identity."""
    rows = [[angle(row, i) for i in range(rot_dim // 2)] for row in range(num_rows)]
    angles = torch.tensor(rows, dtype=torch.float64)
    return torch.cat((angles.cos(), angles.sin()), -1).float()


def turned(head: list[float], row: int, rot_dim: int, is_neox: bool) -> list[float]:
    """One head as complex numbers times exp(i * angle)."""
    head = list(head)
    for i in range(rot_dim // 2):
        re, im = (i, i + rot_dim // 2) if is_neox else (2 * i, 2 * i + 1)
        pair = complex(head[re], head[im]) * cmath.exp(1j * angle(row, i))
        head[re], head[im] = pair.real, pair.imag
    return head


def same_bits(a: Tensor, b: Tensor) -> bool:
    width = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(width), b.contiguous().view(width))


def assert_within_bound(case: Case) -> None:
    arguments = case.arguments()
    expected = SPEC.oracle(SPEC.bind(**arguments), None)
    rotate(**arguments)
    for wanted in expected:
        got = arguments[wanted.name]
        assert got.shape == wanted.value.shape
        limit = torch.finfo(got.dtype).max
        near = (got.double() - wanted.value).abs() <= wanted.bound
        special = ~wanted.value.isfinite() & (
            (got.double() == wanted.value) | (got.isnan() & wanted.value.isnan())
        )
        overflow = got.isinf() & (wanted.value.abs() + wanted.bound > limit)
        assert (near | special | overflow).all(), f"{case.name}: {wanted.name}"


@pytest.mark.parametrize("case", [c for c in CASES if not c.error], ids=lambda c: c.name)
def test_reference_keeps_the_bound(case: Case) -> None:
    assert_within_bound(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.error], ids=lambda c: c.name)
def test_a_bad_call_is_refused(case: Case) -> None:
    with pytest.raises(ArgumentError) as caught:
        SPEC.validate(SPEC.bind(**case.arguments()))
    assert caught.value.argument == case.error


@pytest.mark.parametrize("is_neox", [True, False])
def test_oracle_multiplies_complex_numbers(is_neox: bool) -> None:
    positions = [4, 0, 9, 6]  # 9 is out of range
    query, key = normal(4, 2, 7), normal(4, 3, 7, seed=1)
    args = SPEC.bind(torch.tensor(positions), query, key, 7, cache(7, 6), is_neox)
    for tensor, expected in zip((query, key), SPEC.oracle(args, None), strict=True):
        for token, row in enumerate(positions):
            for head in range(tensor.shape[1]):
                before = tensor[token, head].tolist()
                value, bound = expected.value[token, head], expected.bound[token, head]
                after = before if row == 9 else turned(before, row, 6, is_neox)
                # The cache holds cosines rounded to fp32.
                assert value.tolist() == pytest.approx(after, abs=1e-6)
                assert (bound[:6] > 0).all() == (row != 9)
                assert bound[:6].max() < 1e-6
                assert bound[6] == 0


@pytest.mark.parametrize("is_neox", [True, False])
def test_scores_depend_on_the_distance_alone(is_neox: bool) -> None:
    table = cache(40, 16)
    query, key = normal(1, 1, 16).expand(4, 2, 16).clone(), normal(1, 1, 16, seed=1).repeat(4, 2, 1)
    before = query.norm(dim=-1)
    rotate(torch.tensor([5, 9, 30, 31]), query, None, None, table, is_neox)
    rotate(torch.tensor([2, 6, 27, 30]), key, None, None, table, is_neox)
    scores = (query * key).sum(-1)
    torch.testing.assert_close(query.norm(dim=-1), before, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores[:3], scores[:1].expand(3, 2), rtol=1e-4, atol=1e-4)
    assert (scores[3] - scores[0]).abs().min() > 0.1


# The faults of earlier kernels.


@pytest.mark.parametrize("num_rows", [0, 5])
@pytest.mark.parametrize("shape", [(0, 2, 8), (0, 16), (3, 0, 16), (0, 3, 2, 8)])
def test_no_tokens(shape: tuple[int, ...], num_rows: int) -> None:
    tokens = shape[: -1 if shape[-1] == 16 else -2]  # 16 lanes are two heads side by side
    query = torch.empty(shape)
    arguments = {
        "positions": torch.zeros(tokens, dtype=torch.int64),
        "query": query,
        "key": query.clone(),
        "head_size": 8,
        "cos_sin_cache": torch.ones(num_rows, 8),
    }
    assert [e.value.shape for e in SPEC.oracle(SPEC.bind(**arguments), None)] == [shape, shape]
    rotate(**arguments)
    assert query.shape == shape
    assert SPEC.cost(SPEC.bind(**arguments)) == Cost(0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("is_neox", [True, False])
def test_positions_out_of_range_leave_their_token(dtype: torch.dtype, is_neox: bool) -> None:
    info = torch.iinfo(dtype)
    positions = torch.tensor([6, -1, 3, info.max, info.min, 5], dtype=dtype)
    query, key = normal(6, 2, 8, dtype=torch.bfloat16), normal(6, 1, 8, dtype=torch.bfloat16)
    query[0, 0, 0] = key[1, 0, 5] = float("nan")
    before = query.clone(), key.clone()
    rotate(positions, query, key, 8, cache(6, 8), is_neox)
    for after, old in zip((query, key), before, strict=True):
        for token in (0, 1, 3, 4):
            assert same_bits(after[token], old[token])
        for token, row in ((2, 3), (5, 5)):
            wanted = [turned(head, row, 8, is_neox) for head in old[token].tolist()]
            error = after[token].double() - torch.tensor(wanted, dtype=torch.float64)
            assert error.abs().max() < 2**-7  # values below 4, rounded once to bf16


@pytest.mark.parametrize(
    ("position", "offset"),
    [(MOST, 1), (-MOST - 1, -MOST - 1), (-MOST, -MOST), (-MOST + 1, -MOST + 1), (5, 1), (2, -3)],
)
def test_a_sum_out_of_range_leaves_its_token(position: int, offset: int) -> None:
    query = normal(2, 1, 4)
    before = query.clone()
    rotate(
        torch.tensor([position, 1]),
        query,
        None,
        4,
        cache(6, 4),
        cos_sin_cache_offsets=torch.tensor([offset, 1]),
    )
    assert same_bits(query[0], before[0])
    for got, wanted in zip(
        query[1, 0].tolist(), turned(before[1, 0].tolist(), 2, 4, True), strict=True
    ):
        assert got == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64])
def test_offsets_are_added_to_positions(
    position_dtype: torch.dtype, offset_dtype: torch.dtype
) -> None:
    positions = torch.tensor([2**31 - 1, 3, 0], dtype=position_dtype)
    offsets = torch.tensor([7 - 2**31, -1, 5], dtype=offset_dtype)
    shifted, plain = normal(3, 2, 8), normal(3, 2, 8)
    rotate(positions, shifted, None, 8, cache(9, 8), cos_sin_cache_offsets=offsets)
    rotate(torch.tensor([6, 2, 5]), plain, None, 8, cache(9, 8))
    assert same_bits(shifted, plain)


@pytest.mark.parametrize("head_size", [4, 8, 24])
def test_head_size_decides_where_heads_begin(head_size: int) -> None:
    flat, heads = normal(3, 24), normal(3, 24).view(3, -1, head_size)
    expected = [
        [turned(head, row, 4, True) for head in token] for row, token in enumerate(heads.tolist())
    ]
    for query in (flat, heads):
        rotate(torch.arange(3), query, None, head_size, cache(3, 4))
    assert same_bits(flat, heads.reshape(3, 24))
    torch.testing.assert_close(heads, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 5), (2, 3), (0, 2), (7, 1)])
def test_more_key_heads_than_query_heads(num_heads: int, num_kv_heads: int) -> None:
    query, key = normal(2, num_heads, 6), normal(2, num_kv_heads, 6, seed=1)
    expected = [
        [[turned(h, row, 6, False) for h in token] for row, token in enumerate(t.tolist())]
        for t in (query, key)
    ]
    rotate(torch.arange(2), query, key, 6, cache(2, 6), False)
    for tensor, wanted in zip((query, key), expected, strict=True):
        torch.testing.assert_close(tensor, torch.tensor(wanted).view_as(tensor), rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_neox", [True, False])
def test_lanes_past_rot_dim_and_the_values_of_a_packed_tensor(is_neox: bool) -> None:
    packed = normal(5, 2 + 3 + 3, 10, dtype=torch.float16)
    packed[:, :, 6:] = float("nan")  # arithmetic on them would show
    before = packed.clone()
    query, key = before[:, :2].clone(), before[:, 2:5].clone()
    for q, k in ((query, key), (packed[:, :2], packed[:, 2:5])):
        rotate(torch.arange(5), q, k, None, cache(5, 6), is_neox, rot_dim=6)
    assert same_bits(packed[:, :, 6:], before[:, :, 6:])
    assert same_bits(packed[:, 5:], before[:, 5:])
    assert same_bits(packed[:, :2], query)
    assert same_bits(packed[:, 2:5], key)
    assert not (packed[:, :5, :6] == before[:, :5, :6]).all(-1).any()


def test_a_token_alone_equals_the_token_in_company() -> None:
    positions, table = torch.arange(16) * 3 % 17, cache(17, 8)
    together = normal(16, 3, 12, dtype=torch.bfloat16)
    alone = together.clone()
    rotate(positions, together, None, 12, table)
    for token in range(16):
        one = slice(token, token + 1)
        rotate(positions[one], alone[one], None, 12, table)
    assert same_bits(together, alone)


def test_what_is_only_read_stays() -> None:
    read = {
        "positions": torch.tensor([1, 8, -1]),
        "cos_sin_cache": cache(4, 4),
        "cos_sin_cache_offsets": torch.tensor([0, 0, 3]),
    }
    before = {name: tensor.clone() for name, tensor in read.items()}
    rotate(**read, query=normal(3, 1, 4), key=normal(3, 1, 4), head_size=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in read.items())


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_gradients_turn_back(is_neox: bool, flat: bool) -> None:
    """Of an orthogonal map the gradient is its inverse; a token out of range passes it through."""
    leaf, upstream = normal(3, 2, 8).requires_grad_(), normal(3, 2, 8, seed=2)
    inverse = cache(5, 6)
    inverse[:, 3:].neg_()  # the opposite angles
    query = leaf * 1.0
    rotate(
        torch.tensor([4, 5, 2]), query.flatten(1) if flat else query, None, 8, cache(5, 6), is_neox
    )
    query.backward(upstream)
    expected = upstream.clone()
    rotate(torch.tensor([4, 5, 2]), expected, None, 8, inverse, is_neox)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-6)
    assert torch.equal(leaf.grad[1], upstream[1])


def test_gradients_reach_a_learned_table() -> None:
    table = cache(3, 2).requires_grad_()
    x, y = 3.0, -2.0
    query = torch.tensor([[[x, y]]]) * 1.0
    rotate(torch.tensor([1]), query, None, 2, table)
    query.backward(torch.tensor([[[1.0, 10.0]]]))
    assert table.grad is not None
    # d/dc of (x c - y s, y c + x s), and d/ds
    assert table.grad.tolist() == [[0, 0], [x + 10 * y, -y + 10 * x], [0, 0]]


# Metadata: overlap, descriptions, symbolic sizes.

LAYOUT = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), max_size=3)


def elements(t: Tensor) -> set[int]:
    strides = t.stride()
    indices = itertools.product(*(range(size) for size in t.shape))
    return {
        t.storage_offset() + sum(i * s for i, s in zip(index, strides, strict=True))
        for index in indices
    }


@given(LAYOUT, LAYOUT, st.integers(0, 30), st.integers(0, 30))
def test_shared_memory_is_decided_exactly(
    a: list[tuple[int, int]], b: list[tuple[int, int]], start_a: int, start_b: int
) -> None:
    memory = torch.zeros(30 + 3 * 3 * 9 + 1)
    first, second = (
        memory.as_strided([size for size, _ in layout], [stride for _, stride in layout], start)
        for layout, start in ((a, start_a), (b, start_b))
    )
    shared = not elements(first).isdisjoint(elements(second))
    assert contract._share_memory(first, second) == shared


def test_a_large_packed_tensor_is_never_refused() -> None:
    positions, table = torch.empty(4096, dtype=torch.int64), torch.empty(8, 64)
    packed = torch.empty(4096, 48 * 128, dtype=torch.bfloat16)
    flat = packed[:, : 32 * 128], packed[:, 32 * 128 : 40 * 128]
    heads = [t.view(4096, -1, 128) for t in flat]
    heads_first = [t.transpose(0, 1) for t in packed.view(48, 4096, 128).split((40, 8))]
    for query, key in (flat, heads, [t[..., 64:] for t in heads], heads_first):
        size = 128 if query.dim() == 2 else None
        SPEC.validate(SPEC.bind(positions, query, key, size, table))
    last_query_head = packed[:, 31 * 128 : 32 * 128].view(4096, 1, 128)
    with pytest.raises(ArgumentError, match="apart from 'query'"):
        SPEC.validate(SPEC.bind(positions, heads[0], last_query_head, None, table))


def test_descriptions_of_unknown_devices_are_checked() -> None:
    musa = DeviceDesc("musa", 0)
    table = TensorDesc((64, 128), torch.float32, musa)
    query = TensorDesc((4, 32, 128), torch.bfloat16, musa)
    positions = TensorDesc((4,), torch.int64, musa)
    SPEC.validate(SPEC.bind(positions, query, query, None, table))
    assert SPEC.outputs(SPEC.bind(positions, query, query, None, table)) == ()
    with pytest.raises(ArgumentError, match=r"'positions'.*musa:0"):
        SPEC.validate(SPEC.bind(torch.zeros(4).long(), query, None, None, table))
    with pytest.raises(ArgumentError, match=r"'head_size'.*D = 128"):
        SPEC.validate(SPEC.bind(positions, query, None, 64, table))


def test_check_leaves_the_number_of_tokens_symbolic() -> None:
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)

    def fake(t: Tensor) -> Any:
        dims = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (t.dim() - 1)]
        return mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dims))

    packed = torch.zeros(6, 8, 16)
    query, key = fake(packed[:, :4]), fake(packed[:, 4:6])
    positions, offsets = fake(torch.zeros(6).long()), fake(torch.zeros(6).long())
    SPEC.validate(
        SPEC.bind(
            positions, query, key, 16, fake(cache(9, 16)), rot_dim=16, cos_sin_cache_offsets=offsets
        )
    )
    for tensor in (query, key, positions, offsets):
        assert isinstance(tensor.shape[0], torch.SymInt)
        assert tensor.shape[0].node.maybe_as_int() is None
    assert all("Eq" in str(guard.expr) for guard in shapes.guards), shapes.guards


def test_cost() -> None:
    args = SPEC.bind(
        torch.zeros(5).int(),
        normal(5, 4, 16, dtype=torch.bfloat16),
        normal(5, 2, 16, dtype=torch.bfloat16),
        16,
        cache(3, 8),
        cos_sin_cache_offsets=torch.zeros(5).long(),
    )
    lanes = 5 * (4 + 2) * 8
    read = lanes * 2 + 5 * 4 + 5 * 8 + 3 * 8 * 4
    assert SPEC.cost(args) == Cost(read, lanes * 2, 3 * lanes)
