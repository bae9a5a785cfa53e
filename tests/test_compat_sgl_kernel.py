"""Old names of sgl-kernel: the bits of the new calls, one warning each, nothing ignored."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernelhub
from kernelhub.compat import sgl_kernel
from kernelhub.contracts._weights import fp8_arguments, int4_arguments
from kernelhub.errors import ArgumentError

ops = kernelhub.ops
BF16, FP8, HALF = torch.bfloat16, torch.float8_e4m3fn, torch.float16

# Names, order and defaults of the code that is replaced.
SIGNATURES = {
    "musa_rotary_embedding_contiguous": "positions query key head_size cos_sin_cache is_neox",
    "musa_batched_rotary_embedding_contiguous": "positions query key head_size cos_sin_cache "
    "is_neox rot_dim cos_sin_cache_offsets",
    "musa_fused_gemv": "x qweight x_scales=None qweight_scales=None use_swigelu=False "
    "use_rms_norm=False gamma=None eps=1e-06",
    "musa_fused_moe_gemv": "A B C A_scale B_scale topk_weights topk_ids mul_routed_weight topk "
    "use_int4_w4a16 use_swigelu",
    "musa_fused_mul_add": "self bias scale accurate=True",
    "top_k_top_p_sampling_from_probs": "probs top_k top_p indices=None "
    "filter_apply_order='top_k_first' deterministic=True generator=None check_nan=False",
}


def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=g()).to(dtype)


def old(name: str, *args: Any, **kwargs: Any) -> Any:
    """The old function's result. It must have warned once, of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = getattr(sgl_kernel, name)(*args, **kwargs)
    (warning,) = caught
    assert warning.category is DeprecationWarning
    assert warning.filename == __file__
    return result


def refused(name: str, argument: str, *args: Any, op: str | None = None, **kwargs: Any) -> str:
    """The message of the error that the old function raises about an argument."""
    with pytest.raises(ArgumentError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        getattr(sgl_kernel, name)(*args, **kwargs)
    assert (caught.value.op, caught.value.argument) == (op or name, argument)
    return str(caught.value)


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_old_ones(name: str) -> None:
    parameters = inspect.signature(getattr(sgl_kernel, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    bare = [p.replace(annotation=p.empty) for p in parameters]
    assert " ".join(map(str, bare)) == SIGNATURES[name]


def test_there_are_no_others() -> None:
    assert sorted(SIGNATURES) == sgl_kernel.__all__
    own = inspect.getmembers(
        sgl_kernel, lambda f: getattr(f, "__module__", "") == sgl_kernel.__name__
    )
    assert {name for name, _ in own if not name.startswith("_")} == set(SIGNATURES)


def test_nothing_is_imported_or_registered() -> None:
    program = (
        "import sys, torch, kernelhub\n"
        "assert not [m for m in sys.modules if m.startswith('kernelhub.compat')]\n"
        "names = set(torch._C._dispatch_get_all_op_names())\n"
        "import kernelhub.compat.sgl_kernel\n"
        "assert set(torch._C._dispatch_get_all_op_names()) == names\n"
        "assert not [n for n in names if 'sgl' in n or 'musa' in n]\n"
        "for name in kernelhub.compat.sgl_kernel.__all__:\n"
        "    assert not hasattr(torch.ops.sgl_kernel, name), name\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


# ---- warnings ----------------------------------------------------------------------------------


def arguments(name: str) -> dict[str, Any]:
    """A call of each old function that needs no translation."""
    angle = normal(4, 4)
    rotary = {
        "positions": torch.tensor([2, 0, 1]),
        "query": normal(3, 2, 8),
        "key": normal(3, 1, 8),
        "head_size": 8,
        "cos_sin_cache": torch.cat((angle.cos(), angle.sin()), -1)[:, :6].contiguous(),
        "is_neox": False,
    }
    probs = torch.softmax(normal(3, 50), -1)
    return {
        "musa_rotary_embedding_contiguous": rotary,
        "musa_batched_rotary_embedding_contiguous": {
            **rotary,
            "rot_dim": 6,
            "cos_sin_cache_offsets": torch.tensor([1, 0, 2]),
        },
        "musa_fused_gemv": {
            **{"x": normal(2, 16), "qweight": normal(6, 16), "x_scales": None},
            **{"qweight_scales": None, "use_swigelu": True, "use_rms_norm": False},
            **{"gamma": None, "eps": 1e-5},
        },
        "musa_fused_moe_gemv": {
            **{"A": normal(3, 16), "B": normal(4, 6, 16), "C": torch.zeros(3, 2, 3)},
            **{"A_scale": None, "B_scale": None, "topk_weights": normal(3, 2)},
            **{"topk_ids": torch.tensor([[3, 0], [1, 1], [-1, 2]]), "mul_routed_weight": True},
            **{"topk": 2, "use_int4_w4a16": False, "use_swigelu": True},
        },
        "musa_fused_mul_add": {
            **{"self": normal(5), "bias": normal(5).flip(0), "scale": 2.5, "accurate": True}
        },
        "top_k_top_p_sampling_from_probs": {
            **{"probs": probs, "top_k": 7, "top_p": 0.9, "indices": torch.tensor([2, 0, 1, 1])},
            **{"filter_apply_order": "joint", "deterministic": False, "generator": g()},
        },
    }[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_warning_names_a_call_that_gives_the_same(name: str) -> None:
    with pytest.warns(DeprecationWarning) as caught:
        first = getattr(sgl_kernel, name)(**(given := arguments(name)))
    (warning,) = caught
    text = str(warning.message)
    call = re.fullmatch(rf"{name} is deprecated: call (kernelhub\.ops\.\w+\(.*\))( with .*)?", text)
    assert call
    second = eval(call[1], {"kernelhub": kernelhub}, (again := arguments(name)))
    assert first is None or torch.equal(first, second)
    for argument, value in given.items():  # what is written in place, too
        assert not isinstance(value, Tensor) or torch.equal(value, again[argument])
    fresh = arguments(name)
    changed = [n for n, v in given.items() if isinstance(v, Tensor) and not v.equal(fresh[n])]
    in_place = {"rotary": ["query", "key"], "moe": ["C"]}
    assert changed == next((v for k, v in in_place.items() if k in name), [])


def test_each_place_warns_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            sgl_kernel.musa_fused_mul_add(normal(2), normal(2), 1.0)
        sgl_kernel.musa_fused_mul_add(normal(2), normal(2), 1.0)
    lines = [w.lineno for w in caught]
    assert len(lines) == 2 and lines[1] == lines[0] + 1


def test_the_policy_chooses() -> None:
    with kernelhub.use("-reference"), pytest.raises(kernelhub.BackendUnavailable):
        old("musa_fused_mul_add", normal(2), normal(2), 1.0)


def test_under_torch_compile() -> None:
    def program(x: Tensor, bias: Tensor) -> Tensor:
        return sgl_kernel.musa_fused_mul_add(x, bias, 2.0) + 1

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="musa_")
        warnings.filterwarnings("ignore")
        compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(normal(4), normal(4)), normal(4) * 3 + 1)


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_page_has_it(name: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
    assert re.search(rf"^\| `{name}\(.*`", page, re.MULTILINE)
    new_name = name.removeprefix("musa_").replace("batched_", "").removesuffix("_contiguous")
    assert f"`{new_name}(" in page or "| the same name" in page
    assert hasattr(ops, new_name)


# ---- rotary embedding --------------------------------------------------------------------------


@pytest.mark.parametrize("is_neox", [True, False])
def test_rotary_pair(is_neox: bool) -> None:
    given = arguments("musa_batched_rotary_embedding_contiguous")
    positions, query, key, size, cache, _, rot_dim, offsets = given.values()
    for plain in (True, False):
        ours, theirs = (query.clone(), key.clone()), (query.clone(), key.clone())
        if plain:
            name, extra = "musa_rotary_embedding_contiguous", ()
        else:
            name, extra = "musa_batched_rotary_embedding_contiguous", (rot_dim, offsets)
        assert old(name, positions, *ours, size, cache, is_neox, *extra) is None
        rows = positions if plain else positions + offsets
        ops.rotary_embedding(rows, *theirs, size, cache, is_neox)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert not torch.equal(ours[0], query)


def test_rotary_sizes_are_heeded() -> None:
    given = arguments("musa_batched_rotary_embedding_contiguous")
    wrong = {**given, "rot_dim": 4}
    refused("musa_batched_rotary_embedding_contiguous", "rot_dim", **wrong, op="rotary_embedding")
    given = {**arguments("musa_rotary_embedding_contiguous"), "head_size": 16}
    refused("musa_rotary_embedding_contiguous", "head_size", **given, op="rotary_embedding")


# ---- fused_gemv --------------------------------------------------------------------------------


def gemv_weights(scheme: str, n: int, k: int, lead: tuple[int, ...] = ()) -> dict[str, Any]:
    """Weight and scales of a scheme in the old layouts, and the `group_size` that the op needs."""
    if scheme.startswith("fp8"):
        group = int(scheme.removeprefix("fp8-"))
        return {**fp8_arguments(g(), n, k, group=group, lead=lead), "group_size": group}
    group = int(scheme.removeprefix("int4-"))
    return {**int4_arguments(g(), n, k, group=group, lead=lead), "group_size": group}


SCHEMES = ["fp8-128", "fp8-64", "int4-128", "int4-64"]


@pytest.mark.parametrize("epilogue", ["", "swiglu", "norm"])
@pytest.mark.parametrize("scheme", ["dense", *SCHEMES])
def test_gemv(scheme: str, epilogue: str) -> None:
    x, gamma = normal(3, 256, dtype=BF16), normal(192, dtype=BF16)
    weights: dict[str, Any] = {"weight": normal(192, 256, dtype=BF16)}
    if scheme != "dense":
        weights = gemv_weights(scheme, 192, 256)
    flags, new = {
        "": ({}, {}),
        "swiglu": ({"use_swigelu": True}, {"activation": "swiglu"}),
        "norm": (
            {"use_rms_norm": True, "gamma": gamma, "eps": 0.5},
            {"norm_weight": gamma, "eps": 0.5},
        ),
    }[epilogue]
    y = old("musa_fused_gemv", x, weights["weight"], None, weights.get("weight_scale"), **flags)
    assert y.dtype is BF16 and y.shape == (3, 96 if epilogue == "swiglu" else 192)
    assert torch.equal(y, ops.fused_gemv(x, **weights, **new))


def test_gemv_takes_the_old_order() -> None:
    """By position: x, qweight, x_scales, qweight_scales, use_swigelu, use_rms_norm, gamma, eps."""
    x, weight, gamma = normal(2, 8), normal(6, 8), normal(6)
    normed = old("musa_fused_gemv", x, weight, None, None, False, True, gamma, 0.25)
    assert torch.equal(normed, ops.fused_gemv(x, weight, norm_weight=gamma, eps=0.25))
    assert not torch.equal(normed, ops.fused_gemv(x, weight, norm_weight=gamma))
    default = old("musa_fused_gemv", x * 1e-3, weight, use_rms_norm=True, gamma=gamma)
    assert torch.equal(default, ops.fused_gemv(x * 1e-3, weight, norm_weight=gamma, eps=1e-6))


@pytest.mark.parametrize("group", [64, 128])
def test_gemv_of_fp8_rows(group: int) -> None:
    x = normal(3, 256).to(FP8)
    weights = gemv_weights(f"fp8-{group}", 192, 256)
    x_scale = normal(3, 256 // group).abs()
    y = old("musa_fused_gemv", x, weights["weight"], x_scale, weights["weight_scale"])
    assert y.dtype is BF16
    assert torch.equal(y, ops.fused_gemv(x, x_scale=x_scale, **weights))


def test_gemv_of_fp8_weights_gives_bf16() -> None:
    x, weights = normal(2, 128, dtype=HALF), gemv_weights("fp8-128", 16, 128)
    y = old("musa_fused_gemv", x, weights["weight"], None, weights["weight_scale"])
    assert y.dtype is BF16
    assert torch.equal(y, ops.fused_gemv(x, **weights, out_dtype=BF16))


@pytest.mark.parametrize(
    ("scheme", "k"),
    [
        *(("fp8-64", k) for k in (96, 127, 128, 160, 191, 192, 224, 320)),
        *(("fp8-128", k) for k in (32, 64, 128, 255, 384)),  # one column is of 128
        *(("int4-64", k) for k in (128, 192, 320)),
        *(("int4-128", k) for k in (256, 384)),
    ],
)
def test_the_group_is_told_by_the_columns(scheme: str, k: int) -> None:
    weights = gemv_weights(scheme, 130, k)
    x = normal(1, k, dtype=BF16)
    y = old("musa_fused_gemv", x, weights["weight"], None, weights["weight_scale"])
    assert torch.equal(y, ops.fused_gemv(x, **weights))


@pytest.mark.parametrize("packed", [torch.uint8, torch.int8, torch.int32])
def test_int4_with_one_column_is_refused(packed: torch.dtype) -> None:
    """It meant two's complement nibbles, and a matter of columns must not decide that."""
    weights = int4_arguments(g(), 8, 96, packed=packed)
    x = normal(2, 96, dtype=BF16)
    message = refused(
        "musa_fused_gemv", "qweight_scales", x, weights["weight"], None, weights["weight_scale"]
    )
    assert message.endswith(
        "two columns or more (docs/migrating.md has one), got [8, 1] float32 cpu"
    )
    experts = int4_arguments(g(), 8, 96, packed=packed, lead=(4,))
    given = {**moe_arguments(), "A": normal(3, 96, dtype=BF16), "B": experts["weight"]}
    given |= {"B_scale": experts["weight_scale"], "use_int4_w4a16": True}
    refused("musa_fused_moe_gemv", "B_scale", **given)


def test_the_conversion_of_twos_complement() -> None:
    signed = torch.arange(-8, 8, dtype=torch.int8)
    nibbles = signed.view(torch.uint8) & 15
    weight = (nibbles[0::2] | nibbles[1::2] << 4).unsqueeze(0).repeat(1, 4)  # K = 64
    x = torch.arange(64.0).to(BF16).unsqueeze(0)
    y = ops.fused_gemv(x, weight ^ 0x88, None, torch.ones(1, 1), out_dtype=torch.float32)
    assert y.item() == float((x.double() * signed.double().repeat(4)).sum())


def test_gemv_ignores_nothing() -> None:
    x, weight, gamma = normal(2, 256, dtype=BF16), normal(8, 256, dtype=BF16), normal(8)
    int4, fp8 = gemv_weights("int4-128", 8, 256), gemv_weights("fp8-128", 8, 256)
    scales = normal(2, 2).abs()
    name = "musa_fused_gemv"
    message = refused(name, "gamma", x, weight, gamma=gamma)
    assert message == f"{name}: argument 'gamma': expected None without use_rms_norm, got [8] " + (
        "float32 cpu"
    )
    message = refused(name, "gamma", x, weight, use_rms_norm=True)
    assert message.endswith("expected a tensor [N] with use_rms_norm, got None")
    refused(name, "use_rms_norm", x, weight, use_rms_norm=True, use_swigelu=True, gamma=gamma)
    for given in (
        (x, weight, scales),
        (x, int4["weight"], scales, int4["weight_scale"]),
        (x, fp8["weight"], scales, fp8["weight_scale"]),
    ):
        refused(name, "x_scale", *given, op="fused_gemv")
    for columns in (2, 4):
        refused(name, "weight_scale", x, weight, None, normal(8, columns), op="fused_gemv")
    refused(name, "weight_scale", x, fp8["weight"], op="fused_gemv")
    refused(name, "weight_scale", x, int4["weight"], op="fused_gemv")
    refused(name, "x_scale", x.to(FP8), fp8["weight"], None, fp8["weight_scale"], op="fused_gemv")


@pytest.mark.parametrize("bad", [None, 3, torch.ones(())])
def test_gemv_of_what_is_no_matrix(bad: Any) -> None:
    refused("musa_fused_gemv", "x", bad, normal(2, 2), op="fused_gemv")
    refused("musa_fused_gemv", "weight", normal(2, 2), bad, op="fused_gemv")


# ---- fused_moe_gemv ----------------------------------------------------------------------------


def moe_arguments() -> dict[str, Any]:
    """Three tokens, two slots, four experts of eight rows, no weights on the router."""
    return {
        **arguments("musa_fused_moe_gemv"),
        **{"A": normal(3, 256, dtype=BF16), "B": normal(4, 8, 256, dtype=BF16)},
        **{"C": torch.zeros(6, 8, dtype=BF16), "mul_routed_weight": False, "use_swigelu": False},
    }


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("swiglu", [True, False])
@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("scheme", ["dense", *SCHEMES])
def test_moe(scheme: str, down: bool, swiglu: bool, routed: bool, flat: bool) -> None:
    m, k, experts, n = 3, 2, 4, 192
    ids = torch.tensor([[3, 0], [1, 1], [-1, 2]])
    router = torch.rand(m, k, generator=g())
    weights: dict[str, Any] = {"weight": normal(experts, n, 256, dtype=BF16)}
    if scheme != "dense":
        weights = gemv_weights(scheme, n, 256, lead=(experts,))
    rows = normal(m * k if down else m, 256, dtype=BF16)
    width = n // 2 if swiglu else n
    shape = (m * k, width) if flat else (m, k, width)
    c = torch.full(shape, 7.0, dtype=BF16)
    result = old(
        "musa_fused_moe_gemv",
        *(rows, weights["weight"], c, None, weights.get("weight_scale"), router, ids),
        *(routed, 1 if down else k, scheme.startswith("int4"), swiglu),
    )
    assert result is None
    expected = ops.fused_moe_gemv(
        rows.view(m, k, 256) if down else rows,
        topk_ids=ids,
        topk_weights=router if routed else None,
        activation="swiglu" if swiglu else None,
        **weights,
    )
    assert torch.equal(c.view(m, k, width), expected)
    assert expected[0].any() and not expected[2, 0].any()  # the id -1


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("group", [64, 128])
def test_moe_of_fp8_rows(group: int, down: bool) -> None:
    m, k = 3, 2
    rows = m * k if down else m
    a, a_scale = normal(rows, 256).to(FP8), normal(rows, 256 // group).abs()
    weights = gemv_weights(f"fp8-{group}", 192, 256, lead=(4,))
    given = {**moe_arguments(), "A": a, "A_scale": a_scale, "topk": 1 if down else k}
    given |= {"B": weights["weight"], "B_scale": weights["weight_scale"]}
    given |= {"C": torch.zeros(6, 192, dtype=BF16)}
    old("musa_fused_moe_gemv", **given)
    if down:
        a, a_scale = a.view(m, k, -1), a_scale.view(m, k, -1)
    expected = ops.fused_moe_gemv(a, topk_ids=given["topk_ids"], x_scale=a_scale, **weights)
    assert torch.equal(given["C"].view(m, k, -1), expected) and expected.any()


def test_moe_with_one_slot_and_strided_tensors() -> None:
    """With k = 1 both conventions are one. Strides count, where memory was taken in order."""
    given = {
        **moe_arguments(),
        "topk": 1,
        "topk_ids": torch.tensor([[3, 1], [0, 1], [2, 1]])[:, :1],
    }
    given |= {"topk_weights": normal(2, 3).t()[:, :1], "mul_routed_weight": True}
    given |= {"C": torch.full((3, 16), 7.0, dtype=BF16)[:, ::2]}
    old("musa_fused_moe_gemv", **given)
    ids, router = given["topk_ids"], given["topk_weights"]
    expected = ops.fused_moe_gemv(given["A"], given["B"], ids.clone(), router.clone())
    assert torch.equal(given["C"], expected[:, 0])
    down = {**moe_arguments(), "topk": 1, "A": normal(256, 6, dtype=BF16).t()}
    down["C"] = torch.full((8, 6), 7.0, dtype=BF16).t()
    old("musa_fused_moe_gemv", **down)
    rows = down["A"].contiguous().view(3, 2, 256)
    assert torch.equal(down["C"], ops.fused_moe_gemv(rows, down["B"], down["topk_ids"]).view(6, 8))


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("topk", {"topk": 3}),
        ("topk", {"topk": 0}),
        ("A", {"topk": 1}),
        ("A", {"A": normal(6, 256, dtype=BF16)}),
        ("A", {"A": normal(4, 256, dtype=BF16)}),
        ("A", {"A": normal(3, 2, 256, dtype=BF16)}),
        ("A", {"A": None}),
        ("B", {"B": normal(8, 256, dtype=BF16)}),
        ("C", {"C": None}),
        ("C", {"C": torch.zeros(48, dtype=BF16)}),
        ("topk_ids", {"topk_ids": torch.tensor([3, 0, 1, 1, -1, 2])}),
        ("topk_ids", {"topk_ids": None}),
        ("topk_weights", {"topk_weights": None, "mul_routed_weight": True}),
        ("use_int4_w4a16", {"use_int4_w4a16": True}),
        ("use_int4_w4a16", {"B": torch.zeros(4, 8, 128, dtype=torch.uint8)}),
        ("use_int4_w4a16", {"B": torch.zeros(4, 8, 256).to(FP8), "use_int4_w4a16": True}),
    ],
)
def test_moe_refuses(argument: str, changes: dict[str, Any]) -> None:
    given = {**moe_arguments(), **changes}
    refused("musa_fused_moe_gemv", argument, **given)
    assert given["C"] is None or not given["C"].any()


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("out", {"C": torch.zeros(7, 8, dtype=BF16)}),
        ("out", {"C": torch.zeros(3, 16, dtype=BF16)}),
        ("out", {"C": torch.zeros(6, 8, dtype=HALF)}),
        ("x_scale", {"A_scale": torch.ones(3, 2)}),
        ("weight_scale", {"B_scale": torch.ones(4, 8, 2)}),
        ("topk_weights", {"topk_weights": normal(6, 1), "mul_routed_weight": True}),
    ],
)
def test_moe_leaves_to_the_op(argument: str, changes: dict[str, Any]) -> None:
    given = {**moe_arguments(), **changes}
    refused("musa_fused_moe_gemv", argument, **given, op="fused_moe_gemv")
    assert not given["C"].any()


def test_moe_says_what_topk_may_be() -> None:
    message = refused("musa_fused_moe_gemv", "topk", **{**moe_arguments(), "topk": 3})
    assert message.endswith("expected k = 2, the columns of 'topk_ids', or 1, got 3")
    message = refused("musa_fused_moe_gemv", "A", **{**moe_arguments(), "topk": 1})
    assert message.endswith("expected 6 rows beside topk = 1, got [3, 256] bfloat16 cpu")
    message = refused(
        "musa_fused_moe_gemv", "use_int4_w4a16", **{**moe_arguments(), "use_int4_w4a16": True}
    )
    assert message.endswith("expected False beside bfloat16 'B', got True")


# ---- fused_mul_add -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, HALF, BF16])
@pytest.mark.parametrize("scale", [-0.5, 0.0, 1.3])
def test_mul_add(scale: float, dtype: torch.dtype) -> None:
    x, bias = normal(3, 17, dtype=dtype), normal(51, dtype=dtype).flip(0).view(3, 17)
    before = x.clone(), bias.clone()
    expected = ops.fused_mul_add(x, bias, scale)
    for result in (
        old("musa_fused_mul_add", x, bias, scale),
        old("musa_fused_mul_add", self=x, bias=bias, scale=scale, accurate=True),
    ):
        assert torch.equal(result, expected)
        assert torch.equal(x, before[0]) and torch.equal(bias, before[1])
    result = old("musa_fused_mul_add", x, bias, scale, False)
    assert result is bias
    assert torch.equal(bias, expected) and torch.equal(x, before[0])


def test_mul_add_in_place_of_itself() -> None:
    x = normal(9, dtype=BF16)
    expected = ops.fused_mul_add(x, x, 0.5)
    assert old("musa_fused_mul_add", x, x, 0.5, accurate=False) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("accurate", [True, False])
def test_mul_add_refuses(accurate: bool) -> None:
    name, x, op = "musa_fused_mul_add", normal(4), "fused_mul_add"
    refused(name, "bias", x, None, 1.0, accurate, op=op)
    refused(name, "scale", x, x.clone(), None, accurate, op=op)
    refused(name, "bias", x, x.half(), 1.0, accurate, op=op)
    refused(name, "bias", x, normal(5), 1.0, accurate, op=op)
    if not accurate:
        refused(name, "out", x, normal(1), 1.0, accurate, op=op)


# ---- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
def test_sampling(order: str) -> None:
    name = "top_k_top_p_sampling_from_probs"
    probs = torch.softmax(normal(64, 200) * 2, -1)
    top_k, top_p = torch.arange(1, 65), torch.linspace(0.1, 1.0, 64)
    indices = torch.arange(64).flip(0).repeat(2)
    new = ops.top_k_top_p_sampling_from_probs
    for k, p in ((top_k, top_p), (20, 0.6)):
        tokens = old(name, probs, k, p, indices, order, True, g())
        expected = new(probs, k, p, indices=indices, filter_apply_order=order, generator=g())
        assert tokens.dtype is torch.int32 and torch.equal(tokens, expected)
        plain = old(name, probs, k, p, filter_apply_order=order, generator=g(), check_nan=True)
        assert torch.equal(plain, new(probs, k, p, filter_apply_order=order, generator=g()))
    other = {"joint": "top_k_first", "top_k_first": "joint"}[order]
    assert not torch.equal(tokens, new(probs, 20, 0.6, indices=indices,
                                       filter_apply_order=other, generator=g()))  # fmt: skip


def test_sampling_without_a_generator_follows_manual_seed() -> None:
    probs = torch.softmax(normal(64, 200), -1)
    torch.manual_seed(5)
    tokens = old("top_k_top_p_sampling_from_probs", probs, 0, 1.0)
    torch.manual_seed(5)
    assert torch.equal(tokens, ops.top_k_top_p_sampling_from_probs(probs, 0, 1.0))


def test_sampling_looks_for_nan_where_asked() -> None:
    name = "top_k_top_p_sampling_from_probs"
    probs = torch.tensor([[0.0, 1.0], [0.5, float("nan")]])
    message = refused(name, "probs", probs, 0, 1.0, check_nan=True)
    assert message == f"{name}: argument 'probs': expected no NaN, with check_nan, got a NaN"
    assert old(name, probs, 0, 1.0).tolist() == [1, 0]
    assert isinstance(ArgumentError("", "", "", ""), ValueError)  # what was raised before


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("filter_apply_order", {"filter_apply_order": "top_p_first"}),
        ("probs", {"probs": torch.ones(2, 4, dtype=torch.float64)}),
        ("probs", {"probs": None, "check_nan": True}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("top_p", {"top_p": torch.ones(2, dtype=HALF)}),
        ("top_k", {"top_k": torch.ones(2)}),
    ],
)
def test_sampling_leaves_to_the_op(argument: str, changes: dict[str, Any]) -> None:
    name = "top_k_top_p_sampling_from_probs"
    refused(name, argument, **{"probs": torch.ones(2, 4), "top_k": 2, "top_p": 0.5, **changes})
