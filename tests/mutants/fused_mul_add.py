from tests.mutants import Mutant

_MODULE = "kernelhub.backends.reference.fused_mul_add"

MUTANTS = (
    Mutant("bias-subtracted", _MODULE, "+ bias.float()", "- bias.float()"),
    Mutant("scale-dropped", _MODULE, "x.float() * scale", "x.float()"),
    Mutant(
        "arithmetic-in-input-dtype", _MODULE, "x.float() * scale + bias.float()", "x * scale + bias"
    ),
    Mutant("bias-dropped", _MODULE, " + bias.float()", " + 0 * bias.float()"),
    Mutant("out-not-written", _MODULE, "else out.copy_(y)", "else out"),
    Mutant("scale-rounded", _MODULE, "else scale\n", "else round(scale, 1)\n"),
)

_KERNEL = "musa/fused_mul_add.mu"

KERNEL_MUTANTS = (
    Mutant("tail-unmasked", _KERNEL, "left < kPack ? static_cast<int>(left) : kPack", "kPack"),
    Mutant(
        "tail-dropped",
        _KERNEL,
        "ceil_div(layout.dims[0].size, kPack)",
        "layout.dims[0].size / kPack",
    ),
    Mutant("alignment-unchecked", _KERNEL, "|| !aligned(data[k], pack * sizeof(T))", ""),
    Mutant("row-alignment-unchecked", _KERNEL, "stride[k] % pack != 0", "stride[k] % 1 != 0"),
    Mutant(
        "broadcast-ignored",
        _KERNEL,
        "if (own < 0 || t.shape[own] == 1) return 0",
        "if (own < 0) return 0",
    ),
    Mutant(
        "merges-too-much",
        _KERNEL,
        "inner.stride[k] * inner.size) return false",
        "inner.stride[k] * inner.size) return k != kX",
    ),
    Mutant(
        "scale-of-first-lane",
        _KERNEL,
        "if (i > 0 && i < count && stride[kScale] != 0)",
        "if (false)",
    ),
    Mutant(
        "scale-dtype-ignored",
        _KERNEL,
        "read_float(o.scale, o.scale_dtype,",
        "read_float(o.scale, o.scale_dtype == KH_FLOAT32 ? KH_FLOAT32 : KH_FLOAT16,",
    ),
    Mutant("bias-subtracted", _KERNEL, "to_float(biases.at[i])", "-to_float(biases.at[i])"),
    Mutant(
        "rounded-twice",
        _KERNEL,
        "fmaf(to_float(xs.at[i]), scale,",
        "fmaf(to_float(from_float<T>(to_float(xs.at[i]) * scale)), 1.f,",
    ),
    Mutant(
        "rows-counted-from-behind",
        _KERNEL,
        "const Index index = row % size;",
        "const Index index = row % (size > 1 ? size - 1 : size);",
    ),
    Mutant("out-stride-ignored", _KERNEL, "out[(first + i) * stride[kOut]] =", "out[first + i] ="),
)
"""Faults of the kernel, run by the `simt` backend."""
