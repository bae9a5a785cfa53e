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

_SOURCE = "musa/top_k_top_p_sampling_from_probs.mu"


def _fault(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, _SOURCE, old, new)


KERNEL_MUTANTS = (
    # Arguments.
    _fault("top-k-of-one-is-off", "top_k > 0 && top_k <", "top_k > 1 && top_k <"),
    _fault(
        "share-of-23-bits",
        "clamped(top_p) * kWholePortion",
        "clamped(top_p * 0.9999999f) * kWholePortion",
    ),
    _fault("nan-share-accepted", "if (top_p != top_p || min_p != min_p) return -1;", ""),
    _fault("index-unchecked-above", "row < 0 || row >= a.num_rows", "row < 0 || row > a.num_rows"),
    _fault("stream-always-numbered", "a.one_stream ? 0 :", "false ? 0 :"),
    _fault("column-stride-ignored", "? data[at * stride] : T{}", "? data[at] : T{}"),
    # Masses and bounds.
    _fault("mass-above-one", "if (bits >= kOne) return kWholeMass;", ""),
    _fault("mass-rounded", "(mantissa << 20) >>", "((mantissa << 20) + (uint64_t{1} << 42)) >>"),
    _fault("need-rounded-down", "(portion * low + 0xffffffu)", "(portion * low)"),
    _fault("half-bins-taken-for-one-value", "kInBin<half_t> = 3u << 13", "kInBin<half_t> = 0"),
    _fault(
        "fp32-bins-taken-for-one-value", "kInBin<float> = (1u << kBinBits) - 1", "kInBin<float> = 0"
    ),
    _fault(
        "all-of-one-as-the-bin-below", "bin == kBins - 1 ? kWholeMass :", "false ? kWholeMass :"
    ),
    _fault(
        "order-swapped",
        "return has_k() && has_p() && !joint;",
        "return has_k() && has_p() && joint;",
    ),
    _fault("list-starts-at-top-k", "const Mark from = s.earliest.place", "const Mark from = kBins"),
    _fault(
        "earliest-bin-skipped",
        "bin_floor(kBins - from.place);",
        "bin_floor(kBins - 1 - from.place);",
    ),
    _fault("min-p-in-the-list-lost", "if (kept < plan.least) kept = plan.least;", ""),
    _fault(
        "min-p-above-the-list-lost", "if (kBins - 1 - bin_of(least) < from.place) return known;", ""
    ),
    # Lists.
    _fault("infinity-accepted", "most >= kInfinity << 1", "most > kInfinity << 1"),
    _fault("rank-one-off", "r.top_k - 1 - plan.above", "r.top_k - plan.above"),
    _fault("sorted-halfway", "for (int run = 2; run <= size;", "for (int run = 2; run < size;"),
    _fault(
        "survivors-without-ties",
        "if (bits >= kept) own_survivors",
        "if (bits > kept) own_survivors",
    ),
    _fault("list-in-wrong-segment", "(index + row.lead) / Row<T>::kPack", "index / Row<T>::kPack"),
    # The slow way.
    _fault(
        "ties-not-flushed",
        "if (count > 0) add_exactly(s, bin, count, mass);\n    __syncthreads();",
        "__syncthreads();",
    ),
    _fault(
        "highest-limb-lost",
        "limb < kLimbs - 1 ? rest & kLimbMask : rest",
        "limb < kLimbs - 1 ? rest & kLimbMask : 0",
    ),
    _fault("narrow-forgets-min-p", "kept > plan->least ? kept : plan->least", "kept"),
    _fault(
        "narrow-by-top-k-alone",
        "kept = select(row, by_count.bits, plan->high, kNoLimit, needed, s).bits;",
        "kept = needed > 0 ? by_count.bits : 0;",
    ),
    # The draw.
    _fault("token-one-early", "if (one > left) {", "if (one >= left) {"),
    _fault("philox-of-nine-rounds", "round < 10", "round < 9"),
    _fault("target-without-carry", "(middle >> 32) + (other >> 32)", "(middle >> 32)"),
    _fault("lead-forgotten", "(own + k) * kPack - row.lead + i", "(own + k) * kPack + i"),
    # Rows that blocks share.
    _fault("bins-not-cleared", "w.bins[i] = 0;", "w.bins[i] = 1;"),
    _fault("list-not-cleared", "if (first == 0) w.listed = 0;", "if (first == 0) w.listed = 1;"),
    _fault("total-of-one-block", "i < kSplit; ++i) total +=", "i < 1; ++i) total +="),
    _fault("bad-of-one-block", "bad = bad || w.bad[i] != 0;", "bad = bad || w.bad[0] != 0;"),
    _fault("largest-of-one-block", "if (static_cast<int>(w.largest[i]) > largest)", "if (i == 0)"),
    _fault(
        "parts-of-segments-mixed",
        "w.above[warp() * kSplit + lane()]",
        "w.above[lane() * kSplit + warp()]",
    ),
)
"""Faults of the kernel, run by the `simt` backend."""
