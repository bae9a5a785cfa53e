"""Calls of rotary_embedding that every backend must get right, or refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernelhub.contracts._cases import every_second, misaligned, normal, padded_rows, transposed
from kernelhub.spec import Case

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_Make = Callable[[torch.Generator], dict[str, Any]]


def _cache(num_rows: int, rot_dim: int, dtype: torch.dtype, base: float = 1e4) -> Tensor:
    frequencies = base ** -(torch.arange(0, rot_dim, 2, dtype=torch.float64) / rot_dim)
    # From position 1, so that no row is the identity and a token turned by mistake shows.
    angles = torch.arange(1, num_rows + 1, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1).to(dtype)


def _call(
    g: torch.Generator,
    tokens: tuple[int, ...] = (3,),
    heads: tuple[int, int] = (3, 2),
    head_size: int = 20,
    *,
    rot_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype = torch.float32,
    num_rows: int = 50,
    flat: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    **changes: Any,
) -> dict[str, Any]:
    """The arguments of one call, where `changes` are put in the place of the usual ones."""
    rot_dim = head_size if rot_dim is None else rot_dim
    query, key = (normal(g, (*tokens, n, head_size), dtype) for n in heads)
    if flat:
        query, key = query.flatten(-2), key.flatten(-2)
    usual = {
        "positions": torch.randint(max(num_rows, 1), tokens, generator=g),
        "query": layout(query),
        "key": layout(key),
        "head_size": head_size,
        "cos_sin_cache": _cache(num_rows, rot_dim, cache_dtype),
    }
    return usual | changes


def _packed(
    g: torch.Generator, tokens: tuple[int, ...] = (3,), flat: bool = False, **call: Any
) -> dict[str, Any]:
    """Query and key are slices of one QKV tensor."""
    arguments = _call(g, tokens, flat=True, **call)
    query, key, size = arguments["query"], arguments["key"], arguments["head_size"]
    qkv = torch.cat((query, key, torch.zeros_like(key)), -1)
    arguments["query"] = qkv[..., : query.shape[-1]]
    arguments["key"] = qkv[..., query.shape[-1] : query.shape[-1] + key.shape[-1]]
    if not flat:
        for name in ("query", "key"):
            arguments[name] = arguments[name].view(*tokens, -1, size)
    return arguments


def _latent(g: torch.Generator, **call: Any) -> dict[str, Any]:
    """The rotary lanes of MLA: the tail of each query head, and of the one latent key."""
    arguments = _call(g, head_size=64, **call, is_neox=False)
    query, key = arguments["query"], arguments["key"]
    wide = torch.cat((torch.zeros(*query.shape[:-1], 128, dtype=query.dtype), query), -1)
    latent = torch.cat((torch.zeros(*key.shape[:-1], 512, dtype=key.dtype), key), -1)
    return arguments | {"query": wide[..., 128:], "key": latent[..., 512:]}


def _impulses(g: torch.Generator, **call: Any) -> dict[str, Any]:
    """One lane that is not zero in each head, a different one each, for a bound near zero."""
    arguments = _call(g, tokens=(5,), heads=(8, 4), num_rows=7, **call)
    for name, shift in (("query", 0), ("key", 3)):
        tensor = arguments[name]
        size = tensor.shape[-1]
        hot = (torch.arange(tensor.numel() // size) + shift) % size
        tensor.copy_(torch.nn.functional.one_hot(hot, size).view(tensor.shape) * 3.0)
    return arguments


def _swapped(t: Tensor) -> Tensor:
    """The same values with the first two dimensions swapped in memory: `[Hq, T, D]`."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def _token_gap(t: Tensor) -> Tensor:
    """The same values with two unused lanes after each token: whole heads, odd token strides."""
    return padded_rows(t.flatten(-2), 2).view(t.shape)


def _tag(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases() -> Iterator[Case]:
    yield from _typical()
    yield from _boundary()
    yield from _hostile()


def _typical() -> Iterator[Case]:
    bf16, fp16 = torch.bfloat16, torch.float16
    calls: dict[str, _Make] = {
        "llama-3-8b-t1-bf16": partial(
            _packed, tokens=(1,), heads=(32, 8), head_size=128, dtype=bf16, num_rows=600
        ),
        "qwen3-30b-t4-bf16-cache": partial(
            _packed, tokens=(4,), heads=(32, 4), head_size=128, dtype=bf16, cache_dtype=bf16,
            flat=True,
        ),
        "deepseek-v3-mla-t3-bf16": partial(_latent, tokens=(3,), heads=(128, 1), dtype=bf16),
        "gpt-j-6b-t2-fp16": partial(
            _call, tokens=(2,), heads=(16, 16), head_size=256, rot_dim=64, dtype=fp16,
            cache_dtype=fp16, is_neox=False,
        ),
        "phi-2-t3-fp16": partial(
            _call, tokens=(3,), heads=(32, 32), head_size=80, rot_dim=32, dtype=fp16
        ),
        "chatglm3-6b-t2-bf16": partial(
            _packed, tokens=(2,), heads=(32, 2), head_size=128, rot_dim=64, dtype=bf16,
            is_neox=False,
        ),
        "llama-3.2-1b-batch-2x3-fp32": partial(
            _call, tokens=(2, 3), heads=(32, 8), head_size=64, flat=True
        ),
        "longchat-7b-offsets-t4-fp16": partial(
            _call, tokens=(4,), heads=(32, 32), head_size=128, dtype=fp16, num_rows=80,
            positions=torch.tensor([3, 0, 39, 7]),
            cos_sin_cache_offsets=torch.tensor([0, 40, 40, 0]),
        ),
    }  # fmt: skip
    for name, make in calls.items():
        yield Case(name, "typical", make)


def _boundary() -> Iterator[Case]:
    for is_neox in (True, False):
        style = "neox" if is_neox else "gptj"
        for dtype in FLOATS:
            for cache_dtype in dict.fromkeys((torch.float32, dtype)):
                tag = f"{style}-{_tag(dtype)}-cache-{_tag(cache_dtype)}"
                call = partial(_call, dtype=dtype, cache_dtype=cache_dtype, is_neox=is_neox)
                yield Case(f"partial-{tag}", "boundary", partial(call, rot_dim=14))
                yield Case(
                    f"impulses-{tag}",
                    "boundary",
                    partial(
                        _impulses, head_size=9, rot_dim=6, dtype=dtype, cache_dtype=cache_dtype,
                        is_neox=is_neox,
                    ),
                )  # fmt: skip
            for layout in (padded_rows, transposed, every_second, misaligned, _swapped):
                yield Case(
                    f"{layout.__name__.strip('_')}-{style}-{_tag(dtype)}",
                    "boundary",
                    partial(_call, dtype=dtype, layout=layout, is_neox=is_neox, rot_dim=16),
                )
    for name, make in _shapes().items():
        yield Case(name, "boundary", make)


def _shapes() -> dict[str, _Make]:
    half, bf16 = torch.float16, torch.bfloat16
    scattered = torch.tensor([49, 0, 7, 7])
    return {
        "smallest": partial(_call, tokens=(1,), heads=(1, 1), head_size=2),
        "odd-head-size": partial(_call, tokens=(5,), head_size=7, rot_dim=6, dtype=half),
        "two-of-many-lanes": partial(_call, head_size=130, rot_dim=2, is_neox=False),
        "head-size-512": partial(_call, tokens=(1,), heads=(1, 1), head_size=512, dtype=bf16),
        "more-pairs-than-threads": partial(
            _call, tokens=(2,), heads=(2, 1), head_size=1040, rot_dim=1038
        ),
        "more-packs-than-threads": partial(_call, tokens=(2,), heads=(1, 1), head_size=1040),
        "many-heads-of-half-packs": partial(
            _call, tokens=(40,), heads=(9, 9), head_size=24, dtype=bf16
        ),
        "more-tokens-than-2^16": partial(_call, tokens=(2**16 + 1,), heads=(1, 0), head_size=8),
        "seventeen-tokens": partial(_call, tokens=(17,), heads=(1, 1), head_size=8, dtype=bf16),
        "more-keys-than-queries": partial(_call, heads=(2, 9), head_size=16, dtype=half),
        "one-query-many-keys": partial(_call, heads=(1, 33), head_size=8, is_neox=False),
        "no-key": _put(key=None),
        "no-key-flat": partial(_call, flat=True, key=None),
        "no-query-heads": partial(_call, heads=(0, 2)),
        "no-key-heads": partial(_call, heads=(2, 0), flat=True),
        "flat": partial(_call, flat=True, dtype=half),
        "flat-single-key-head": partial(_call, heads=(4, 1), flat=True),
        "flat-every-second": partial(_call, flat=True, layout=every_second),
        "flat-by-columns": partial(_call, flat=True, layout=transposed, rot_dim=10),
        "head-size-none": _put(head_size=None),
        "rot-dim-given": lambda g: _call(g, rot_dim=10) | {"rot_dim": 10},
        "batch": partial(_call, tokens=(2, 3), rot_dim=8),
        "batch-of-packs-sequence-first": partial(
            _call, tokens=(2, 3), heads=(2, 2), head_size=16, layout=_swapped
        ),
        "batch-flat": partial(_call, tokens=(3, 2), flat=True, is_neox=False, dtype=bf16),
        "batch-packed": partial(_packed, tokens=(2, 2), heads=(2, 3), dtype=half),
        "batch-sequence-first": partial(
            _call, tokens=(2, 3), heads=(2, 2), layout=_swapped
        ),
        "packed": partial(_packed, heads=(4, 2), head_size=18),
        "packed-flat": partial(_packed, heads=(4, 2), head_size=18, flat=True),
        "packed-interleaved-heads": _interleaved,
        "int32-positions": partial(
            _call, tokens=(4,), positions=scattered.int(), num_rows=50, dtype=half
        ),
        "first-and-last-row": partial(_call, tokens=(4,), positions=scattered, num_rows=50),
        "positions-expanded": partial(_call, positions=torch.tensor([5]).expand(3)),
        "positions-every-second": partial(_call, positions=torch.arange(6)[::2]),
        "int32-positions-every-second": partial(_call, positions=torch.arange(6).int()[1::2]),
        "positions-by-columns": partial(
            _call, tokens=(2, 3), positions=torch.arange(6).view(3, 2).t()
        ),
        "offsets": partial(
            _call, tokens=(4,), positions=scattered, num_rows=64,
            cos_sin_cache_offsets=torch.tensor([-9, 63, 0, 13]),
        ),
        "offsets-int32": partial(
            _call, tokens=(4,), positions=scattered, is_neox=False,
            cos_sin_cache_offsets=torch.tensor([-49, 11, 0, 22]).int(),
        ),
        "offsets-int64-with-int32-positions": partial(
            _call, positions=torch.tensor([1, 2, 2**31 - 1]).int(),
            cos_sin_cache_offsets=torch.tensor([5, 0, 9 - 2**31]),
        ),
        "offsets-batch": partial(
            _call, tokens=(2, 2), positions=scattered.view(2, 2),
            cos_sin_cache_offsets=torch.tensor([[0, 3], [1, 30]]).t(),
        ),
        "token-gap": partial(_call, head_size=64, dtype=torch.bfloat16, layout=_token_gap),
        "cache-misaligned-in-packs": partial(
            _call, head_size=64, cos_sin_cache=misaligned(_cache(50, 64, torch.float32))
        ),
        "cache-rows-padded": _put_cache(padded_rows),
        "cache-by-columns": _put_cache(transposed),
        "cache-every-second": _put_cache(every_second),
        "cache-misaligned": _put_cache(misaligned),
        "cache-expanded": _put_cache(lambda t: t[5:6].expand(50, -1)),
        "cache-one-row": partial(_call, num_rows=1),
        "cache-not-unit-circle": lambda g: _call(g, dtype=half, rot_dim=12)
        | {"cos_sin_cache": normal(g, (50, 12), scale=30.0)},
        "cancellation": _cancelling,
        "no-tokens": partial(_call, tokens=(0,)),
        "no-tokens-flat": partial(_call, tokens=(0,), flat=True, dtype=half),
        "no-tokens-batch": partial(_call, tokens=(2, 0)),
        "no-tokens-no-rows": partial(_call, tokens=(0,), num_rows=0, positions=torch.arange(0)),
    }  # fmt: skip


def _hostile() -> Iterator[Case]:
    nan, most = float("nan"), 2**63 - 1
    four = partial(_call, tokens=(4,), num_rows=50)
    calls: dict[str, _Make] = {
        "positions-out-of-range": partial(four, positions=torch.tensor([50, -1, 49, 10**9])),
        "positions-extreme-int64": partial(
            four, positions=torch.tensor([most, -most - 1, 2**32 + 3, 3]), dtype=torch.float16
        ),
        "positions-extreme-int32": partial(
            four, positions=torch.tensor([2**31 - 1, -(2**31), 3, 50]).int(), flat=True
        ),
        "positions-all-out-of-range": partial(
            four, positions=torch.tensor([50, -1, -50, 51]), rot_dim=8, is_neox=False
        ),
        "sum-out-of-range": partial(
            four, positions=torch.tensor([49, 0, 60, -5]),
            cos_sin_cache_offsets=torch.tensor([1, -1, -11, 5]),
        ),
        "sum-overflows-int64": partial(
            four, positions=torch.tensor([most, -most - 1, -most, most]),
            cos_sin_cache_offsets=torch.tensor([1, -most - 1, -most + 5, -most + 3]),
        ),
        "sum-overflows-int32": partial(
            four, positions=torch.tensor([2**31 - 1, -(2**31), -(2**31), 2]).int(),
            cos_sin_cache_offsets=torch.tensor([1, -(2**31), -(2**31) + 5, 3]).int(),
        ),
        "sum-beyond-int32": partial(
            four, positions=torch.tensor([2**32 + 3, 2**32, 5, 2**31]),
            cos_sin_cache_offsets=torch.tensor([0, 3 - 2**32, 2**32, 4 - 2**31]),
        ),
        "no-rows": partial(four, num_rows=0, positions=torch.tensor([0, 1, -1, 50])),
        "untouched-nan": lambda g: (
            _filled(four(g), nan) | {"positions": torch.tensor([50, 3, -1, 4])}
        ),
        "query-nan-and-inf": lambda g: _special(four(g, rot_dim=16), "query"),
        "key-nan-and-inf": lambda g: _special(four(g, is_neox=False, dtype=torch.float16), "key"),
        "cache-nan-and-inf": lambda g: _special(four(g), "cos_sin_cache"),
        "largest-fp16": lambda g: _filled(four(g, dtype=torch.float16), 65504.0),
        "subnormal-bf16": lambda g: _filled(four(g, dtype=torch.bfloat16), 1e-39),
    }  # fmt: skip
    for name, make in calls.items():
        yield Case(name, "hostile", make)
    for name, (argument, make) in _bad_calls().items():
        yield Case(name, "hostile", make, error=argument)


def _bad_calls() -> dict[str, tuple[str, _Make]]:
    """The usual call has query `[3, 3, 20]`, key `[3, 2, 20]` and cache `[50, 20]`."""
    zeros, ones = torch.zeros, torch.ones(3, dtype=torch.int64)
    flat = partial(_call, flat=True)
    return {
        "positions-none": ("positions", _put(positions=None)),
        "positions-float": ("positions", _put(positions=zeros(3))),
        "positions-int16": ("positions", _put(positions=ones.short())),
        "positions-list": ("positions", _put(positions=[0, 1, 2])),
        "positions-scalar": ("positions", _put(positions=torch.tensor(1))),
        "positions-too-few": ("positions", _put(positions=ones[:2])),
        "positions-one-for-all": ("positions", _put(positions=ones[:1])),
        "positions-transposed": (
            "positions", partial(_call, tokens=(2, 3), positions=ones.new_ones(3, 2))
        ),
        "query-none": ("query", _put(query=None)),
        "query-int": ("query", _put(query=zeros(3, 3, 20, dtype=torch.int32))),
        "query-fp64": ("query", _put(query=zeros(3, 3, 20, dtype=torch.float64))),
        "query-one-dimension": ("query", _put(query=zeros(60))),
        "query-four-dimensions": ("query", _put(query=zeros(3, 1, 3, 20))),
        "query-without-lanes": ("query", partial(_call, tokens=(3, 3), query=zeros(3, 3))),
        "query-expanded": ("query", _put(query=zeros(1, 3, 20).expand(3, 3, 20))),
        "query-windows": ("query", _put(query=zeros(80).as_strided((3, 3, 20), (10, 20, 1)))),
        "key-dtype": ("key", _put(key=zeros(3, 2, 20, dtype=torch.float16))),
        "key-tokens": ("key", _put(key=zeros(2, 2, 20))),
        "key-head-size": ("key", _put(key=zeros(3, 2, 18))),
        "key-flat": ("key", _put(key=zeros(3, 40))),
        "key-not-flat": ("key", partial(flat, key=zeros(3, 2, 20))),
        "key-flat-not-a-multiple": ("key", partial(flat, key=zeros(3, 50))),
        "key-expanded": ("key", _put(key=zeros(3, 1, 20).expand(3, 2, 20))),
        "key-is-query": ("key", _overlapping(slice(0, 3))),
        "key-shares-a-head": ("key", _overlapping(slice(2, 5))),
        "key-shares-a-lane": ("key", _shifted),
        "head-size-text": ("head_size", _put(head_size="20")),
        "head-size-float": ("head_size", _put(head_size=20.0)),
        "head-size-bool": ("head_size", _put(head_size=True)),
        "head-size-differs": ("head_size", _put(head_size=10)),
        "head-size-huge": ("head_size", _put(head_size=2**70)),
        "head-size-missing": ("head_size", lambda g: flat(g) | {"head_size": None}),
        "head-size-zero": ("head_size", lambda g: flat(g) | {"head_size": 0}),
        "head-size-negative": ("head_size", lambda g: flat(g) | {"head_size": -20}),
        "head-size-not-a-divisor": ("head_size", lambda g: flat(g) | {"head_size": 40}),
        "cache-none": ("cos_sin_cache", _put(cos_sin_cache=None)),
        "cache-dtype": ("cos_sin_cache", _put(cos_sin_cache=zeros(50, 20, dtype=torch.float16))),
        "cache-bf16-for-fp16": (
            "cos_sin_cache", partial(_call, dtype=torch.float16, cache_dtype=torch.bfloat16)
        ),
        "cache-one-dimension": ("cos_sin_cache", _put(cos_sin_cache=zeros(20))),
        "cache-odd": ("cos_sin_cache", _put(cos_sin_cache=zeros(50, 19))),
        "cache-empty-rows": ("cos_sin_cache", _put(cos_sin_cache=zeros(50, 0))),
        "cache-wider-than-a-head": ("cos_sin_cache", _put(cos_sin_cache=zeros(50, 22))),
        "cache-wider-than-a-flat-head": (
            "cos_sin_cache", lambda g: flat(g) | {"head_size": 10}
        ),
        "cache-wider-than-no-lanes": (
            "cos_sin_cache",
            _put(query=zeros(3, 3, 0), key=zeros(3, 2, 0), head_size=0),
        ),
        "cache-sparse": ("cos_sin_cache", _put(cos_sin_cache=zeros(50, 20).to_sparse())),
        "rot-dim-narrower": ("rot_dim", _put(rot_dim=10)),
        "rot-dim-wider": ("rot_dim", _put(rot_dim=22)),
        "rot-dim-zero": ("rot_dim", _put(rot_dim=0)),
        "rot-dim-negative": ("rot_dim", _put(rot_dim=-20)),
        "rot-dim-text": ("rot_dim", _put(rot_dim="20")),
        "is-neox-int": ("is_neox", _put(is_neox=1)),
        "is-neox-none": ("is_neox", _put(is_neox=None)),
        "offsets-int": ("cos_sin_cache_offsets", _put(cos_sin_cache_offsets=3)),
        "offsets-float": ("cos_sin_cache_offsets", _put(cos_sin_cache_offsets=zeros(3))),
        "offsets-too-few": ("cos_sin_cache_offsets", _put(cos_sin_cache_offsets=ones[:2])),
        "offsets-dimensions": ("cos_sin_cache_offsets", _put(cos_sin_cache_offsets=ones[None])),
    }  # fmt: skip


def _put(**changes: Any) -> _Make:
    """The usual call with arguments of the op replaced."""
    return lambda g: _call(g) | changes


def _put_cache(layout: Callable[[Tensor], Tensor]) -> _Make:
    def make(g: torch.Generator) -> dict[str, Any]:
        arguments = _call(g, rot_dim=12, dtype=torch.bfloat16)
        return arguments | {"cos_sin_cache": layout(arguments["cos_sin_cache"])}

    return make


def _interleaved(g: torch.Generator) -> dict[str, Any]:
    """Query and key of one head group lie next to each other: `[T, groups, 3, D]`."""
    groups = normal(g, (3, 4, 3, 16))
    return _call(g, head_size=16) | {"query": groups[:, :, 0], "key": groups[:, :, 1]}


def _overlapping(heads: slice) -> _Make:
    def make(g: torch.Generator) -> dict[str, Any]:
        packed = normal(g, (3, 5, 20))
        return _call(g) | {"query": packed[:, :3], "key": packed[:, heads]}

    return make


def _shifted(g: torch.Generator) -> dict[str, Any]:
    """Flat slices of one row, the key one lane too early."""
    packed = normal(g, (3, 100))
    return _call(g, flat=True) | {"query": packed[:, :60], "key": packed[:, 59:99]}


def _cancelling(g: torch.Generator) -> dict[str, Any]:
    """Pairs on the line where `x c - y s` all but vanishes."""
    arguments = _call(g, tokens=(4,), num_rows=9, positions=torch.tensor([1, 5, 8, 2]))
    cos, sin = arguments["cos_sin_cache"][arguments["positions"], None].tensor_split(2, -1)
    x = normal(g, (4, 3, 10))
    arguments["query"].copy_(torch.cat((x, x * cos / sin), -1))
    return arguments


def _filled(arguments: dict[str, Any], value: float) -> dict[str, Any]:
    arguments["query"].fill_(value)
    arguments["key"].fill_(-value)
    return arguments


def _special(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """NaN and infinities here and there among ordinary values."""
    flat = arguments[name].view(-1)
    flat[::7], flat[3::11], flat[5::13] = float("nan"), float("inf"), float("-inf")
    return arguments
