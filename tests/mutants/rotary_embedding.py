from tests.mutants import Mutant

_MODULE = "kernelhub.backends.reference.rotary_embedding"

MUTANTS = (
    Mutant("sine-sign", _MODULE, "x * cos - y * sin", "x * cos + y * sin"),
    Mutant("sine-and-cosine-swapped", _MODULE, "    cos, sin = cache", "    sin, cos = cache"),
    Mutant("pairing-swapped", _MODULE, "        if is_neox:\n", "        if not is_neox:\n"),
    Mutant("one-row-too-many", _MODULE, "rows < num_rows", "rows <= num_rows"),
    Mutant("negative-rows-wrap", _MODULE, "(rows >= 0) & (rows < num_rows)", "(rows < num_rows)"),
    Mutant("sum-wraps", _MODULE, " & ~wrapped", ""),
    Mutant("offsets-added-in-int32", _MODULE, "rows + offsets", "rows.int() + offsets.int()"),
    Mutant("offsets-subtracted", _MODULE, "rows + offsets", "rows - offsets"),
    Mutant(
        "unknown-token-zeroed",
        _MODULE,
        "rotated.to(lanes.dtype), lanes)",
        "rotated.to(lanes.dtype), 0)",
    ),
    Mutant(
        "unknown-token-turned",
        _MODULE,
        "torch.where(known, rotated.to(lanes.dtype), lanes)",
        "rotated",
    ),
    Mutant("key-forgotten", _MODULE, "in (query, key)", "in (query,)"),
    Mutant(
        "key-limited-to-query-heads",
        _MODULE,
        "heads = tensor\n",
        "heads = tensor[..., : query.shape[-2], :]\n",
    ),
    Mutant("product-rounded", _MODULE, "pair = x * cos", "pair = (x * cos).to(lanes.dtype)"),
    Mutant("cache-rounded", _MODULE, "rows, 0)].float()", "rows, 0)].to(query.dtype).float()"),
    Mutant(
        "last-lane-dropped",
        _MODULE,
        "lanes.copy_(torch.where(known, rotated.to(lanes.dtype), lanes))",
        "lanes[..., :-1].copy_(torch.where(known, rotated.to(lanes.dtype), lanes)[..., :-1])",
    ),
    Mutant(
        "lanes-at-the-end",
        _MODULE,
        "heads[..., :rot_dim]",
        "heads[..., heads.shape[-1] - rot_dim :]",
    ),
    Mutant("written-to-a-copy", _MODULE, "lanes.copy_(", "lanes.contiguous().copy_("),
)

_KERNEL = "musa/rotary_embedding.mu"

KERNEL_MUTANTS = (
    Mutant(
        "rows-unchecked-above",
        _KERNEL,
        "row >= 0 && row < r.num_rows ? row : -1",
        "row >= 0 && row <= r.num_rows ? row : -1",
    ),
    Mutant(
        "rows-unchecked-below",
        _KERNEL,
        "row >= 0 && row < r.num_rows ? row : -1",
        "row < r.num_rows ? (row < 0 ? 0 : row) : -1",
    ),
    Mutant("wrapped-sum", _KERNEL, "if (row < 0 && offset < 0) return -1;", ""),
    Mutant(
        "offsets-ignored",
        _KERNEL,
        "static_cast<uint64_t>(row) + static_cast<uint64_t>(offset)",
        "static_cast<uint64_t>(row)",
    ),
    Mutant("positions-always-int64", _KERNEL, "t.dtype == KH_INT64}", "true}"),
    Mutant("query-heads-only", _KERNEL, "if (i >= p.heads ||", "if (i >= p.query_heads ||"),
    Mutant(
        "query-heads-only-in-any-call",
        _KERNEL,
        "threadIdx.y; i < r.heads;",
        "threadIdx.y; i < r.query_heads;",
    ),
    Mutant(
        "key-heads-not-counted", _KERNEL, "r.heads += num_heads(a.key, token_dims, head_size);", ""
    ),
    Mutant("key-from-query-head", _KERNEL, "(in_query ? i : i - r.query_heads)", "i"),
    Mutant("plain-key-from-query-head", _KERNEL, "(in_query ? i : i - p.query_heads)", "(i)"),
    Mutant(
        "plain-row-unchecked",
        _KERNEL,
        "static_cast<uint64_t>(p.num_rows)) return;",
        "~0ull) return;",
    ),
    Mutant("plain-with-offsets", _KERNEL, "r.offsets.data == nullptr;", "true;"),
    Mutant("plain-of-batches", _KERNEL, "r.tokens == r.tokens_a_batch &&", ""),
    Mutant("plain-with-wide-heads", _KERNEL, "plain && a_head <= kThreads", "plain"),
    Mutant("small-packs-of-wide-heads", _KERNEL, "small <= kThreads &&", ""),
    Mutant("half-the-small-packs", _KERNEL, "kSmall>, small)", "kSmall>, a_head)"),
    Mutant("twice-the-packs", _KERNEL, "kPack>, a_head)", "kPack>, small)"),
    Mutant("sign-of-sine", _KERNEL, "fmaf(x, c, -__fmul_rn(y, s))", "fmaf(x, c, __fmul_rn(y, s))"),
    Mutant(
        "sine-from-cosine",
        _KERNEL,
        "row[(r.half + first) * r.column_stride]",
        "row[first * r.column_stride]",
    ),
    Mutant(
        "packed-sine-from-cosine",
        _KERNEL,
        "load<kPack>(row + half)",
        "load<kPack>(row)",
    ),
    Mutant("heads-past-a-block", _KERNEL, "blockIdx.y) * blockDim.y", "blockIdx.y) * gridDim.y"),
    Mutant("packs-past-a-block", _KERNEL, "pack += blockDim.x", "pack += packs"),
    Mutant(
        "lane-stride-ignored",
        _KERNEL,
        "const T* x = head + (kNeox ? first : 2 * first) * stride;",
        "const T* x = head + (kNeox ? first : 2 * first);",
    ),
    Mutant(
        "pairing-swapped",
        _KERNEL,
        "ys.at[0] = x[(kNeox ? half : 1) * stride];",
        "ys.at[0] = x[(kNeox ? 1 : half) * stride];",
    ),
    Mutant("token-stride-unchecked", _KERNEL, "h.token_stride * size % bytes == 0 &&", ""),
    Mutant("address-unchecked", _KERNEL, "aligned(h.data, bytes) &&", ""),
    Mutant("table-address-unchecked", _KERNEL, "aligned(r.table, kTableBytes) &&", ""),
    Mutant(
        "batch-dropped",
        _KERNEL,
        "token = t - batch * r.tokens_a_batch;",
        "token = t;",
    ),
    Mutant(
        "flat-head-stride",
        _KERNEL,
        "flat ? head_size * lane : t.stride[token_dims]",
        "t.stride[token_dims]",
    ),
    Mutant("odd-half-in-packs", _KERNEL, "r.half % kPack == 0 &&", ""),
)
"""Faults of the kernel, run by the `simt` backend."""
