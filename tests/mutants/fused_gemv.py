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

_ARGUMENTS = "common/gemv.muh"
_BLOCK = "common/gemv_block.muh"
_PRODUCT = "common/matrix.muh"
_MATRIX = "common/gemv_matrix.muh"  # at 32 lanes all but fp32
_CODES = "common/gemv_codes.muh"
_FMA = "musa/gemv.mu"  # at 128 lanes everything
_NORM = "musa/fused_gemv.mu"
# Sources that use a header, each with one scheme.
_DENSE, _FP8, _INT4 = (f"gemv_matrix_{scheme}.mu" for scheme in ("dense", "fp8", "int4"))
_OF_FMA, _LAUNCHER = "gemv.mu", "fused_gemv.mu"


def _wide(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, _FMA, old, new, arch="warp128")


KERNEL_MUTANTS = (
    # From tensors to a problem.
    Mutant("address-unchecked", _ARGUMENTS, "!aligned(t.data, access) || ", "", only=_LAUNCHER),
    Mutant("row-stride-unchecked", _ARGUMENTS, "c.row_stride % access != 0 ||", "", only=_LAUNCHER),
    Mutant(
        "end-of-row-outside-vectors",
        _ARGUMENTS,
        "row_bytes % access != 0))",
        "false))",
        only=_LAUNCHER,
    ),
    Mutant("group-32-as-64", _ARGUMENTS, "== 32 ? 5 :", "== 32 ? 6 :", only=_LAUNCHER),
    Mutant(
        "blocks-always-of-128",
        _ARGUMENTS,
        "p.weight_scale.rows_an_entry = static_cast<int32_t>(w.group_size);",
        "p.weight_scale.rows_an_entry = 128;",
        only=_LAUNCHER,
    ),
    Mutant(
        "groups-of-x-ignored",
        _ARGUMENTS,
        "grouped = grouped || (!whole && of_x.shape[1] > 1);",
        "",
        only=_LAUNCHER,
    ),
    Mutant(
        "stride-of-one-row-counts",
        _ARGUMENTS,
        "return t.shape[d] == 1 ? 0 : t.stride[d];",
        "return t.stride[d];",
        only=_LAUNCHER,
    ),
    # Loads, rows and columns.
    Mutant(
        "vector-past-row",
        _BLOCK,
        "if (index >= c.accesses_a_row) return make_uint4(0, 0, 0, 0);",
        "",
        only=_DENSE,
    ),
    Mutant(
        "gather-past-row",
        _BLOCK,
        "if (access < accesses_a_row) word[w] |=",
        "word[w] |=",
        only=_DENSE,
    ),
    Mutant(
        "columns-beyond-16-dropped", _BLOCK, "? (p.columns + width - 1) / width", "? 1", only=_DENSE
    ),
    Mutant("up-is-gate", _BLOCK, "return up ? p.outputs + row : row;", "return row;", only=_DENSE),
    Mutant(
        "partial-tile-dropped",
        _BLOCK,
        "static_cast<unsigned>(ceil_div(p.outputs, outputs))",
        "static_cast<unsigned>(p.outputs < outputs ? 1 : p.outputs / outputs)",
        only=_DENSE,
    ),
    # Epilogue.
    Mutant(
        "gate-and-up-swapped",
        _BLOCK,
        "silu(v) * sum_of(outputs + r, column, p.outputs + row)",
        "v * silu(sum_of(outputs + r, column, p.outputs + row))",
        only=_DENSE,
    ),
    Mutant(
        "bias-of-row-in-tile",
        _BLOCK,
        "row * p.bias.row_stride",
        "r * p.bias.row_stride",
        only=_DENSE,
    ),
    Mutant(
        "bias-of-gate-for-up",
        _BLOCK,
        "sum_of(outputs + r, column, p.outputs + row)",
        "sum_of(outputs + r, column, row)",
        only=_DENSE,
    ),
    Mutant(
        "norm-over-another-count",
        _NORM,
        "static_cast<float>(n.columns));",
        "static_cast<float>(n.columns + 1));",
    ),
    Mutant(
        "norm-of-256-outputs",
        _NORM,
        "i += kThreads) sum = fmaf(row[i], row[i], sum);",
        "i += n.columns) sum = fmaf(row[i], row[i], sum);",
    ),
    Mutant("eps-outside-the-root", _NORM, "sqrtf(mean + n.eps)", "sqrtf(mean) + n.eps"),
    Mutant("norm-weight-stride-ignored", _NORM, "i * n.weight_stride", "i"),
    # The matrix unit.
    Mutant(
        "sums-transposed",
        _PRODUCT,
        "p.row[i] = number / kTile;\n      p.column[i] = number %",
        "p.row[i] = number % kTile;\n      p.column[i] = number /",
        only=_DENSE,
    ),
    Mutant(
        "second-tile-is-the-first",
        _MATRIX,
        "tiles_.rows + r * kTile * F::kRowStride + c * kChunkBytes",
        "tiles_.rows + c * kChunkBytes",
    ),
    Mutant("uneven-taken-for-even", _MATRIX, "p.k % F::kSlice == 0;", "true;", only=_DENSE),
    Mutant(
        "last-slice-dropped",
        _MATRIX,
        "slices_((p.k + F::kSlice - 1) /",
        "slices_(p.k /",
        only=_DENSE,
    ),
    Mutant("int4-zero-ignored", _MATRIX, "pair_of<T>(zero[c][r])", "pair_of<T>(8)", only=_INT4),
    Mutant(
        "nibbles-in-another-order",
        _MATRIX,
        "make_uint4(low(v.x, v.z), high(v.x, v.z), low(v.y, v.w), high(v.y, v.w))",
        "make_uint4(low(v.x, v.y), high(v.x, v.y), low(v.z, v.w), high(v.z, v.w))",
        only=_INT4,
    ),
    Mutant(
        "fp8-nan-is-480", _MATRIX, "if constexpr (F::kScheme == kFp8) spoil(total);", "", only=_FP8
    ),
    Mutant("fp8-nan-in-last-word-is-480", _MATRIX, " | nans(v.w);", ";", only=_FP8),
    Mutant(
        "fp8-nan-of-first-lane-only",
        _MATRIX,
        "for (int apart = 1; apart < F::kRowLanes; apart *= 2)",
        "for (int apart = 1; apart < 1; apart *= 2)",
        only=_FP8,
    ),
    Mutant(
        "fp8-x-nan-is-480",
        _MATRIX,
        "with_nans<T, 1>(decode_fp8<T, 1>(q[i]), q[i])",
        "decode_fp8<T, 1>(q[i])",
        only=_FP8,
    ),
    Mutant(
        "fp8-subnormals-lost",
        _CODES,
        "return multiply_bf16_pairs(a, b);",
        # As hardware that takes bf16's subnormals for zero.
        "if ((a & 0x7f80u) == 0) a &= 0xffff8000u;\n"
        "    if ((a & 0x7f800000u) == 0) a &= 0x8000ffffu;\n"
        "    return multiply_bf16_pairs(a, b);",
        only=_FP8,
    ),
    Mutant(
        "infinite-scale-kept",
        _BLOCK,
        "{ return scale + (scale - scale); }",
        "{ return scale; }",
        only=_FP8,
    ),
    Mutant(
        "scale-of-row-below",
        _MATRIX,
        "row_of(scaled_row(i)) /",
        "(row_of(scaled_row(i)) + 1) /",
        only=_FP8,
    ),
    Mutant(
        "scale-of-group-after",
        _MATRIX,
        "slice * F::kSlice + segment * kSegment;",
        "slice * F::kSlice + (segment + 1) * kSegment;",
        only=_FP8,
    ),
    Mutant("groups-of-64-unsplit", _MATRIX, "kMatrix16x8 ? 6 : 7", "kMatrix16x8 ? 5 : 6"),
    Mutant(
        "halves-of-a-chunk-not-told-apart",
        _MATRIX,
        "words_of(x[0])[i] &= words_of(half_)[i];",
        "",
        only=_INT4,
    ),
    Mutant(
        "columns-from-five-on-dropped", _MATRIX, "column_at(first) < count_)", "false)", only=_DENSE
    ),
    Mutant(
        "planes-of-the-first",
        _MATRIX,
        "columns + kPlane * kTile, F::kColumnStride",
        "columns, F::kColumnStride",
        only=_FP8,
    ),
    Mutant(
        "x-scale-by-row-of-weight",
        _MATRIX,
        "column_scale[segment][places_.column[i]]",
        "column_scale[segment][places_.row[i]]",
        only=_FP8,
    ),
    Mutant(
        "sums-read-early",
        _MATRIX,
        "        __syncthreads();\n        finish<",
        "        finish<",
        only=_DENSE,
    ),
    # Multiply-add.
    _wide("staged-past-row", "first + k + j < p.k ? x_at", "true ? x_at"),
    _wide("vectors-staged-past-row", "if (vectors && first + k < p.k) {", "if (vectors) {"),
    _wide("last-step-dropped", "steps_((p.k + kStep - 1) / kStep)", "steps_(p.k / kStep)"),
    _wide(
        "staged-over-what-is-read",
        "          __syncthreads();\n          stage_columns",
        "          stage_columns",
    ),
    _wide(
        "multiplied-before-staged",
        "staged_, line);\n          __syncthreads();",
        "staged_, line);",
    ),
    _wide(
        "warps-sums-read-early",
        "              sum;\n      }\n    }\n    __syncthreads();",
        "              sum;\n      }\n    }",
    ),
    _wide("int4-zero-ignored", "if (zero != 8) {", "if (false) {"),
    _wide(
        "nibbles-swapped", "to[i] = __uint_as_float(bits) -", "to[i ^ 1] = __uint_as_float(bits) -"
    ),
    _wide(
        "fp8-nan-is-480",
        "if ((((q & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) != 0) {",
        "if (false) {",
    ),
    _wide("fp8-x-nan-is-480", "if (magnitude == 0x7f) return __uint_as_float(0x7fffffffu);", ""),
    _wide("fp8-x-subnormals-lost", "static_cast<float>(magnitude) * 0x1p-9f", "0.f"),
    Mutant(
        "infinite-scale-kept",
        _BLOCK,
        "{ return scale + (scale - scale); }",
        "{ return scale; }",
        "warp128",
        only=_OF_FMA,
    ),
    _wide(
        "infinite-x-scale-kept",
        "fp8_to_float(*at) * infinite_is_nan(scale)",
        "fp8_to_float(*at) * scale",
    ),
    _wide("scale-of-row-below", "row / p.weight_scale", "(row + 1) / p.weight_scale"),
    _wide(
        "scale-of-group-after",
        "const int k = vector * F::kElements;",
        "const int k = (vector + 1) * F::kElements;",
    ),
    _wide(
        "zero-of-first-group",
        "[zero_at_[r] + group * p_.weight_zero.group_stride]",
        "[zero_at_[r]]",
    ),
    _wide("x-scale-of-first-group", "(k >> p.group_shift) *", "0 *"),
)
"""Faults of the kernels, run by the `simt` backend."""
