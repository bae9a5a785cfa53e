"""The cases of fused_gemv: every scheme in sizes, layouts and data that kernels get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from kernelhub.contracts import _weights
from kernelhub.contracts._cases import every_second, misaligned, normal, padded_rows, transposed
from kernelhub.contracts._weights import (
    FLOATS,
    FP8,
    PACKED,
    fp8_arguments,
    int4_arguments,
    scales,
)
from kernelhub.spec import Case

BF16 = torch.bfloat16
_LAYOUTS = (padded_rows, transposed, every_second, misaligned)


def _call(
    g: torch.Generator,
    weights: Literal["dense", "w8a16", "w8a8", "w4a16"],
    m: int,
    n: int,
    k: int,
    *,
    dtype: torch.dtype = BF16,
    x_scale: Literal["group", "row", "tensor"] = "group",
    bias: torch.dtype | None = None,
    norm: torch.dtype | None = None,
    options: dict[str, Any] | None = None,
    **how: Any,
) -> dict[str, Any]:
    """Arguments of one scheme: `how` goes to what makes its weight, `options` to the op."""
    made: dict[str, Any] = {"x": normal(g, (m, k), dtype)}
    if weights == "dense":
        made["weight"] = normal(g, (n, k), dtype)
    elif weights == "w4a16":
        made |= int4_arguments(g, n, k, **how)
    else:
        made |= fp8_arguments(g, n, k, **how)
    if weights == "w8a8":
        groups = _weights.num_groups(k, how.get("group", 128))
        made["x"] = normal(g, (m, k), scale=8.0).to(FP8)
        made["x_scale"] = scales(g, {"group": (m, groups), "row": (m, 1), "tensor": (1,)}[x_scale])
    if how.get("group") and weights != "dense":
        made["group_size"] = how["group"]
    if bias is not None:
        made["bias"] = normal(g, (n,), bias, scale=math.sqrt(k) / 4)
    if norm is not None:
        made["norm_weight"] = normal(g, (n,), norm)
    return made | (options or {})


def _make(*args: Any, **kwargs: Any) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda g: _call(g, *args, **kwargs)


def _altered(
    make: Callable[[torch.Generator], dict[str, Any]], **changes: Any
) -> Callable[[torch.Generator], dict[str, Any]]:
    """The same arguments, with `changes`: values, or functions of the old ones."""

    def altered(g: torch.Generator) -> dict[str, Any]:
        made = make(g)
        for name, change in changes.items():
            made[name] = change(made.get(name)) if callable(change) else change
        return made

    return altered


def _filled(t: Tensor, index: Any, value: float) -> Tensor:
    """A copy with `value` at `index`; fp8 has no indexed assignment of its own on all devices."""
    copy = t.float()
    copy[index] = value
    return copy.to(t.dtype)


def cases() -> Iterator[Case]:
    yield from _typical_cases()
    yield from _scheme_cases()
    yield from _epilogue_cases()
    yield from _shape_cases()
    yield from _whole_slices()
    yield from _planted_cases()
    yield from _hostile_data_cases()
    yield from _bad_calls()


def _typical_cases() -> Iterator[Case]:
    """K of named models, N cut down to keep the float64 truth cheap."""
    swiglu = {"activation": "swiglu"}
    for name, make in (
        ("llama3-8b-down-m1-bf16", _make("dense", 1, 64, 14336)),
        (
            "llama3-8b-gate-up-m4-fp16",
            _make("dense", 4, 128, 4096, dtype=torch.float16, options=swiglu),
        ),
        ("qwen2.5-7b-kv-m1-bf16-bias", _make("dense", 1, 256, 3584, bias=BF16)),
        ("qwen3-30b-router-m16-fp32", _make("dense", 16, 128, 2048, dtype=torch.float32)),
        ("qwen3-30b-down-m4-int4", _make("w4a16", 4, 256, 768, group=128)),
        (
            "llama3-8b-gate-up-m1-awq",
            _make(
                "w4a16",
                1,
                128,
                4096,
                dtype=torch.float16,
                group=128,
                packed=torch.int32,
                zeros=True,
                options=swiglu,
            ),
        ),
        ("mixtral-8x7b-o-m16-int4-channel", _make("w4a16", 16, 96, 4096)),
        ("deepseek-v3-down-m1-w8a8", _make("w8a8", 1, 192, 2048)),
        ("deepseek-v3-gate-up-m7-w8a8", _make("w8a8", 7, 64, 7168, options=swiglu)),
        ("qwen3-8b-o-m2-w8a16", _make("w8a16", 2, 160, 4096)),
        (
            "llama3-70b-o-m16-w8a16-channel",
            _make("w8a16", 16, 64, 8192, scale="channel", dtype=torch.float16),
        ),
        (
            "llama4-scout-qkv-m1-w8a8-tensor",
            _make("w8a8", 1, 96, 5120, scale="tensor", x_scale="tensor"),
        ),
        ("minimax-m2-qk-norm-m4-bf16", _make("dense", 4, 128, 3072, norm=BF16)),
    ):
        yield Case(name, "typical", make)


def _scheme_cases() -> Iterator[Case]:
    for m in (1, 2, 7, 16, 17):
        for weights in ("dense", "w8a16", "w8a8", "w4a16"):
            how = {"group": 32} if weights == "w4a16" else {}
            yield Case(f"{weights}-m{m}", "boundary", _make(weights, m, 48, 160, **how))
    for dtype in (torch.float32, torch.float16):
        yield Case(f"dense-{_tag(dtype)}", "boundary", _make("dense", 7, 33, 200, dtype=dtype))

    packings = ((torch.uint8, torch.float32), (torch.int8, BF16), (torch.int32, torch.float16))
    for i, group in enumerate((32, 64, 128, None)):
        for zeros in (False, True):
            packed, scale_dtype = packings[(i + zeros) % 3]
            yield Case(
                f"int4-g{group or 'K'}-{'zeros' if zeros else 'symmetric'}-{_tag(packed)}",
                "boundary",
                _make(
                    "w4a16",
                    3,
                    20,
                    256,
                    group=group,
                    packed=packed,
                    zeros=zeros,
                    scale_dtype=scale_dtype,
                ),
            )
    for packed in PACKED:
        for scale_dtype in FLOATS:
            yield Case(
                f"int4-{_tag(packed)}-scale-{_tag(scale_dtype)}",
                "boundary",
                _make(
                    "w4a16",
                    2,
                    9,
                    192,
                    group=64,
                    packed=packed,
                    zeros=True,
                    scale_dtype=scale_dtype,
                    dtype=torch.float16,
                ),
            )
    # One group in all: nothing about the encoding may follow from the single scale column.
    yield Case("int4-one-group", "boundary", _make("w4a16", 2, 16, 128, group=128))
    yield Case(
        "int4-group-not-given",
        "boundary",
        _altered(_make("w4a16", 2, 16, 192, group=64), group_size=None),
    )

    for scale, group in (
        ("block", 128),
        ("block", 64),
        ("block", 32),
        ("channel", 128),
        ("tensor", 128),
    ):
        for x_scale in ("group", "row", "tensor"):
            # Neither N nor K is a multiple of the block: the last one is short.
            yield Case(
                f"w8a8-{scale}-g{group}-x-{x_scale}",
                "boundary",
                _make("w8a8", 3, 150, 168, scale=scale, group=group, x_scale=x_scale),
            )
        yield Case(
            f"w8a16-{scale}-g{group}",
            "boundary",
            _make("w8a16", 2, 150, 168, scale=scale, group=group, dtype=torch.float16),
        )
    # Blocks of K by K; N beyond one block and within one.
    for n in (70, 20):
        yield Case(f"w8a16-g-is-K-n{n}", "boundary", _make("w8a16", 2, n, 24, group=24))
    # The [N, 1] of channels is the shape of blocks of one element as well.
    yield Case("w8a16-blocks-of-one", "boundary", _make("w8a16", 2, 9, 1, group=1))
    yield Case("w8a16-one-block-or-channel", "boundary", _make("w8a16", 2, 1, 40))
    yield Case(
        "w8a8-x-scale-leading-dims",
        "boundary",
        _altered(
            _make("w8a8", 6, 10, 200),
            x=lambda x: x.view(2, 3, 200),
            x_scale=lambda s: s.view(2, 3, 2),
        ),
    )


def _epilogue_cases() -> Iterator[Case]:
    for weights in ("dense", "w8a16", "w8a8", "w4a16"):
        how = {"group": 32} if weights == "w4a16" else {}
        for activation, bias in (
            ("swiglu", None),
            ("swiglu", BF16),
            ("silu", torch.float32),
            ("gelu_tanh", torch.float16),
        ):
            yield Case(
                f"{weights}-{activation}{'-bias' if bias else ''}",
                "boundary",
                _make(weights, 3, 38, 96, bias=bias, options={"activation": activation}, **how),
            )
        yield Case(f"{weights}-norm", "boundary", _make(weights, 5, 38, 96, norm=BF16, **how))
    for dtype in FLOATS:
        tag = _tag(dtype)
        yield Case(f"bias-{tag}", "boundary", _make("dense", 3, 21, 40, bias=dtype))
        # Bias first, then the mean over a row of its own, whatever the row's number.
        yield Case(
            f"norm-{tag}",
            "boundary",
            _make(
                "dense",
                17,
                33,
                24,
                bias=torch.float32,
                norm=dtype,
                options={"out_dtype": torch.float32},
            ),
        )
        yield Case(
            f"out-dtype-{tag}", "boundary", _make("w4a16", 2, 9, 64, options={"out_dtype": dtype})
        )
        yield Case(
            f"w8a8-out-dtype-{tag}",
            "boundary",
            _make("w8a8", 2, 9, 64, options={"out_dtype": dtype}),
        )
        yield Case(
            f"dense-out-dtype-{tag}",
            "boundary",
            _make("dense", 2, 9, 64, dtype=torch.float16, options={"out_dtype": dtype}),
        )
    yield Case(
        "gelu-is-tanh",
        "boundary",
        _make("dense", 9, 33, 8, dtype=torch.float32, options={"activation": "gelu"}),
    )
    # Rows of very different sizes: eps counts in one and not in the next.
    yield Case(
        "norm-eps-large",
        "boundary",
        _altered(
            _make("dense", 4, 33, 16, norm=BF16, dtype=torch.float32, options={"eps": 0.5}),
            x=lambda x: x * torch.tensor([[1e-3], [1.0], [1e3], [0.0]]),
        ),
    )
    yield Case(
        "norm-eps-zero",
        "boundary",
        _make("dense", 2, 33, 16, norm=torch.float32, dtype=torch.float32, options={"eps": 0}),
    )
    for n in (1, 300):
        make = _make("dense", 3, n, 16, norm=torch.float32, dtype=torch.float32)
        yield Case(f"norm-n{n}", "boundary", make)
    for activation in ("silu", "gelu_tanh", "swiglu"):
        # From the far left, where results underflow, to the far right.
        yield Case(
            f"{activation}-wide-range",
            "boundary",
            _altered(
                _make("dense", 64, 2, 1, dtype=torch.float32, options={"activation": activation}),
                x=torch.linspace(-120, 120, 64).view(64, 1),
                weight=torch.tensor([[1.0], [0.9]]),
            ),
        )


def _shape_cases() -> Iterator[Case]:
    for k in (1, 2, 3, 7, 9, 15, 17, 31, 33, 127, 129, 257):
        dtype = FLOATS[k % 3]
        yield Case(f"dense-k{k}-{_tag(dtype)}", "boundary", _make("dense", 2, 3, k, dtype=dtype))
        yield Case(f"w8a16-k{k}", "boundary", _make("w8a16", 2, 3, k))
        if k % 3 == 0:
            yield Case(f"w8a8-k{k}", "boundary", _make("w8a8", 2, 3, k))
    for k in (2, 4, 6, 10, 14, 18, 34, 66, 130):
        yield Case(f"int4-k{k}", "boundary", _make("w4a16", 2, 3, k, zeros=k % 3 == 0))
    for k in (8, 24, 40, 264):
        yield Case(f"int4-int32-k{k}", "boundary", _make("w4a16", 2, 3, k, packed=torch.int32))
    for n in (1, 2, 5, 65, 129):
        weights = ("dense", "w8a16", "w8a8", "w4a16")[n % 4]
        yield Case(f"{weights}-n{n}", "boundary", _make(weights, 2, n, 64))
    for weights in ("dense", "w8a16", "w8a8"):  # whole vectors, more rows than a tile has
        yield Case(f"{weights}-k256", "boundary", _make(weights, 3, 70, 256))
    # Rows begin at vectors and end within one.
    for weights, k in (("dense", 61), ("w8a16", 61), ("w4a16", 58)):
        yield Case(
            f"padded-to-vectors-{weights}",
            "boundary",
            _altered(_make(weights, 3, 9, k), x=padded_rows, weight=padded_rows),
        )
    for layout in _LAYOUTS:
        for weights in ("dense", "w8a16", "w8a8", "w4a16"):
            how = {"group": 32, "zeros": True} if weights == "w4a16" else {"group": 64}
            names = ("x", "weight") + {
                "dense": (),
                "w8a16": ("weight_scale",),
                "w8a8": ("weight_scale", "x_scale"),
                "w4a16": ("weight_scale", "weight_zero"),
            }[weights]
            yield Case(
                f"{layout.__name__}-{weights}",
                "boundary",
                _altered(
                    _make(weights, 3, 70, 96, **({} if weights == "dense" else how)),
                    **dict.fromkeys(names, layout),
                ),
            )
        yield Case(
            f"{layout.__name__}-int32",
            "boundary",
            _altered(_make("w4a16", 3, 10, 96, packed=torch.int32), weight=layout),
        )
    # Contiguous by torch's reckoning, whatever the stride of the lone column.
    for n, layout in ((1, every_second), (9, lambda w: transposed(torch.cat([w, w], 1))[:, :1])):
        yield Case(
            f"lone-column-int32-n{n}",
            "boundary",
            _altered(_make("w4a16", 2, n, 8, packed=torch.int32), weight=layout),
        )
    yield Case(
        "every-second-vectors",
        "boundary",
        _altered(
            _make("dense", 3, 10, 24, bias=BF16, norm=BF16),
            bias=every_second,
            norm_weight=every_second,
        ),
    )
    yield Case(
        "x-expanded", "boundary", _altered(_make("dense", 1, 10, 24), x=lambda x: x.expand(5, 24))
    )
    yield Case("x-rank-1", "boundary", _altered(_make("w4a16", 1, 10, 64), x=lambda x: x[0]))
    yield Case(
        "x-rank-1-w8a8",
        "boundary",
        _altered(_make("w8a8", 1, 10, 200), x=lambda x: x[0], x_scale=lambda s: s[0]),
    )
    yield Case(
        "x-rank-4",
        "boundary",
        _altered(_make("dense", 12, 10, 24), x=lambda x: x.view(2, 3, 2, 24)),
    )
    yield Case(
        "out-strided",
        "boundary",
        _altered(_make("w8a16", 3, 10, 24), out=lambda _: torch.empty(3, 20, dtype=BF16)[:, ::2]),
    )
    for weights in ("dense", "w8a16", "w8a8", "w4a16"):
        yield Case(f"{weights}-m0", "boundary", _make(weights, 0, 10, 64))
        yield Case(f"{weights}-n0", "boundary", _make(weights, 3, 0, 64))
        yield Case(f"{weights}-k0", "boundary", _make(weights, 3, 10, 0))
    yield Case(
        "k0-epilogue",
        "boundary",
        _altered(_make("dense", 3, 10, 0, norm=BF16), bias=torch.arange(10.0)),
    )


def _whole_slices() -> Iterator[Case]:
    """K of whole slices of 128 and rows for several tiles: what kernels for long rows serve."""
    half = torch.float16
    swiglu = {"activation": "swiglu"}
    for name, make in (
        ("bf16", _make("dense", 3, 272, 512)),
        ("bf16-m17-swiglu", _make("dense", 17, 272, 256, bias=BF16, options=swiglu)),
        ("fp16-silu", _make("dense", 9, 272, 512, dtype=half, options={"activation": "silu"})),
        ("bf16-long", _make("dense", 3, 272, 4224)),
        ("fp16-long-swiglu", _make("dense", 9, 272, 4224, dtype=half, options=swiglu)),
        ("w8a16", _make("w8a16", 3, 272, 512)),
        ("w8a16-m17-swiglu", _make("w8a16", 17, 272, 256, bias=BF16, options=swiglu)),
        ("w8a16-channel-fp16", _make("w8a16", 9, 272, 512, scale="channel", dtype=half)),
        ("w8a16-tensor", _make("w8a16", 1, 272, 256, scale="tensor")),
        ("int4", _make("w4a16", 3, 272, 512, group=128, scale_dtype=BF16)),
        ("int4-m17-swiglu", _make("w4a16", 17, 272, 512, group=128, scale_dtype=BF16, bias=BF16,
                                  options=swiglu)),
        ("int4-fp16", _make("w4a16", 9, 272, 768, dtype=half, group=128, scale_dtype=half)),
        ("int4-zeros", _make("w4a16", 3, 272, 512, group=128, zeros=True)),
        ("int4-zeros-fp16", _make("w4a16", 17, 272, 512, dtype=half, group=128, scale_dtype=half,
                                  zeros=True)),
        ("int4-whole-row", _make("w4a16", 3, 272, 512, scale_dtype=BF16)),
    ):  # fmt: skip
        yield Case(f"whole-slices-{name}", "boundary", make)
    nan = _altered(_make("w8a16", 3, 272, 512), weight=lambda w: _filled(w, (130, 300), math.nan))
    yield Case("whole-slices-w8a16-nan", "boundary", nan)


def _planted_cases() -> Iterator[Case]:
    """Few terms in a sum, so that the bound is about one element and any one mistake shows."""
    exact = {"out_dtype": torch.float32}
    for name, make in (
        ("dense", _make("dense", 72, 11, 72, options=exact)),
        ("w8a16", _make("w8a16", 136, 67, 136, group=64, options=exact)),
        ("int4", _make("w4a16", 96, 11, 96, group=32, options=exact)),
        (
            "int4-zeros-int32",
            _make("w4a16", 64, 11, 64, zeros=True, packed=torch.int32, options=exact),
        ),
    ):
        # Row m is the m-th unit vector: the result is the dequantised weight itself, transposed.
        yield Case(
            f"impulse-{name}", "boundary", _altered(make, x=lambda x: torch.eye(len(x), dtype=BF16))
        )
    yield Case(
        "impulse-w8a8",
        "boundary",
        _altered(_make("w8a8", 136, 7, 136, options=exact), x=lambda x: torch.eye(136).to(FP8)),
    )
    for weights in ("dense", "w8a16", "w4a16"):
        k = 258  # past a vector of 16, past two blocks of 128
        for where in (0, 127, 128, 255, 257):
            yield Case(
                f"lone-{weights}-at-{where}",
                "boundary",
                _altered(
                    _make(weights, 2, 5, k),
                    x=lambda x, i=where: _filled(torch.zeros_like(x), (1, i), 1000),
                ),
            )
    # The last row's last element outweighs the rest.
    yield Case(
        "large-last",
        "boundary",
        _altered(_make("dense", 3, 7, 37), weight=lambda w: _filled(w, (-1, -1), 3e4)),
    )
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    yield Case(
        "fp8-all-codes-weight",
        "boundary",
        lambda g: {
            "x": torch.ones(1, 1, dtype=BF16),
            "weight": codes.view(256, 1),
            "weight_scale": torch.tensor([1.0]),
            "out_dtype": torch.float32,
        },
    )
    yield Case(
        "fp8-all-codes-x",
        "boundary",
        lambda g: {
            "x": codes.view(256, 1),
            "weight": torch.ones(2, 1).to(FP8),
            "x_scale": torch.tensor([1.0]),
            "weight_scale": torch.tensor([[1.0], [0.5]]),
            "out_dtype": torch.float32,
        },
    )
    yield Case(
        "int4-all-bytes",
        "boundary",
        lambda g: {
            "x": torch.eye(2, dtype=BF16),
            "weight": torch.arange(256, dtype=torch.uint8).view(256, 1),
            "weight_scale": scales(g, (256, 1)),
            "out_dtype": torch.float32,
        },
    )
    yield Case(
        "cancellation",
        "boundary",
        _altered(
            _make("dense", 2, 6, 64, dtype=torch.float32),
            x=lambda x: torch.cat([x[:, :32], -x[:, :32]], 1),
            weight=lambda w: torch.cat([w[:, :32], w[:, :32] + 1e-5 * w[:, 32:]], 1),
        ),
    )


def _hostile_data_cases() -> Iterator[Case]:
    for weights in ("dense", "w8a16", "w4a16"):
        for value in (math.nan, math.inf):
            # In one row of x: the other rows must not notice.
            yield Case(
                f"{weights}-x-{value}",
                "hostile",
                _altered(_make(weights, 3, 9, 64), x=lambda x, v=value: _filled(x, (1, 63), v)),
            )
    yield Case(
        "dense-weight-nan",
        "hostile",
        _altered(_make("dense", 3, 9, 33), weight=lambda w: _filled(w, (8, 32), math.nan)),
    )
    yield Case(
        "w8a8-x-nan",
        "hostile",
        _altered(_make("w8a8", 3, 9, 33), x=lambda x: _filled(x, (2, 32), math.nan)),
    )
    # NaN at each place of a vector of codes, one to a row.
    places = (range(16), range(16))
    for weights, name in (("w8a16", "weight"), ("w8a8", "weight"), ("w8a8", "x")):
        yield Case(
            f"{weights}-{name}-nan-at-each-place",
            "hostile",
            _altered(_make(weights, 17, 18, 16), **{name: lambda t: _filled(t, places, math.nan)}),
        )
    # In each vector of 16 codes along K, one to a row.
    vectors = (range(32), range(5, 512, 16))
    yield Case(
        "w8a16-nan-in-each-vector",
        "hostile",
        _altered(_make("w8a16", 3, 33, 512), weight=lambda w: _filled(w, vectors, math.nan)),
    )
    for weights in ("w8a16", "w4a16"):
        how = {"scale": "channel"} if weights == "w8a16" else {}
        for value in (math.nan, math.inf, 0.0, -2.0):
            yield Case(
                f"{weights}-scale-{value}",
                "hostile",
                _altered(
                    _make(weights, 3, 9, 64, **how),
                    weight_scale=lambda s, v=value: _filled(s, (4, 0), v),
                ),
            )
    # All products of one sign, as infinite sums of two would make a NaN of their own.
    for weights, name, k in (
        ("w8a16", "weight_scale", 64),
        ("w8a8", "x_scale", 64),
        ("w4a16", "weight_scale", 128),
    ):
        code = 0x99 if weights == "w4a16" else 1
        yield Case(
            f"{weights}-{name}-inf-of-ones",
            "hostile",
            _altered(
                _make(weights, 3, 9, k),
                x=lambda x: torch.ones(x.shape).to(x.dtype),
                weight=lambda w, c=code: torch.full(w.shape, c).to(w.dtype),
                **{name: lambda s: _filled(s, (0, 0), math.inf)},
            ),
        )
    yield Case(
        "int4-zero-200",
        "hostile",
        _altered(
            _make("w4a16", 3, 9, 64, zeros=True),
            weight_zero=torch.full((9, 1), 200, dtype=torch.uint8),
        ),
    )
    for activation in ("silu", "gelu_tanh", "swiglu", None):
        yield Case(
            f"infinite-sums-{activation}",
            "hostile",
            _altered(
                _make("dense", 5, 4, 1, options={"activation": activation}),
                x=torch.tensor([[math.inf], [-math.inf], [math.nan], [1e30], [-1e30]]),
                weight=torch.tensor([[1.0], [1.0], [0.0], [-1.0]]),
            ),
        )
    yield Case(
        "norm-inf",
        "hostile",
        _altered(
            _make("dense", 3, 9, 16, norm=BF16, bias=torch.float32),
            bias=lambda b: _filled(b, 4, math.inf),
        ),
    )
    yield Case(
        "norm-zeros-eps-zero",
        "hostile",
        _altered(_make("dense", 2, 9, 16, norm=BF16, options={"eps": 0.0}), x=torch.zeros_like),
    )
    yield Case(
        "fp16-overflow",
        "hostile",
        lambda g: {
            "x": torch.tensor([[300.0], [-300.0], [1.0]], dtype=torch.float16),
            "weight": torch.tensor([[300.0], [2.0]], dtype=torch.float16),
        },
    )
    # Partial sums pass fp16's range and come back.
    yield Case(
        "fp16-sum-returns",
        "hostile",
        lambda g: {
            "x": torch.ones(2, 64, dtype=torch.float16),
            "weight": torch.tensor([[6e4] * 32 + [-6e4] * 32], dtype=torch.float16),
        },
    )


def _bad_calls() -> Iterator[Case]:
    """Calls that must raise: the name says what is wrong, `error` which argument is blamed."""
    dense, int4 = _make("dense", 2, 6, 64), _make("w4a16", 2, 6, 64, group=32)
    w8a16, w8a8 = _make("w8a16", 2, 6, 64), _make("w8a8", 2, 6, 64)
    ones, half = torch.ones, torch.float16
    for name, error, make, changes in (
        ("weight-dtype-differs", "weight", dense, {"weight": lambda w: w.to(half)}),
        ("weight-dtype-unknown", "weight", dense, {"weight": lambda w: w.double()}),
        ("weight-e5m2", "weight", w8a16, {"weight": lambda w: w.to(torch.float8_e5m2)}),
        ("x-integer", "x", dense, {"x": lambda x: x.int()}),
        ("x-fp8-weight-bf16", "weight", w8a8, {"weight": lambda w: w.to(BF16)}),
        ("x-fp8-weight-int4", "x", int4, {"x": lambda x: x.to(FP8)}),
        ("x-fp32-weight-fp8", "x", w8a16, {"x": lambda x: x.float()}),
        ("x-fp32-weight-int4", "x", int4, {"x": lambda x: x.float()}),
        ("x-scalar", "x", dense, {"x": torch.tensor(1.0, dtype=BF16)}),
        ("x-sparse", "x", dense, {"x": lambda x: x.to_sparse()}),
        ("x-none", "x", dense, {"x": None}),
        ("x-list", "x", dense, {"x": [1.0]}),
        ("weight-rank-3", "weight", dense, {"weight": lambda w: w[None]}),
        ("k-differs", "weight", dense, {"weight": lambda w: w[:, :63]}),
        ("k-odd-int4", "x", int4, {"x": lambda x: x[:, :63]}),
        ("k-differs-int4", "weight", int4, {"weight": lambda w: w[:, :31]}),
        (
            "k-not-of-int32",
            "x",
            _altered(int4, x=lambda x: x[:, :60]),
            {"weight": lambda w: w[:, :28].contiguous().view(torch.int32)},
        ),
        ("dense-weight-scale", "weight_scale", dense, {"weight_scale": ones(6, 1)}),
        ("dense-x-scale", "x_scale", dense, {"x_scale": ones(1)}),
        ("dense-weight-zero", "weight_zero", dense, {"weight_zero": ones(6, 1, dtype=torch.uint8)}),
        ("dense-group-size", "group_size", dense, {"group_size": 64}),
        ("w8a16-x-scale", "x_scale", w8a16, {"x_scale": ones(1)}),
        ("w8a16-weight-zero", "weight_zero", w8a16, {"weight_zero": ones(1, 1, dtype=torch.uint8)}),
        ("w8a16-no-scale", "weight_scale", w8a16, {"weight_scale": None}),
        ("w8a16-scale-bf16", "weight_scale", w8a16, {"weight_scale": lambda s: s.to(BF16)}),
        ("w8a16-scale-shape", "weight_scale", w8a16, {"weight_scale": ones(2, 1)}),
        ("w8a16-scale-vector", "weight_scale", w8a16, {"weight_scale": ones(6)}),
        ("w8a16-scale-scalar", "weight_scale", w8a16, {"weight_scale": torch.tensor(1.0)}),
        (
            "w8a16-scale-other-group",
            "weight_scale",
            _make("w8a16", 2, 200, 64, group=64),
            {"group_size": None},
        ),
        ("w8a8-weight-zero", "weight_zero", w8a8, {"weight_zero": ones(1, 1, dtype=torch.uint8)}),
        ("w8a8-no-x-scale", "x_scale", w8a8, {"x_scale": None}),
        ("w8a8-x-scale-rows", "x_scale", w8a8, {"x_scale": ones(3, 1)}),
        ("w8a8-x-scale-groups", "x_scale", w8a8, {"x_scale": ones(2, 2)}),
        ("w8a8-x-scale-vector", "x_scale", w8a8, {"x_scale": ones(2)}),
        ("w8a8-x-scale-half", "x_scale", w8a8, {"x_scale": ones(1, dtype=half)}),
        ("int4-x-scale", "x_scale", int4, {"x_scale": ones(1)}),
        ("int4-no-scale", "weight_scale", int4, {"weight_scale": None}),
        ("int4-scale-shape", "weight_scale", int4, {"weight_scale": ones(6, 3)}),
        (
            "int4-scale-group-16",
            "weight_scale",
            int4,
            {"weight_scale": ones(6, 4), "group_size": None},
        ),
        ("int4-scale-rows", "weight_scale", int4, {"weight_scale": ones(5, 2)}),
        (
            "int4-scale-columns-odd",
            "weight_scale",
            int4,
            {"weight_scale": ones(6, 3), "group_size": None},
        ),
        (
            "int4-scale-empty",
            "weight_scale",
            int4,
            {"weight_scale": ones(6, 0), "group_size": None},
        ),
        ("int4-scale-vector", "weight_scale", int4, {"weight_scale": ones(1)}),
        ("int4-zero-shape", "weight_zero", int4, {"weight_zero": ones(6, 1, dtype=torch.uint8)}),
        ("int4-zero-int32", "weight_zero", int4, {"weight_zero": ones(6, 2, dtype=torch.int32)}),
        ("group-size-16", "group_size", int4, {"group_size": 16}),
        ("group-size-0", "group_size", int4, {"group_size": 0}),
        ("group-size-negative", "group_size", w8a16, {"group_size": -128}),
        ("group-size-0-k0", "group_size", _make("w8a16", 2, 6, 0), {"group_size": 0}),
        ("group-size-bool", "group_size", int4, {"group_size": True}),
        ("group-size-huge", "group_size", w8a16, {"group_size": 2**70}),
        ("group-size-no-divisor", "group_size", int4, {"group_size": 128}),
        ("bias-length", "bias", dense, {"bias": ones(5)}),
        ("bias-matrix", "bias", dense, {"bias": ones(1, 6)}),
        ("bias-double", "bias", dense, {"bias": ones(6).double()}),
        ("norm-length", "norm_weight", dense, {"norm_weight": ones(7)}),
        (
            "norm-and-activation",
            "activation",
            dense,
            {"norm_weight": ones(6), "activation": "silu"},
        ),
        ("activation-unknown", "activation", dense, {"activation": "relu"}),
        ("activation-number", "activation", dense, {"activation": 1}),
        ("swiglu-odd-n", "weight", _make("dense", 2, 7, 8), {"activation": "swiglu"}),
        ("eps-negative", "eps", dense, {"eps": -1e-6}),
        ("eps-nan", "eps", dense, {"eps": math.nan}),
        ("eps-infinite", "eps", dense, {"eps": math.inf}),
        ("eps-text", "eps", dense, {"eps": "1e-6"}),
        ("out-dtype-fp8", "out_dtype", dense, {"out_dtype": FP8}),
        ("out-dtype-text", "out_dtype", dense, {"out_dtype": "float32"}),
        ("out-shape", "out", dense, {"out": torch.empty(2, 5, dtype=BF16)}),
        ("out-wrong-dtype", "out", dense, {"out": torch.empty(2, 6)}),
        ("out-expanded", "out", dense, {"out": torch.empty(1, 6, dtype=BF16).expand(2, 6)}),
    ):
        yield Case(f"bad-{name}", "hostile", _altered(make, **changes), error=error)
    yield Case(
        "bad-out-overlaps-x",
        "hostile",
        lambda g: {"x": (v := normal(g, (8,)))[:4], "weight": normal(g, (4, 4)), "out": v[2:6]},
        error="out",
    )
    yield Case(
        "bad-out-overlaps-bias",
        "hostile",
        lambda g: {
            "x": normal(g, (4,)),
            "weight": normal(g, (4, 4)),
            "bias": (v := normal(g, (4,))),
            "out": v,
        },
        error="out",
    )


def _tag(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
