from tests.mutants import Mutant

_OP = "kernelhub.backends.reference.fused_gemv"
_WEIGHTS = "kernelhub.backends.reference._weights"

MUTANTS = (
    Mutant("bias-dropped", _OP, "+ bias.float()", "+ 0 * bias.float()"),
    Mutant(
        "bias-after-activation",
        _OP,
        "if bias is not None:\n            y =",
        "if bias is not None and activation is None:\n            y =",
    ),
    Mutant("norm-mean-over-rows", _OP, "mean(-1, keepdim=True)", "mean(0, keepdim=True)"),
    Mutant("norm-of-first-row", _OP, "y.square().mean", "y[:1].square().mean"),
    Mutant("norm-without-eps", _OP, " + eps)", ")"),
    Mutant("norm-weight-dropped", _OP, " * norm_weight.float()", ""),
    Mutant(
        "norm-after-rounding",
        _OP,
        "y = y * torch.rsqrt(y",
        "y = y.bfloat16().float()\n            y = y * torch.rsqrt(y",
    ),
    Mutant("fp8-result-fp16", _OP, "torch.bfloat16 if", "torch.float16 if"),
    Mutant("out-dtype-ignored", _OP, "out_dtype or (", "("),
    Mutant("x-scale-dropped", _OP, "widen(x, x_scale, group_size)", "widen(x)"),
    Mutant(
        "activation-dropped", _OP, "_weights.activate(y, activation)", "_weights.activate(y, None)"
    ),
    Mutant("group-size-dropped", _OP, "weight_zero, group_size\n", "weight_zero\n"),
    Mutant("out-not-written", _OP, "else out.copy_(y)", "else out.zero_()"),
    Mutant("nibbles-swapped", _WEIGHTS, "(codes & 15, codes >> 4)", "(codes >> 4, codes & 15)"),
    Mutant("zero-point-7", _WEIGHTS, "zero = 8 if", "zero = 7 if"),
    Mutant("zero-point-ignored", _WEIGHTS, "8 if weight_zero is None", "8 if True"),
    Mutant(
        "one-group-signed",
        _WEIGHTS,
        "(unpack_int4(part).float() - zero)",
        "((unpack_int4(part).float() + (8 if scale.shape[1] == 1 else 0)) % 16 - zero)",
    ),
    Mutant(
        "scale-rounded-to-bf16",
        _WEIGHTS,
        "weight_scale[rows].float()",
        "weight_scale[rows].bfloat16().float()",
    ),
    Mutant(
        "group-128-assumed",
        _WEIGHTS,
        "group = k // max(scale.shape[1], 1)",
        "group = max(128, k // max(scale.shape[1], 1))",
    ),
    Mutant("block-row-rounded-up", _WEIGHTS, "[rows] // group", "[rows] * 0"),
    Mutant("default-block-64", _WEIGHTS, "group = group_size or 128", "group = group_size or 64"),
    Mutant(
        "x-scale-first-column",
        _WEIGHTS,
        "else _spread(scale, group_size or 128, k))",
        "else scale[:, :1])",
    ),
    Mutant(
        "channel-scale-first",
        _WEIGHTS,
        "part.float() * weight_scale[rows]",
        "part.float() * weight_scale[:1]",
    ),
    Mutant("gate-and-up-swapped", _WEIGHTS, "gate, up = y.chunk", "up, gate = y.chunk"),
    Mutant(
        "lone-column-stride",
        _WEIGHTS,
        "weight.clone(memory_format=torch.contiguous_format)",
        "weight.contiguous()",
    ),
    Mutant("gelu-exact", _WEIGHTS, 'approximate="tanh"', 'approximate="none"'),
)
