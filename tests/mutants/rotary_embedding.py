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
