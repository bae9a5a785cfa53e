"""The cases of fused_moe_gemv: every scheme and routing that kernels get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernelhub.contracts._cases import (
    every_second,
    misaligned,
    normal,
    padded_rows,
    transposed,
    unused,
)
from kernelhub.contracts._weights import (
    FLOATS,
    FP8,
    PACKED,
    fp8_arguments,
    int4_arguments,
    num_groups,
    scales,
)
from kernelhub.contracts.fused_gemv import ACTIVATIONS
from kernelhub.spec import Case


def _tag(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weight_arguments(
    g: torch.Generator,
    scheme: str,
    lead: tuple[int, ...],
    n: int,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    zeros: bool = False,
    packed: torch.dtype = torch.uint8,
    scale_dtype: torch.dtype = torch.float32,
    group: int | None = None,
) -> dict[str, Any]:
    """Weight, scales and, where it says how to cut them, `group_size`."""
    if scheme == "dense":
        return {"weight": normal(g, (*lead, n, k), dtype)}
    if scheme == "int4":
        made = int4_arguments(
            g, n, k, group=group, packed=packed, zeros=zeros, scale_dtype=scale_dtype, lead=lead
        )
        return made
    kind: Any = {"fp8-channel": "channel", "fp8-tensor": "tensor"}.get(scheme, "block")
    made = fp8_arguments(g, n, k, scale=kind, group=group or 128, lead=lead)
    return made if group is None else {**made, "group_size": group}


def _arguments(
    g: torch.Generator,
    scheme: str = "dense",
    tokens: int = 3,
    slots: int = 2,
    experts: int = 4,
    n: int = 48,
    k: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    *,
    per_slot: bool = False,
    weights: torch.dtype | None = None,
    ids: torch.dtype = torch.int32,
    x_scale: str = "group",
    group: int | None = None,
    zeros: bool = False,
    packed: torch.dtype = torch.uint8,
    scale_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of a good call. `options` are passed on to the op.

    `scheme` is dense, fp8 (blocks), fp8-channel, fp8-tensor, w8a8 (blocks) or int4.
    """
    lead = (tokens, slots) if per_slot else (tokens,)
    made: dict[str, Any] = {"x": normal(g, (*lead, k), dtype)}
    if scheme == "w8a8":
        made["x"] = normal(g, (*lead, k), scale=8.0).to(FP8)
        shapes = {"group": (*lead, num_groups(k, group or 128)), "row": (*lead, 1), "tensor": (1,)}
        made["x_scale"] = scales(g, shapes[x_scale])
    made |= _weight_arguments(
        g, scheme, (experts,), n, k, dtype,
        zeros=zeros, packed=packed, scale_dtype=scale_dtype, group=group,
    )  # fmt: skip
    # A router chooses distinct experts.
    chosen = torch.rand(tokens, experts, generator=g).argsort(dim=1)[:, :slots]
    made["topk_ids"] = chosen.to(ids)
    if weights is not None:
        made["topk_weights"] = (torch.rand(tokens, slots, generator=g) + 0.1).to(weights)
    return made | options


def _impulses(g: torch.Generator, scheme: str, per_slot: bool) -> dict[str, Any]:
    """Each row of x is zero but for one element: a result is one weight, and its bound tiny.

    The elements stand at the ends of the row and of the blocks.
    """
    made = _arguments(
        g, scheme, tokens=5, slots=2, experts=4, n=136, k=192, per_slot=per_slot, ids=torch.int64,
        group={"int4": 64}.get(scheme), zeros=True, weights=torch.float32, out_dtype=torch.float32,
    )  # fmt: skip
    at = torch.tensor([0, 191, 127, 128, 63]).unsqueeze(1)
    if per_slot:
        at = torch.stack((at, (at + 5) % 192), dim=1)
    impulse = torch.zeros(made["x"].shape).scatter(-1, at, 1.5)
    return made | {"x": impulse.to(made["x"].dtype)}


def _routed(
    g: torch.Generator,
    to: list[list[int]],
    scheme: str = "dense",
    dtype: torch.dtype = torch.int64,
    **options: Any,
) -> dict[str, Any]:
    """Arguments whose tokens are routed by hand."""
    ids = torch.tensor(to, dtype=dtype)
    return _arguments(g, scheme, tokens=len(to), **options) | {"topk_ids": ids}


def _to(
    make: Callable[[torch.Generator], dict[str, Any]], to: list[list[int]], g: torch.Generator
) -> dict[str, Any]:
    return make(g) | {"topk_ids": torch.tensor(to)}


def _laid_out(
    made: dict[str, Any], names: tuple[str, ...], layout: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    return made | {name: layout(made[name]) for name in names}


def _experts_last(t: Tensor) -> Tensor:
    """The same values, the expert dimension innermost in memory."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def _apart(t: Tensor) -> Tensor:
    """The same values, contiguous but for one unused element after each expert."""
    wide = unused(t.shape[0], t[0].numel() + 1, dtype=t.dtype)
    view = wide[:, :-1].view(t.shape)
    view.copy_(t)
    return view


def _spoiled(g: torch.Generator, to: list[list[int]], scheme: str, reduce: bool) -> dict[str, Any]:
    """NaN in every place that is none of a call's business: masked slots, experts not chosen."""
    made = _routed(g, to, scheme, per_slot=True, weights=torch.float32, reduce=reduce)
    ids = made["topk_ids"]
    outside = (ids < 0) | (ids >= made["weight"].shape[0])
    made["x"][outside] = torch.nan  # per slot
    made["topk_weights"][outside] = torch.nan
    idle = [e for e in range(made["weight"].shape[0]) if not (ids == e).any()]
    for name in ("weight", "weight_scale"):
        if name in made and made[name].dtype not in PACKED:
            made[name][idle] = torch.nan
    return made


_MODELS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    # Name, scheme, and real K and k; N and E are cut down to stay cheap.
    ("qwen3-30b-gate-up-m1", "dense", {"tokens": 1, "slots": 8, "experts": 10, "n": 96, "k": 2048,
                                       "activation": "swiglu"}),
    ("qwen3-30b-gate-up-m4", "int4", {"tokens": 4, "slots": 8, "experts": 10, "n": 96, "k": 2048,
                                      "group": 128, "activation": "swiglu"}),
    ("qwen3-30b-down-m4", "int4", {"tokens": 4, "slots": 8, "experts": 10, "n": 128, "k": 768,
                                   "group": 128, "per_slot": True, "weights": torch.float32}),
    ("qwen3-30b-down-m16", "fp8", {"tokens": 16, "slots": 8, "experts": 10, "n": 64, "k": 768,
                                   "per_slot": True, "weights": torch.float32, "reduce": True}),
    ("mixtral-8x7b-gate-up-m2", "fp8", {"tokens": 2, "slots": 2, "experts": 8, "n": 64, "k": 4096,
                                        "dtype": torch.float16, "activation": "swiglu"}),
    ("mixtral-8x7b-down-m1", "dense", {"tokens": 1, "slots": 2, "experts": 4, "n": 32, "k": 14336,
                                       "dtype": torch.float16, "per_slot": True,
                                       "weights": torch.float32, "reduce": True}),
    ("deepseek-v3-gate-up-m2", "w8a8", {"tokens": 2, "slots": 8, "experts": 9, "n": 48, "k": 7168,
                                        "activation": "swiglu"}),
    ("deepseek-v3-down-m4", "w8a8", {"tokens": 4, "slots": 8, "experts": 9, "n": 64, "k": 2048,
                                     "per_slot": True, "weights": torch.float32, "reduce": True}),
    ("llama4-scout-gate-up-m4", "dense", {"tokens": 4, "slots": 1, "experts": 6, "n": 64, "k": 5120,
                                          "weights": torch.float32, "activation": "swiglu"}),
)  # fmt: skip


def cases() -> Iterator[Case]:
    def good(name: str, scheme: str = "dense", **options: Any) -> Case:
        return Case(name, "boundary", partial(_arguments, scheme=scheme, **options))

    for model, scheme, options in _MODELS:
        make = partial(_arguments, scheme=scheme, **options)
        yield Case(f"{model}-{scheme}", "typical", make)

    # Every scheme with shared rows and a row for each slot, plain and with all of the epilogue.
    for scheme in ("dense", "fp8", "fp8-channel", "fp8-tensor", "w8a8", "int4"):
        for per_slot in (False, True):
            rows = "per-slot" if per_slot else "shared"
            # N = 200 and K = 192: the last block is short either way.
            size: dict[str, Any] = {"n": 200, "k": 192, "per_slot": per_slot}
            if scheme == "int4":
                size["group"] = 64
            yield good(f"{scheme}-{rows}", scheme, **size, ids=torch.int64)
            yield good(
                f"{scheme}-{rows}-weighted-swiglu", scheme, **size,
                weights=torch.float32, activation="swiglu",
            )  # fmt: skip
            yield good(
                f"{scheme}-{rows}-reduce", scheme, **size,
                slots=3, weights=torch.bfloat16, ids=torch.int64, reduce=True,
            )  # fmt: skip
            yield Case(
                f"{scheme}-{rows}-impulses",
                "boundary",
                partial(_impulses, scheme=scheme, per_slot=per_slot),
            )
    yield from _dtype_cases(good)
    yield from _size_cases(good)
    yield from _whole_slices()
    yield from _layout_cases()
    yield from _id_cases()
    yield from _data_cases()
    yield from _bad_calls()


def _dtype_cases(good: Callable[..., Case]) -> Iterator[Case]:
    for dtype in FLOATS:
        for activation in ACTIVATIONS:
            yield good(f"dense-{_tag(dtype)}-{activation}", dtype=dtype, activation=activation)
        yield good(f"weights-{_tag(dtype)}", dtype=dtype, weights=dtype, out_dtype=torch.float32)
        yield good(f"reduce-out-{_tag(dtype)}", dtype=torch.float16, reduce=True, out_dtype=dtype)
    for activation in ("silu", "gelu_tanh"):
        yield good(
            f"reduce-after-{activation}", dtype=torch.float32, weights=torch.float32,
            slots=4, reduce=True, activation=activation,
        )  # fmt: skip
    yield good("fp8-fp16", "fp8", dtype=torch.float16, n=130, k=130)
    yield good("fp8-group-64", "fp8", group=64, n=100, k=160)
    yield good("fp8-group-32", "fp8", group=32, n=50, k=70)
    for rows in ("row", "tensor"):
        for per_slot in (False, True):
            name = f"w8a8-x-scale-{rows}-{'per-slot' if per_slot else 'shared'}"
            yield good(name, "w8a8", n=72, k=136, x_scale=rows, per_slot=per_slot)
    yield good("w8a8-out-fp32-group-64", "w8a8", n=70, k=150, group=64, out_dtype=torch.float32)
    for packed in PACKED:
        for scale_dtype in FLOATS:
            yield good(
                f"int4-{_tag(packed)}-scale-{_tag(scale_dtype)}", "int4", n=18, k=96, group=32,
                packed=packed, scale_dtype=scale_dtype, zeros=packed is not torch.int8,
            )  # fmt: skip
    for group, k in ((128, 128), (64, 128), (128, 256), (None, 160), (None, 22)):
        yield good(f"int4-group-{group or 'row'}-k{k}", "int4", n=10, k=k, group=group, zeros=True)
    yield good("int4-fp16", "int4", dtype=torch.float16, n=24, k=64, group=32)


def _size_cases(good: Callable[..., Case]) -> Iterator[Case]:
    for tokens in (1, 2, 7, 16, 17, 33):
        yield good(f"m{tokens}", tokens=tokens, slots=2, n=17, k=40, weights=torch.float32)
    for n, k in ((1, 1), (2, 3), (3, 31), (5, 7), (9, 257), (129, 33)):
        yield good(f"n{n}-k{k}", n=n, k=k, dtype=torch.float32, per_slot=True)
        yield good(f"fp8-n{n}-k{k}", "fp8", n=n, k=k)
        yield good(f"int4-n{n}-k{2 * k}", "int4", n=n, k=2 * k)
    # An expert's places are far apart, and more than 16.
    yield good("m48-slots8", tokens=48, slots=8, experts=9, n=5, k=16, weights=torch.float32)
    yield good("swiglu-n2", n=2, k=5, dtype=torch.float32, activation="swiglu")
    yield good("one-expert", experts=1, slots=1)
    yield good("every-expert", experts=8, slots=8, reduce=True, weights=torch.float32)
    yield good("one-slot-reduce", slots=1, reduce=True)
    for name, size in (
        ("no-tokens", {"tokens": 0}),
        ("no-slots", {"slots": 0}),
        ("no-outputs", {"n": 0}),
        ("no-inputs", {"k": 0}),
    ):
        for reduce in (False, True):
            end = "-reduce" if reduce else ""
            yield good(name + end, **size, reduce=reduce, weights=torch.float32)
            yield good(f"{name}-fp8-per-slot{end}", "fp8", **size, reduce=reduce, per_slot=True)
    for scheme in ("dense", "fp8", "int4"):
        make = partial(_routed, to=[[0, 1], [-1, 0]], scheme=scheme, experts=0)
        yield Case(f"no-experts-{scheme}", "boundary", make)


def _whole_slices() -> Iterator[Case]:
    """K of whole slices of 128 and rows for several tiles: what kernels for long rows serve."""
    # Nine tokens for one expert, one token that names it twice, two places of none.
    to = [[0, 1, 2], [0, 0, 3], [-1, 0, 5], *([i % 5, 0, 4] for i in range(1, 8))]
    routed: dict[str, Any] = {"tokens": len(to), "slots": 3, "experts": 5, "weights": torch.float32}
    schemes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("dense", {"k": 256}),
        ("fp8", {"k": 256}),
        ("fp8-channel", {"k": 256, "dtype": torch.float16}),
        ("int4", {"k": 512, "group": 128, "scale_dtype": torch.bfloat16}),
        ("int4", {"k": 512, "group": 128, "zeros": True}),
    )
    for scheme, more in schemes:
        name = f"whole-slices-{scheme}{'-zeros' if 'zeros' in more else ''}"
        kinds: dict[str, Any] = {
            "shared": {"activation": "swiglu"},
            "per-slot": {"per_slot": True},
        }
        for kind, options in kinds.items():
            arguments = partial(_arguments, scheme=scheme, n=272, **routed, **more, **options)
            yield Case(f"{name}-{kind}", "boundary", partial(_to, arguments, to))
    # More places than a block sorts at a time.
    many = partial(_arguments, tokens=40, slots=8, experts=9, n=144, k=256)
    yield Case("whole-slices-dense-m40", "boundary", many)


def _layout_cases() -> Iterator[Case]:
    def laid_out(
        name: str, names: tuple[str, ...], layout: Callable[[Tensor], Tensor], **options: Any
    ) -> Case:
        return Case(
            f"{layout.__name__.strip('_')}-{name}", "boundary",
            lambda g: _laid_out(_arguments(g, tokens=4, **options), names, layout),
        )  # fmt: skip

    inputs = ("x", "weight", "topk_ids", "topk_weights")
    for layout in (padded_rows, transposed, every_second, misaligned):
        for scheme, names in (
            ("dense", inputs),
            ("fp8", (*inputs, "weight_scale")),
            ("w8a8", (*inputs, "x_scale", "weight_scale")),
            ("int4", (*inputs, "weight_scale", "weight_zero")),
        ):
            yield laid_out(
                scheme, names, layout, scheme=scheme, per_slot=scheme != "fp8", n=40, k=192,
                group=64, zeros=True, weights=torch.float32,
            )  # fmt: skip
    yield laid_out(
        "int32", ("weight",), padded_rows, scheme="int4", packed=torch.int32, n=12, k=64, group=32
    )
    yield laid_out(
        "int4", ("weight", "weight_scale"), _experts_last, scheme="int4", n=12, k=64, group=32
    )
    yield laid_out("fp8", ("weight", "weight_scale"), _experts_last, scheme="fp8", n=150, k=140)
    # Rows stand at aligned distances, experts do not.
    yield laid_out("dense", ("weight",), _apart)
    yield laid_out(
        "int4", ("weight", "weight_scale", "weight_zero"), _apart, scheme="int4", zeros=True
    )
    yield Case(
        "one-row-for-all-tokens", "boundary",
        lambda g: _arguments(g, tokens=1) | {
            "x": normal(g, (1, 64), torch.bfloat16).expand(5, 64),
            "topk_ids": torch.tensor([[3, 1]]).expand(5, 2),
        },
    )  # fmt: skip
    yield Case(
        "experts-share-one-weight", "boundary",
        lambda g: _arguments(g)
        | {"weight": normal(g, (1, 48, 64), torch.bfloat16).expand(4, -1, -1)},
    )  # fmt: skip
    yield Case(
        "out-strided", "boundary",
        lambda g: _arguments(g) | {"out": torch.zeros(3, 2, 96, dtype=torch.bfloat16)[..., ::2]},
    )  # fmt: skip
    yield Case(
        "out-reduce", "boundary",
        lambda g: _arguments(g, reduce=True, out_dtype=torch.float32) | {"out": torch.zeros(3, 48)},
    )  # fmt: skip


def _id_cases() -> Iterator[Case]:
    lists: tuple[tuple[str, torch.dtype, list[list[int]]], ...] = (
        ("duplicates", torch.int32, [[2, 2], [1, 3], [0, 0], [2, 1]]),
        ("masked", torch.int64, [[-1, 2], [0, -1], [-1, -1], [3, 1]]),
        ("all-masked", torch.int32, [[-1, -1], [-1, -1], [-1, -1], [-1, -1]]),
        ("hostile-int32", torch.int32, [[4, 0], [2**31 - 1, -(2**31)], [5, 3], [-2, -4]]),
        # Low words of expert 0, 1 and 3: an id cut to 32 bits would find them.
        ("hostile-int64", torch.int64, [[2**31, 0], [2**32 + 1, 2**62], [-(2**63), 4],
                                        [2**63 - 1, -(2**32) + 3]]),
    )  # fmt: skip
    for name, dtype, ids in lists:
        kind: Any = "hostile" if name.startswith("hostile") else "boundary"
        route = partial(_routed, to=ids, dtype=dtype, weights=torch.float32)
        for scheme in ("dense", "int4", "w8a8"):
            for per_slot in (False, True):
                rows = "per-slot" if per_slot else "shared"
                make = partial(route, scheme=scheme, per_slot=per_slot)
                yield Case(f"ids-{name}-{scheme}-{rows}", kind, make)
        make = partial(route, reduce=True, activation="swiglu")
        yield Case(f"ids-{name}-reduce-swiglu", kind, make)


def _data_cases() -> Iterator[Case]:
    to = [[-1, 2], [0, 4], [2**33, 2], [2, 0]]
    for scheme in ("dense", "fp8", "int4"):
        for reduce in (False, True):
            name = f"nan-where-nothing-is-read-{scheme}" + ("-reduce" if reduce else "")
            yield Case(name, "hostile", partial(_spoiled, to=to, scheme=scheme, reduce=reduce))
    yield Case(
        "nan-in-row-of-masked-token", "hostile",
        lambda g: (m := _routed(g, [[0, 1], [-1, -1], [2, 2]]))
        | {"x": m["x"].index_fill(0, torch.tensor([1]), torch.nan)},
    )  # fmt: skip
    yield Case(
        "nan-and-inf-in-x", "hostile",
        lambda g: _arguments(g, tokens=3)
        | {"x": normal(g, (3, 64)).index_put(
            (torch.tensor([0, 2]), torch.tensor([63, 0])), torch.tensor([torch.nan, torch.inf])
        ).bfloat16()},
    )  # fmt: skip
    yield Case(
        "inf-topk-weight", "hostile",
        lambda g: _arguments(g, dtype=torch.float32) | {
            "topk_weights": torch.tensor([[1.0, torch.inf], [0.0, -1.0], [torch.nan, 2.0]])
        },
    )  # fmt: skip
    for scheme in ("fp8", "w8a8"):
        yield Case(f"every-code-{scheme}", "hostile", partial(_every_code, scheme=scheme))


def _every_code(g: torch.Generator, scheme: str) -> dict[str, Any]:
    """All 256 fp8 codes, the NaN among them, one to a weight row."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).reshape(1, 256, 1)
    return _arguments(g, scheme, experts=2, n=256, k=16) | {"weight": codes.expand(2, 256, 16)}


def _bad_calls() -> Iterator[Case]:
    def bad(name: str, argument: str, change: dict[str, Any], **options: Any) -> Case:
        return Case(
            name, "hostile", lambda g: _arguments(g, **options) | change, error=argument
        )  # fmt: skip

    bf16 = torch.bfloat16
    yield from (
        bad("x-of-rank-1", "x", {"x": torch.zeros(64, dtype=bf16)}),
        bad("x-of-rank-4", "x", {"x": torch.zeros(3, 2, 1, 64, dtype=bf16)}),
        bad("x-missing", "x", {"x": None}),
        bad("weight-of-rank-2", "weight", {"weight": torch.zeros(48, 64, dtype=bf16)}),
        bad("weight-of-other-dtype", "weight", {"weight": torch.zeros(4, 48, 64)}),
        bad("weight-of-other-k", "weight", {"weight": torch.zeros(4, 48, 65, dtype=bf16)}),
        bad("odd-n-swiglu", "weight", {}, n=47, activation="swiglu"),
        bad("ids-of-rank-1", "topk_ids", {"topk_ids": torch.zeros(3, dtype=torch.int64)}),
        bad("ids-of-float", "topk_ids", {"topk_ids": torch.zeros(3, 2)}),
        bad("ids-of-int16", "topk_ids", {"topk_ids": torch.zeros(3, 2, dtype=torch.int16)}),
        bad("ids-missing", "topk_ids", {"topk_ids": None}),
        bad("ids-of-other-m", "topk_ids", {"topk_ids": torch.zeros(4, 2, dtype=torch.int32)}),
        bad("ids-of-other-k", "topk_ids", {"topk_ids": torch.zeros(3, 3, dtype=torch.int32)},
            per_slot=True),
        bad("weights-of-other-shape", "topk_weights", {"topk_weights": torch.zeros(3, 1)}),
        bad("weights-of-integers", "topk_weights",
            {"topk_weights": torch.zeros(3, 2, dtype=torch.int32)}),
        bad("dense-with-scale", "weight_scale", {"weight_scale": torch.ones(4, 1)}),
        bad("dense-with-x-scale", "x_scale", {"x_scale": torch.ones(1)}),
        bad("dense-with-group", "group_size", {"group_size": 64}),
        bad("fp8-without-scale", "weight_scale", {"weight_scale": None}, scheme="fp8"),
        bad("fp8-scale-without-experts", "weight_scale", {"weight_scale": torch.ones(1, 1)},
            scheme="fp8"),
        bad("fp8-scale-flat-over-experts", "weight_scale", {"weight_scale": torch.ones(8, 1)},
            scheme="fp8", n=200),
        bad("fp8-scale-of-other-e", "weight_scale", {"weight_scale": torch.ones(5, 1, 1)},
            scheme="fp8"),
        bad("fp8-scale-bf16", "weight_scale", {"weight_scale": torch.ones(4, 1, 1, dtype=bf16)},
            scheme="fp8"),
        bad("fp8-scale-of-other-group", "weight_scale", {"group_size": 32}, scheme="fp8", n=64),
        bad("fp8-with-zero", "weight_zero",
            {"weight_zero": torch.zeros(4, 48, 1, dtype=torch.uint8)}, scheme="fp8"),
        bad("w8a8-without-x-scale", "x_scale", {"x_scale": None}, scheme="w8a8"),
        bad("w8a8-x-scale-of-other-m", "x_scale", {"x_scale": torch.ones(2, 1)}, scheme="w8a8"),
        bad("w8a8-x-scale-per-token-of-slots", "x_scale", {"x_scale": torch.ones(3, 1)},
            scheme="w8a8", per_slot=True),
        bad("w8a8-x-scale-flat-over-slots", "x_scale", {"x_scale": torch.ones(6, 1)},
            scheme="w8a8", per_slot=True),
        bad("w8a8-x-scale-per-slot-of-shared", "x_scale", {"x_scale": torch.ones(3, 2, 1)},
            scheme="w8a8"),
        bad("int4-of-fp32-x", "x", {"x": torch.zeros(3, 64)}, scheme="int4"),
        bad("int4-of-odd-k", "x", {"x": torch.zeros(3, 63, dtype=bf16)}, scheme="int4"),
        bad("int4-without-scale", "weight_scale", {"weight_scale": None}, scheme="int4"),
        bad("int4-scale-of-other-e", "weight_scale", {"weight_scale": torch.ones(3, 48, 1)},
            scheme="int4"),
        bad("int4-scale-without-experts", "weight_scale", {"weight_scale": torch.ones(48, 1)},
            scheme="int4"),
        bad("int4-zero-of-other-shape", "weight_zero",
            {"weight_zero": torch.zeros(4, 48, 2, dtype=torch.uint8)}, scheme="int4"),
        bad("int4-group-48", "group_size", {"group_size": 48}, scheme="int4", k=96),
        bad("int4-group-divides-not", "group_size", {"group_size": 64}, scheme="int4", k=96),
        bad("activation-unknown", "activation", {"activation": "relu"}),
        bad("reduce-of-int", "reduce", {"reduce": 1}),
        bad("out-dtype-fp8", "out_dtype", {"out_dtype": FP8}),
        bad("out-of-other-shape", "out", {"out": torch.zeros(3, 48, dtype=bf16)}),
        bad("out-not-reduced", "out", {"out": torch.zeros(3, 2, 48, dtype=bf16)}, reduce=True),
        bad("out-of-other-dtype", "out", {"out": torch.zeros(3, 2, 48)}),
        bad("out-expanded", "out", {"out": torch.zeros(3, 1, 48, dtype=bf16).expand(3, 2, 48)}),
    )  # fmt: skip
    yield Case(
        "out-overlaps-x", "hostile",
        lambda g: (m := _arguments(g, per_slot=True, n=64)) | {"out": m["x"]},
        error="out",
    )  # fmt: skip
    yield Case(
        "out-overlaps-topk-weights", "hostile",
        lambda g: (m := _arguments(g, dtype=torch.float32, weights=torch.float32, n=1))
        | {"out": m["topk_weights"].unsqueeze(-1)},
        error="out",
    )  # fmt: skip
