from tests.mutants import Mutant

_MODULE = "kernelhub.backends.reference.fused_moe_gemv"

MUTANTS = (
    Mutant(
        "negative-ids-wrap",
        _MODULE,
        "((ids >= 0) & (ids < num_experts))",
        "(ids < 0 + num_experts)",
    ),
    Mutant(
        "ids-cut-to-32-bits",
        _MODULE,
        "ids = topk_ids.flatten()",
        "ids = topk_ids.flatten().to(torch.int32)",
    ),
    Mutant(
        "id-E-reads-the-last-expert",
        _MODULE,
        "topk_ids.flatten()",
        "topk_ids.flatten().clamp(max=num_experts - 1)",
    ),
    Mutant("masked-as-expert-0", _MODULE, "topk_ids.flatten()", "topk_ids.flatten().clamp(min=0)"),
    Mutant("expert-beside", _MODULE, "weight[e]", "weight[e - 1]"),
    Mutant("scale-of-first-expert", _MODULE, "_of(weight_scale, e)", "_of(weight_scale, 0)"),
    Mutant(
        "scales-flat-over-experts",
        _MODULE,
        "_of(weight_scale, e)",
        # What blocks of 128 rows of one long [E * N, K] weight would have.
        "weight_scale.flatten(0, 1)[e * n // 128 :][: weight_scale.shape[1]]"
        " if weight_scale is not None and weight.dtype is FP8 and weight_scale.dim() == 3"
        " else _of(weight_scale, e)",
    ),
    Mutant("zero-of-first-expert", _MODULE, "_of(weight_zero, e)", "_of(weight_zero, 0)"),
    Mutant("zero-dropped", _MODULE, "_of(weight_zero, e)", "None"),
    Mutant("shared-row-by-slot", _MODULE, "at // slots if", "at % x.shape[0] if"),
    Mutant(
        "slot-row-by-token", _MODULE, "if x.dim() == 2 else at", "if x.dim() == 2 else at // slots"
    ),
    Mutant(
        "x-scale-by-place",
        _MODULE,
        "x_scale.flatten(0, -2)[rows]",
        "x_scale.flatten(0, -2)[at % x_scale[..., 0].numel()]",
    ),
    Mutant("x-scale-dropped", _MODULE, "[rows], scale, group_size)", "[rows], None, group_size)"),
    Mutant(
        "x-group-dropped", _MODULE, "scale, group_size)\n        product", "scale)\n        product"
    ),
    Mutant(
        "weight-group-dropped", _MODULE, "_of(weight_zero, e), group_size)", "_of(weight_zero, e))"
    ),
    Mutant(
        "product-rounded",
        _MODULE,
        "products.append(product)",
        "products.append(product.to(dtype).float())",
    ),
    Mutant(
        "places-in-order",
        _MODULE,
        "index_copy(0, places, y)",
        "index_copy(0, places.sort().values, y)",
    ),
    Mutant(
        "weights-in-place-order",
        _MODULE,
        "topk_weights.flatten()[places]",
        "topk_weights.flatten()[: len(places)]",
    ),
    Mutant("weights-dropped", _MODULE, "if topk_weights is not None:", "if False:"),
    Mutant("weights-rounded", _MODULE, "[places].float()", "[places].bfloat16().float()"),
    Mutant(
        "weights-after-activation",
        _MODULE,
        "y = y * topk_weights.flatten()[places].float().unsqueeze(1)\n"
        "    y = activate(y, activation)",
        "y = activate(y, activation) * topk_weights.flatten()[places].float().unsqueeze(1)\n"
        "    else:\n        y = activate(y, activation)",
    ),
    Mutant(
        "activation-after-sum",
        _MODULE,
        "y = activate(y, activation)\n",
        "y = activate(y, None if reduce and activation != 'swiglu' else activation)\n",
    ),
    Mutant(
        "sum-rounded-each-step",
        _MODULE,
        "fold(torch.add,",
        "fold(lambda s, t: (s + t).bfloat16().float(),",
    ),
    Mutant("sum-is-mean", _MODULE, "y.shape[2]))\n", "y.shape[2])) / slots\n"),
    Mutant("last-slot-not-summed", _MODULE, "y.unbind(1)", "y.unbind(1)[: max(slots - 1, 1)]"),
    Mutant(
        "terms-rounded", _MODULE, "if reduce:\n", "if reduce:\n        y = y.to(dtype).float()\n"
    ),
    Mutant("fp8-result-fp16", _MODULE, "torch.bfloat16 if", "torch.float16 if"),
    Mutant("out-dtype-ignored", _MODULE, "out_dtype or (", "("),
    Mutant("out-not-written", _MODULE, "else out.copy_(y)", "else out"),
)

_ARGUMENTS = "common/gemv.muh"
_BLOCK = "common/gemv_block.muh"
_MATRIX = "common/gemv_matrix.muh"  # at 32 lanes all but fp32
_FMA = "musa/gemv.mu"  # at 128 lanes everything
_SUM = "musa/fused_moe_gemv.mu"
# Sources that use a header, each with one scheme.
_DENSE, _FP8, _INT4 = (f"gemv_matrix_{scheme}.mu" for scheme in ("dense", "fp8", "int4"))
_LAUNCHER = "fused_moe_gemv.mu"

KERNEL_MUTANTS = (
    Mutant(
        "expert-stride-unchecked",
        _ARGUMENTS,
        "c.expert_stride % access != 0 ||",
        "",
        only=_LAUNCHER,
        case="apart-dense",
    ),
    Mutant("x-of-slots-by-token", _SUM, "a.x_per_slot ? static_cast<int32_t>(slots) : 1;", "1;"),
    # Ids.
    Mutant("ids-always-int32", _BLOCK, "p.topk_ids.dtype == KH_INT64", "false", only=_DENSE),
    Mutant(
        "ids-cut-to-32-bits",
        _BLOCK,
        "return read_integer(",
        "return (int32_t)read_integer(",
        only=_DENSE,
    ),
    Mutant(
        "slot-stride-of-ids-ignored",
        _BLOCK,
        "at.slot * p.topk_ids.group_stride",
        "at.slot",
        only=_DENSE,
        case="transposed-dense",
    ),
    Mutant("negative-ids-read", _MATRIX, "found.expert >= 0 && ", "", only=_DENSE),
    Mutant(
        "id-E-read",
        _MATRIX,
        "found.expert < p.num_experts;",
        "found.expert <= p.num_experts;",
        only=_DENSE,
    ),
    Mutant(
        "outside-not-zeroed",
        _MATRIX,
        "write_all<kRows>(p, tile, columns[0], 0.f);",
        "",
        only=_DENSE,
    ),
    Mutant(
        "zeros-in-one-tile",
        _BLOCK,
        "if (tile * outputs + r < p.outputs)",
        "if (tile == 0 && r < p.outputs)",
        only=_DENSE,
    ),
    # Places of an expert.
    Mutant(
        "duplicates-dropped",
        _BLOCK,
        "c.list[atomicAdd(&c.count, 1)] =",
        "if (i == own) c.list[atomicAdd(&c.count, 1)] =",
        only=_DENSE,
    ),
    Mutant(
        "places-beyond-256-dropped",
        _BLOCK,
        "first = item / kPlaces * kPlaces, left",
        "first = 0, left",
        only=_DENSE,
    ),
    Mutant(
        "columns-beyond-16-dropped",
        _MATRIX,
        "first < found.count; first +=",
        "first < 1; first +=",
        only=_DENSE,
    ),
    Mutant(
        "first-columns-again",
        _MATRIX,
        "describe_columns(p, found, first, count, columns);\n        Products",
        "describe_columns(p, found, 0, count, columns);\n        Products",
        only=_DENSE,
    ),
    Mutant(
        "next-columns-too-early",
        _MATRIX,
        "__uint_as_float(~0u));\n      }\n      __syncthreads();",
        "__uint_as_float(~0u));\n      }",
        only=_DENSE,
    ),
    # Weights of experts and of slots.
    Mutant(
        "weight-of-first-expert",
        _MATRIX,
        "p.weight.data + expert * p.weight.expert_stride",
        "p.weight.data",
        only=_DENSE,
    ),
    Mutant(
        "scale-of-first-expert", _MATRIX, "expert * p.weight_scale.expert_stride +", "", only=_FP8
    ),
    Mutant(
        "zero-of-first-expert", _MATRIX, "expert * p.weight_zero.expert_stride +", "", only=_INT4
    ),
    Mutant(
        "topk-weight-of-first-slot",
        _BLOCK,
        "at.slot * p.topk_weights.group_stride",
        "0",
        only=_DENSE,
    ),
    Mutant(
        "topk-weight-after-activation",
        _BLOCK,
        "v = silu(v) * sum_of",
        "v = silu(v / columns[column].weight) * sum_of",  # up has the weight already
        only=_DENSE,
    ),
    # The sum over slots.
    Mutant("slots-of-another-token", _SUM, "token * s.slots * s.columns", "token * s.columns"),
    Mutant("last-slot-not-summed", _SUM, "slot < s.slots;", "slot + 1 < s.slots;"),
    # Multiply-add.
    Mutant("scale-of-first-expert", _FMA, "expert * p.weight_scale.expert_stride +", "", "warp128"),
    Mutant(
        "columns-beyond-16-dropped",
        _FMA,
        "first < found.count; first +=",
        "first < 1; first +=",
        "warp128",
    ),
    Mutant(
        "id-E-read",
        _FMA,
        "found.expert < p.num_experts;",
        "found.expert <= p.num_experts;",
        "warp128",
    ),
    Mutant(
        "outside-not-zeroed",
        _FMA,
        "write_all<Work::kTileRows>(p, tile, columns[0], 0.f);",
        "",
        "warp128",
    ),
    Mutant(
        "next-columns-too-early",
        _FMA,
        "columns[0], 0.f);\n      }\n      __syncthreads();",
        "columns[0], 0.f);\n      }",
        "warp128",
    ),
)
"""Faults of the kernels, run by the `simt` backend."""
