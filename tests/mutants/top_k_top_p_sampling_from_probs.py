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

_KERNELS = "top_k_top_p_sampling_from_probs.mu"


def _fault(name: str, old: str, new: str, case: str = "") -> Mutant:
    return Mutant(name, "common/sampling.muh", old, new, only=_KERNELS, case=case)


def _in_kernel(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, f"musa/{_KERNELS}", old, new)


KERNEL_MUTANTS = (
    # Arguments.
    _fault("top-k-of-one-is-off", "top_k > 0 && top_k <", "top_k > 1 && top_k <"),
    _fault(
        "share-of-23-bits",
        "clamped(top_p) * kWholePortion",
        "clamped(top_p * 0.9999999f) * kWholePortion",
    ),
    _fault("nan-share-accepted", "return top_p == top_p && min_p == min_p;", "return true;"),
    _fault("index-unchecked-above", "row < 0 || row >= a.num_rows", "row < 0 || row > a.num_rows"),
    _fault("stream-always-numbered", "a.one_stream ? 0 :", "false ? 0 :"),
    _fault("column-stride-ignored", "? data[at * stride] : T{}", "? data[at] : T{}"),
    # Masses.
    _fault("mass-above-one", "if (bits >= kOne) return kWholeMass;", ""),
    _fault("mass-rounded", "(mantissa << 20) >>", "((mantissa << 20) + (uint64_t{1} << 42)) >>"),
    _fault(
        "high-word-rounded",
        "const float shifted = add_toward_zero(four, value);",
        "const float shifted = __fadd_rn(four, value);",
    ),
    _fault(
        "low-word-rounded",
        "add_toward_zero(__uint_as_float(kLowZero), rest)",
        "__fadd_rn(__uint_as_float(kLowZero), rest)",
        case="masses-are-cut",
    ),
    _fault(
        "zeros-counted-as-one",
        "num_all += kPack;\n      if (most",
        "num_all += kPack - 1;\n      if (most",
    ),
    _fault("need-rounded-down", "(portion * low + 0xffffffu)", "(portion * low)"),
    _fault(
        "order-swapped",
        "return has_k() && has_p() && !joint;",
        "return has_k() && has_p() && joint;",
    ),
    # The bracket: only what must hold whatever the guess.
    _fault(
        "guess-believed-above",
        "if (found.count_above >= r.top_k || found.above >= needed) return 0;",
        "if (found.count_above >= r.top_k || found.above >= needed) return plan.high;",
    ),
    _fault("guess-believed-below", "none = low > kLeast ? 0 : kLeast;", "none = kLeast;"),
    _fault("cut-list-believed", "|| found.listed > kCapacity) return 0;", ") return 0;"),
    _fault(
        "short-rows-guessed-from-above-2^-20",
        "? Plan{kLeast, kInfinity, false}",
        "? Plan{kLeast + (24u << 23), kInfinity, true}",
    ),
    # The stream.
    _fault(
        "infinity-accepted", "if (bits << 1 >= kInfinity << 1)", "if (bits << 1 > kInfinity << 1)"
    ),
    _fault(
        "one-in-packs-above-one-lost",
        "if (has_mass(bits)) use(bits);",
        "if (has_mass(bits) && bits > kOne) use(bits);",
        case="least-of-min-p-beside-two",
    ),
    _fault("bracket-s-edge-not-above", "if (bits >= plan.high) {", "if (bits > plan.high) {"),
    _fault(
        "bracket-s-edge-not-summed",
        "if (bits_of(values.at[k].at[i]) < plan.high) continue;",
        "if (bits_of(values.at[k].at[i]) <= plan.high) continue;",
    ),
    _fault(
        "packs-at-the-edge-skipped",
        "if (most < plan.high) continue;",
        "if (most <= plan.high) continue;",
    ),
    _fault("packs-at-the-low-edge-skipped", "if (most >= plan.low) {", "if (most > plan.low) {"),
    _fault("runs-overlap", "+ through - num_hits;", "+ through - num_hits - (lane() > 9);"),
    _fault(
        "runs-of-steps-mixed",
        "s.runs[step * kWarps + warp()] = run_of",
        "s.runs[(step > 1 ? 1 : step) * kWarps + warp()] = run_of",
    ),
    _fault(
        "last-step-left-out",
        "(size + kStepPacks - 1) / kStepPacks}",
        "size / kStepPacks + (size < kStepPacks)}",
    ),
    _fault(
        "row-s-end-read-whole", "end * kPack - lead <= size;", "end * kPack - lead <= size + 1;"
    ),
    # Groups: only what must hold wherever the bound is.
    _fault(
        "group-s-last-step-left-out",
        "step < end && step < slice.steps; ++step) {",
        "step < end && step < slice.steps - (step > 0); ++step) {",
        case="hidden-many",
    ),
    _fault(
        "group-s-first-packs-alone",
        "(at & (packs_a_group - 1));",
        "(at & (packs_a_group / 2 - 1));",
    ),
    _fault("groups-of-odd-packs-lost", "group = group < bits ? bits : group;", ""),
    _fault(
        "rounds-of-the-first-warp",
        "if (lane() == 0) atomicMax(&s.rounds,",
        "if (threadIdx.x == 0) atomicMax(&s.rounds,",
    ),
    _fault("group-s-total-lost", "all.high += mass.high;", ""),
    _fault("below-the-bound-counted", "if (bits >= plan.low) atomicAdd", "if (bits > 0) atomicAdd"),
    # The threshold.
    _fault(
        "of-few-the-first",
        "counts = bits.at[j] >= own.bits;",
        "counts = bits.at[j] > own.bits;",
    ),
    _fault(
        "few-and-one-above",
        "copy_few(listed, low, high, s), count, mass,",
        "copy_few(listed, low, high, s), count + 1, mass,",
    ),
    _fault("half-of-few-lost", "if (!counts || at >= kFew)", "if (!counts || at >= kFew / 2)"),
    _fault(
        "first-share-alone",
        "s.group.count[0][own.at] + s.group.count[1][own.at];\n  const",
        "s.group.count[0][own.at];\n  const",
    ),
    _fault("few-in-any-order", "indices.at[j] < index ? one : 0;", "j < index ? one : 0;"),
    _fault(
        "few-without-themselves",
        "indices.at[j] < index ? one : 0;",
        "indices.at[j] <= index ? one : 0;",
    ),
    _fault(
        "few-share-of-the-row", "r.needs_total() ? found.total : s.mark.mass_after", "found.total"
    ),
    _fault("few-min-p-lost", "if (kept < least) kept = least;\n\n", "\n"),
    _fault("few-by-mass-lost", "if (kept < static_cast<unsigned>(s.by_mass))", "if (false)"),
    _fault(
        "survivors-mass-of-the-row",
        "needed = needed_of(r.portion, mass);",
        "needed = needed_of(r.portion, found.total);",
    ),
    _fault(
        "min-p-lost",
        "if (kept < least) kept = least;\n  if (kept < plan.low",
        "if (kept < plan.low",
    ),
    _fault(
        "min-p-above-the-bracket-from-its-sums",
        "if (kept < plan.low || kept > plan.high) {",
        "if (kept < plan.low) {",
    ),
    # The slow way.
    _fault(
        "ties-not-flushed",
        "if (neighbours > 0) add();\n    __syncthreads();",
        "__syncthreads();",
        case="crowded-top_k_first",
    ),
    _fault(
        "highest-limb-lost",
        "limb < kLimbs - 1 ? rest & kLimbMask : rest",
        "limb < kLimbs - 1 ? rest & kLimbMask : 0",
    ),
    _fault(
        "bins-one-too-narrow",
        "32 - __clz(static_cast<int>((high - low - 1) >> kExactBits))",
        "32 - __clz(static_cast<int>((high - low - 1) >> (kExactBits + 1)))",
    ),
    _fault(
        "narrow-by-top-k-alone",
        "kept = select_from(row, by_count.bits, kNoLimit, needed, s).bits;",
        "kept = needed > 0 ? by_count.bits : 0;",
    ),
    # The draw.
    _fault("list-s-mass-left-out", "s.parts[part] += more;", "s.parts[part] += 0;"),
    _fault(
        "dropped-entries-weighed",
        "if (s.list[at].bits >= kept) more",
        "if (s.list[at].bits > 0) more",
    ),
    _fault("token-one-early", "if (one > left) {", "if (one >= left) {"),
    _fault("philox-of-nine-rounds", "round < 10", "round < 9"),
    _fault("target-without-carry", "(middle >> 32) + (other >> 32)", "(middle >> 32)"),
    _fault(
        "lead-forgotten",
        "(own + k) * kPack - row.lead + i",
        "(own + k) * kPack + i",
        case="zero-mass-tokens",
    ),
    # Rows that blocks share.
    _in_kernel(
        "other-blocks-lists-lost",
        "s.runs[lane()] = run_of(first, own.listed);",
        "s.runs[lane()] = run_of(0, own.listed);",
    ),
    _fault(
        "largest-of-one-block",
        "warp_max(static_cast<int>(part.largest))",
        "static_cast<int>(part.largest)",
    ),
    _fault("total-of-one-block", "{warp_sum(part.total), warp", "{part.total, warp"),
    _in_kernel(
        "blocks-parts-a-warp-long",
        "{blocks, packs_a_warp(row.packs, blocks) * kWarps}",
        "{blocks, packs_a_warp(row.packs, blocks)}",
    ),
)
"""Faults of the kernel, run by the `simt` backend."""
