from tests.mutants import Mutant

_MODULE = "kernelhub.backends.reference.top_k_top_p_sampling_from_probs"


def _mutant(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, _MODULE, old, new)


MUTANTS = (
    # Filters.
    _mutant("top-k-one-too-few", "(kept - 1)[:, None]", "(kept - 2).clamp(min=0)[:, None]"),
    _mutant("top-k-tensor-of-one-is-off", "(top_k > 0) &", "(top_k > 1) &"),
    _mutant("top-k-off-at-minus-one-only", "0 < top_k < vocab_size else", "0 <= top_k else"),
    _mutant("top-k-drops-ties", "probs >= ranked.gather", "probs > ranked.gather"),
    _mutant("order-ignored", 'order == "top_k_first"', "False"),
    _mutant("order-swapped", 'order == "top_k_first"', 'order == "joint"'),
    _mutant("share-rounded", "* 2.0**24).long()", "* 2.0**24).round().long()"),
    _mutant("share-of-23-bits", "* 2.0**24).long()", "* 2.0**23).long().mul(2)"),
    _mutant(
        "need-in-fp32",
        "needed = portion * (total >> 24)",
        "needed = (portion * total.float() * 2.0**-24).ceil().long() #",
    ),
    _mutant("need-rounded-down", "(total & 0xFFFFFF) + 0xFFFFFF)", "(total & 0xFFFFFF))"),
    _mutant("need-without-low-half", "(total & 0xFFFFFF)", "0"),
    _mutant("tie-of-share-kept", "cumsum(-1), needed)", "cumsum(-1), needed, right=True)"),
    _mutant("threshold-value-dropped", "probs >= threshold", "probs > threshold"),
    _mutant(
        "top-k-lost-beside-top-p", "reached.minimum(last)", "reached.clamp(max=vocab_size - 1)"
    ),
    _mutant("ranks-by-mass", "_threshold(probs, mass", "_threshold(probs.clamp(0, 1), mass"),
    _mutant("min-p-absolute", "_share(min_p, device) * largest", "_share(min_p, device)"),
    _mutant("min-p-in-fp64", "_share(min_p, device) *", "_share(min_p, device).double() *"),
    _mutant("min-p-replaces-others", "threshold.maximum(", "("),
    _mutant("share-clamp-lost", ".clamp(0, 1)[:, None]", "[:, None]"),
    # Masses.
    _mutant("mass-rounded", "* 2.0**44).long()", "* 2.0**44).round().long()"),
    _mutant("mass-negative", "probs.clamp(0, 1) *", "probs.clamp(max=1) *"),
    _mutant("mass-above-one", "probs.clamp(0, 1) *", "probs.clamp(min=0) *"),
    _mutant("mass-coarser", "* 2.0**44).long()", "* 2.0**43).long()"),
    _mutant("mass-summed-in-fp32", "cumsum(-1)  # [R, V]", "float().cumsum(-1).long()"),
    # The draw.
    _mutant("words-swapped", "multiply_high(low, high,", "multiply_high(high, low,"),
    _mutant("draw-one-early", "> target", ">= target"),
    _mutant(
        "bisection-short", "(running.shape[1].bit_length())", "(running.shape[1].bit_length() - 1)"
    ),
    _mutant("stream-always-numbered", "seed.shape[0] != 1", "False"),
    _mutant("stream-never-numbered", "seed.shape[0] != 1", "True"),
    _mutant(
        "counter-words-swapped", "*words(offset), *words(stream)", "*words(stream), *words(offset)"
    ),
    _mutant("offset-ignored", "offset or 0", "0"),
    _mutant("seed-high-word-lost", "words(seed))", "words(seed & 0xFFFFFFFF))"),
    _mutant("other-output-words", "out[0], out[1]", "out[2], out[3]"),
    _mutant(
        "indices-ignored", "row = indices.long()", "row = torch.arange(batch_size, device=device)"
    ),
    # Rows and samples that cannot be drawn.
    _mutant("minus-infinity-accepted", "least.isfinite() & ", ""),
    _mutant("infinity-accepted", " & largest.isfinite()", ""),
    _mutant("nan-share-accepted", "sane = sane & ~share.isnan()", "sane = sane & ~share.isinf()"),
    _mutant("infinite-share-refused", "~share.isnan()", "share.isfinite()"),
    _mutant("row-outside-accepted", "valid = inside & ", "valid = "),
    _mutant("row-0-refused", "(row >= 0)", "(row > 0)"),
    _mutant("massless-row-accepted", "(support_mass > 0)", "(support_mass >= 0)"),
    _mutant(
        "invalid-token-not-zero", "torch.where(valid, tokens, 0)", "torch.where(valid, tokens, -1)"
    ),
)
