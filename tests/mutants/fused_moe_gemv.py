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
