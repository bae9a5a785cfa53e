"""The contracts of the ops that ship with kernelhub: one module per op, each with a `SPEC`."""

NAMES = (
    "rotary_embedding",
    "fused_gemv",
    "fused_moe_gemv",
    "fused_mul_add",
    "top_k_top_p_sampling_from_probs",
)
