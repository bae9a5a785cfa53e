"""Every fault planted in kernels is caught by the ops' cases, on a CUDA device.

`python -m tests.vendor.cuda_mutants [NAMES]` compiles the library once and each fault's source
anew, takes some minutes and exits with 1 where a fault was not caught. The faults are those of
CUDA's own kernels below, and of the portable kernels of `PORTABLE` those that the emulator's tests
know too. NAMES are of faults, of ops or of files of CUDA's own kernels.
"""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore

import attrs
import torch

import kernelhub
from kernelhub import quantize, registry
from kernelhub.backend import Backend
from kernelhub.backends.cuda import _kernels
from kernelhub.backends.native import tiles
from kernelhub.backends.native import top_k_top_p_sampling_from_probs as sampling
from kernelhub.backends.native.kernels import Kernels
from kernelhub.backends.native.library import Library
from kernelhub.backends.native.platform import CUDA, csrc
from kernelhub.testing import run_case
from tests.mutants import Mutant
from tests.operands import operands

ARCH = "sm_90a"
_STREAM, _WHOLE = "cuda/gemv_stream.muh", "cuda/gemv_whole.muh"
_WHOLE_INT4, _HELD = "cuda/gemv_whole_int4.muh", "cuda/sampling_held.muh"
_GEMV = ("fused_gemv", "fused_moe_gemv")
TILES = {_STREAM: "s4x2c2", _WHOLE: "whole", _WHOLE_INT4: "whole"}
_SAMPLING = "top_k_top_p_sampling_from_probs"
PORTABLE = ("fused_mul_add", "rotary_embedding", _SAMPLING)


def _stream(name: str, old: str, new: str, scheme: str = "fp8") -> Mutant:
    return Mutant(name, _STREAM, old, new, ARCH, f"gemv_stream_{scheme}.cu")


def _whole(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, _WHOLE, old, new, ARCH, "gemv_whole.cu")


def _whole_experts(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, _WHOLE, old, new, ARCH, "gemv_whole_experts.cu")


def _held(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, _HELD, old, new, ARCH, "sampling_held.cu")


def _whole_int4(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, _WHOLE_INT4, old, new, ARCH, "gemv_whole_int4.cu")


MUTANTS = (
    _held(
        "last-vector-lost",
        "lane();\n      values_[j] = pack < row.packs",
        "lane();\n      values_[j] = pack < row.packs - 1",
    ),
    _held(
        "short-list-believed",
        "const int count = sort_listed(own, low, top, blocks, s), "
        "top_k = static_cast<int>(r.top_k);\n"
        "  // Fewer than top-k may have mass at all.\n"
        "  if (count < top_k && low > kLeast) return kAlone;",
        "const int count = sort_listed(own, low, top, blocks, s), "
        "top_k = static_cast<int>(r.top_k);",
    ),
    _held("longer-list-believed", "own.listed > room_of(blocks) || (own.odd", "(own.odd"),
    _held("overfull-believed", " || (own.odd & kOverfull)", ""),
    _held(
        "one-more-than-top-k",
        "s.listed[(top_k < count ? top_k : count) - 1].bits",
        "s.listed[top_k < count ? top_k : count - 1].bits",
    ),
    _held("share-of-all-listed", "s.listed[i].bits >= from ? mass_at", "true ? mass_at"),
    _held(
        "reached-one-late",
        "s.least = s.listed[i].bits;\n    return;",
        "s.least = s.listed[i + 1].bits;\n    return;",
    ),
    _held(
        "held-min-p-dropped",
        "__fmul_rn(r.min_p, __uint_as_float(s.listed[0].bits))",
        "__fmul_rn(0.f, __uint_as_float(s.listed[0].bits))",
    ),
    _held(
        "few-one-more-than-top-k",
        "sorted.bits[(top_k < count ? top_k : count) - 1]",
        "sorted.bits[top_k < count ? top_k : count - 1]",
    ),
    _held(
        "few-of-one-list", "if (__shfl_sync(~0u, through, list + by - 1) <= number)", "if (false)"
    ),
    _held("few-share-of-all", "thread * 2 < count && bits.at[0] >= from", "thread * 2 < count"),
    _held("few-second-never-reached", "before + first >= limit ? 0 : 1", "0"),
    _held(
        "few-min-p-dropped",
        "__fmul_rn(r.min_p, __uint_as_float(sorted.bits[0]))",
        "__fmul_rn(0.f, __uint_as_float(sorted.bits[0]))",
    ),
    _held("few-unsorted-in-a-bin", "end - first > 1 && i < end", "false"),
    _held("few-order-by-value", "before += indices.at[j] < index", "before += i + j < own_at"),
    _held("later-steps-not-read", "v = step_ + 1 < steps_ && next", "v = false && next"),
    _held("place-of-the-first-vector", "pack + j * stride, most >= low", "pack, most >= low"),
    _held("late-kept-lost", "late[k] = at < kept ?", "late[k] = false ?"),
    _held("places-not-cleared", "s_.place_low[threadIdx.x] = s_.place_high[threadIdx.x] = 0;", ""),
    _held("top-of-the-first-step", "atomicMax(&s_.top, largest + 1);", ""),
    _held("total-of-the-last-step", "if (r.needs_total()) total += joined", "total = joined"),
    _held(
        "places-high-half-lost",
        "(static_cast<uint64_t>(s.place_high[thread]) << kPlaceBits) + s.place_low[thread]",
        "s.place_low[thread]",
    ),
    _held("place-order-by-list", "s.binned[j].index < entry.index", "j < i"),
    _held("held-nan-accepted", "if (bits << 1 >= kInfinity << 1) atomicOr(&s_.odd, kOdd);", ""),
    _held("negative-elements-kept", "v.at[i] = 0.f;", ";"),
    _held(
        "above-one-bracketed",
        "next = odd == kBeyond ? kAlone : kAnswered;",
        "next = kAnswered;",
    ),
    _held("bracket-too-low-believed", "if (above >= needed) return kAlone;", ""),
    _held(
        "chunks-lost",
        "* 8, joined(sum, count), arrived_);",
        "* 8, 0, arrived_);",
    ),
    _held("listed-not-in-chunks", "&s.chunks[entry.index / size]", "&s.chunks[0]"),
    _held("bracketed-least-lost", "least = s.least == 0 ? low : s.least;", "least = low;"),
    _held(
        "bracketed-min-p-dropped",
        "s.least;\n    if (least < by_min_p) least = by_min_p;",
        "s.least;",
    ),
    _held("summed-place-of-the-first-vector", "pack + j * stride, lists", "pack, lists"),
    _held("steps-of-the-first-block", "if (rank_ > 0) read(row, 0, rank_);", ""),
    _held("another-s-first-step", "if (rank_ > 0 || apart", "if (apart"),
    _held("above-high-lost", "above[j].high += mass.high - kHighZero;", ""),
    _held("above-in-one-part", "s_.part_sums[rank_][j * kWarps", "s_.part_sums[rank_][0 * kWarps"),
    _held("summed-total-of-the-last-step", "total += joined(all, kV", "total = joined(all, kV"),
    _held("summed-above-one", "if (odd != 0) return kAlone;", ""),
    _held("parts-of-the-first-block", "s.part_sums[block][first", "s.part_sums[0][first"),
    _held("min-p-above-the-list", "if (by_min_p > top) return kAlone;", ""),
    _held("not-back-to-the-part", "left += s.chunks[chunk - 1];", ";"),
    _held("half-a-part-searched", "search<kWarps, 2>", "search<kWarps, 1>"),
    _held("lanes-low-bits-alone", "(static_cast<uint64_t>(high) << (2 * kBits))", "0"),
    _held("values-out-of-order", "rank += other > entry.bits ||", "rank += other < entry.bits ||"),
    _whole(
        "up-from-gate",
        "(halves ? p_.outputs + low : high) * stride",
        "(halves ? low : high) * stride",
    ),
    _whole(
        "columns-of-the-first-group",
        "split_place(place).token : place;",
        "split_place(place).token : column;",
    ),
    _whole(
        "outputs-of-the-first-group",
        "const Place at = split_place(place);",
        "const Place at = split_place(column);",
    ),
    _whole("second-tile-as-the-first", "        item = item_at(next);\n", ""),
    _whole("sums-not-cleared-first", "sums[0][n][e] = sums[1][n][e] = 0.f", "sums[0][n][e] = 0.f"),
    _whole("odd-halves-lost", "sums[0][n][e] + sums[1][n][e]", "sums[0][n][e]"),
    _whole(
        "last-warp-lost", "for (int w = 1; w < kWarps; ++w)", "for (int w = 1; w < kWarps - 1; ++w)"
    ),
    _whole("sums-not-awaited", "    put(sums);\n    __syncthreads();", "    put(sums);"),
    _whole("whole-bias-dropped", "v + entry(p_.bias, row * p_.bias.row_stride)", "v"),
    _whole("rows-past-the-last-written", "if (row >= p_.outputs) continue;", ""),
    _whole(
        "whole-swiglu-of-gate",
        "sum_of(column, of + kTileRows / 2,",
        "sum_of(column, of,",
    ),
    _whole("columns-of-the-step-before", "set_out(next, true)", "set_out(next, false)"),
    _whole("steps-not-counted-anew", "step_unit_ = last ? 0 : step", "step_unit_ = step"),
    _whole("long-sums-not-cleared", "        clear(first);\n        clear(second);\n", ""),
    _whole("both-sums-of-a-pair-in-one", "multiply(second)", "multiply(first)"),
    _whole("one-tile-as-a-pair", "other = {item.tile + 1, 0}", "other = {item.tile, 0}"),
    _whole_experts(
        "first-expert-always",
        "s_.groups.group[item.group].expert * p_.weight",
        "s_.groups.group[0].expert * p_.weight",
    ),
    _whole_experts("columns-of-the-group-before", "if (kKept && others)", "if (false)"),
    _whole_experts("wide-columns-of-the-group-before", "if (!kKept && others)", "if (false)"),
    _whole_experts("router-weight-dropped", "return s_.groups.weight[place];", "return 1.f;"),
    _whole_experts("last-items-lost", "next + share + (blockIdx.x < more)", "next + share"),
    _whole_experts("tokens-read-the-first-row", "? split_place(place).token", "? 0"),
    _whole_experts("results-to-the-first-slot", "{at / slots, at % slots}", "{at / slots, 0}"),
    _whole_experts("tiles-of-the-first-group", "index - group * cut_.tiles, group", "index, group"),
    _whole_int4("int4-up-from-gate", "return h * p_.outputs + min(", "return min("),
    _whole_int4("int4-sums-not-awaited", "      team_sync();\n      finish", "      finish"),
    _whole_int4(
        "int4-last-warp-lost", "w < cut_.team_warps; ++w) v", "w < cut_.team_warps - 1; ++w) v"
    ),
    _whole_int4("int4-scales-of-the-first-half", "scale_[w][h], lane", "scale_[0][h], lane"),
    _whole_int4("int4-first-unit-always", "fetch(ahead, slot_)", "fetch(0, slot_)"),
    _whole_int4(
        "int4-zero-of-the-other-rows",
        "decode(i == 0 ? high.x : i == 1 ? high.y : i == 2 ? high.z : high.w, zero[1], b)",
        "decode(i == 0 ? high.x : i == 1 ? high.y : i == 2 ? high.z : high.w, zero[0], b)",
    ),
    _whole_int4(
        "int4-columns-of-the-first-group",
        "p_.x.data + first_column_ * p_.x",
        "p_.x.data + 0 * p_.x",
    ),
    _whole_int4(
        "int4-outputs-of-the-first-group",
        "int64_t{first_column_ + column} * p_.out",
        "int64_t{column} * p_.out",
    ),
    _whole_int4("int4-next-columns-as-the-first", "operand_ + n * next_columns_", "operand_"),
    _whole_int4("int4-rows-past-the-last-written", "if (row >= p_.outputs) continue;", ""),
    _whole_int4("int4-bias-dropped", "v += entry(p_.bias", "v += 0 * entry(p_.bias"),
    _stream(
        "first-source-alone", "for (int s = 1; s < sources; ++s)", "for (int s = 1; s < 1; ++s)"
    ),
    _stream("last-source-dropped", "s < sources; ++s)", "s < sources - 1; ++s)"),
    _stream("bias-of-gate-for-up", "(row + half * int64_t{p_.outputs})", "(row)"),
    _stream("bias-dropped", "v += entry(p_.bias, ", "v += 0 * entry(p_.bias, "),
    _stream("weight-by-column", "groups_->weight[place]", "groups_->weight[column]"),
    _stream("rows-of-rank-0", "first_of(finishing_) + rank_ * own", "first_of(finishing_)"),
    _stream("gate-and-up-swapped", "silu(v) * up", "silu(up) * v"),
    _stream("first-columns-stay", "(staged < 0 || !one_column())", "(staged < 0)"),
    _stream(
        "one-column-always",
        "groups_ != nullptr && p_.x_rows_a_token == 1 && p_.columns == p_.slots",
        "groups_ != nullptr",
    ),
    _stream(
        "sums-not-cleared",
        "if (at_step_ == 0) clear();",
        "if (at_step_ == 0 && sent_ == 0) clear();",
    ),
    _stream("list-of-the-first-group", "first = group * kRoom", "first = 0"),
    _stream("crowded-expert-as-one-group", "size > kRoom || size > width", "false"),
    _stream("elsewhere-not-cleared", "if (g.id[place] >= 0) continue;", "continue;"),
    _stream(
        "later-tokens-read-the-first-rows",
        "p.x.data + first * p.x_rows_a_token * p.x.row_stride",
        "p.x.data",
    ),
    _stream(
        "rank-0-columns",
        "p_.x.data + int64_t{rank_ * cut_.block_units} * F::kUnitK * 2",
        "p_.x.data",
    ),
    _stream("first-codes-twice", "fp8_pair(T{}, second >> 16)", "fp8_pair(T{}, second)"),
    _stream("odd-columns-not-swapped", "columns ^ kVectorBytes", "columns + kVectorBytes"),
    _stream("odd-places-not-swapped", "to + (vector ^ swap)", "to + vector"),
    _stream(
        "scale-of-first-group",
        "slice * kSliceK >> p_.group_shift;\n          const uint32_t at = group",
        "0;\n          const uint32_t at = group",
    ),
    _stream("zero-7", "zero_[t][h][s] = 8;", "zero_[t][h][s] = 7;", "int4"),
    _stream(
        "zero-of-first-group",
        "group * p_.weight_zero.group_stride",
        "0 * p_.weight_zero.group_stride",
        "int4",
    ),
    _stream("expert-0", "expert * p_.weight.expert_stride", "0 * p_.weight.expert_stride", "int4"),
    _stream(
        "second-words-scale",
        "scale_[0][1][F::kScales - 1] = v.w",
        "scale_[0][1][F::kScales - 1] = v.z",
        "int4",
    ),
)


def portable(op: str) -> list[Mutant]:
    """The emulator's faults of an op's kernel."""
    known = importlib.import_module(f"tests.mutants.{op}").KERNEL_MUTANTS
    return [attrs.evolve(mutant, only=f"{op}.mu") for mutant in known]


def _with_fault(mutant: Mutant, folder: Path) -> Path:
    """A copy of `csrc` that has it."""
    copy = folder / "csrc"
    shutil.copytree(csrc(), copy)
    path = copy / mutant.module
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.name}: found {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new))
    return copy


def _compile(base: Path, folder: Path, source: Path) -> Path:
    """The object of one source of a copy of `csrc`."""
    compiler = CUDA.find_compiler()
    includes = [f"-I{base / path.relative_to(csrc())}" for path in CUDA.includes()]
    flags = CUDA.compile_flags(compiler, ARCH)
    made = folder / f"{source.stem}.o"
    at = base / source.relative_to(csrc())
    subprocess.run([compiler.path, *flags, *includes, "-c", at, "-o", made], check=True)
    return made


def _link(objects: Iterable[Path], folder: Path) -> Path:
    library = folder / "library.so"
    compiler = CUDA.find_compiler()
    subprocess.run([compiler.path, *objects, "-shared", "-o", library], check=True)
    return library


def _sound_objects(root: Path, pool: ThreadPoolExecutor) -> dict[str, Path]:
    sources = CUDA.sources()
    made = pool.map(lambda source: _compile(csrc(), root, source), sources)
    return {source.name: object for source, object in zip(sources, made, strict=True)}


def _library_of(mutant: Mutant, root: Path, sound: dict[str, Path]) -> Path:
    folder = root / mutant.name
    (source,) = (source for source in CUDA.sources() if source.name == mutant.only)
    own = _compile(_with_fault(mutant, folder), folder, source)
    return _link({**sound, mutant.only: own}.values(), folder)


def failing_case(library: Path, of: str) -> str:
    """The first case that a library fails, of an op or a file of CUDA's own; "" where none."""
    ops = (of,) if of in PORTABLE else (_SAMPLING,) if of == _HELD else _GEMV
    kernels = Kernels(CUDA, "cuda", lambda device: ARCH, _kernels.stream_of)
    kernels._libraries[ARCH] = Library(library, "cuda")
    made = kernels.implementations(ops)
    registry.add_backend(Backend("mutant", made, device_types=("cuda",), automatic=False))
    if of == _HELD:
        return _failing_cases(_SAMPLING) or _failing_rows()
    sampling.cluster_blocks = lambda *args: 0
    return _failing_cases(of) if of in PORTABLE else _failing_own(TILES[of])


def _failing_cases(op: str) -> str:
    for case in sorted(registry.spec(op).cases(), key=lambda case: case.kind == "typical"):
        outcome = run_case(op, case, "mutant", "cuda")
        if outcome.status == "failed":
            return f"{op} {case.name}: {outcome.message}"
    return ""


def _failing_rows() -> str:
    """Rows held, or read in steps, by one block and by several."""
    made = torch.Generator(device="cuda").manual_seed(0)
    op, chosen = kernelhub.ops.top_k_top_p_sampling_from_probs, sampling.cluster_blocks
    try:
        for blocks, vocab_size in (
            (1, 250_000),
            (2, 130_004),
            (2, 60_016),
            (4, 60_016),
            (16, 60_064),
        ):
            sampling.cluster_blocks = lambda *args, blocks=blocks: blocks
            normal = torch.randn(6, vocab_size, generator=made, device="cuda")
            ranks = torch.arange(1, vocab_size + 1, device="cuda").log()
            logits = (normal, 8 * normal, 0.3 * normal - 1.2 * ranks, normal.round())
            rows = [values.softmax(-1) for values in logits]
            odd = 500 * rows[0]
            odd[0, 5], odd[1, 700], odd[2, -1] = torch.nan, -1, torch.inf
            for probs, top_k, order in itertools.product(
                (*rows, odd, vocab_size * rows[0]), (0, 3, 50, 700, 1024), ("top_k_first", "joint")
            ):
                for seed, (top_p, min_p) in enumerate(((1.0, 0.0), (0.9, 0.0), (0.7, 0.05))):
                    call = {"min_p": min_p, "filter_apply_order": order, "seed": seed}
                    call["return_valid"] = True
                    got = op.on("mutant")(probs, top_k, top_p, **call)
                    exact = op.on("reference")(probs, top_k, top_p, **call)
                    if not all(map(torch.equal, got, exact)):
                        return f"{blocks} blocks, top_k {top_k}, top_p {top_p}, {order}"
    finally:
        sampling.cluster_blocks = chosen
    return ""


def _failing_own(tile: str) -> str:
    sizes = ("n512 k512", "n512 k1024", "n65536 k512", "n1024 k4096")
    classes = [f"{scheme} {size}" for scheme in ("dense", "fp8", "int4") for size in sizes]
    classes += ["dense n512 k8192", "dense n8192 k16384", "dense n16384 k16384"]
    table = {name: tile for name in classes if tiles.fits(name, tile)}
    with tiles.override(dict.fromkeys(_GEMV, table)):
        for op in _GEMV:
            for case in registry.spec(op).cases():
                if case.name.startswith("whole-slices-"):
                    outcome = run_case(op, case, "mutant", "cuda")
                    if outcome.status != "passed":
                        return f"{op} {case.name}: {outcome.message}"
        return _own_shapes() or _many_items("dense") or _many_items("fp8")


def _own_shapes() -> str:
    """Rows long enough for all warps, of a number that fills no tile; many tiles to a block; rows
    in steps, by pairs of tiles, one or more to a block, and one by one."""
    made = torch.Generator(device="cuda").manual_seed(0)
    long = (4100, 9344), (8440, 9344), (9000, 9344)
    for rows, k in ((520, 4096), (520, 2048), (1 << 16, 512), *long):
        weight = torch.randn(rows, k, generator=made, device="cuda") * k**-0.5
        x = torch.randn(3, k, generator=made, device="cuda").bfloat16()
        for scheme in ("dense", "fp8", "int4"):
            made_of = operands(scheme, weight)
            room = torch.full((4, rows), 7.0, dtype=torch.bfloat16, device="cuda")
            kernelhub.ops.fused_gemv.on("mutant")(x, **made_of, out=room[:3])
            exact = kernelhub.ops.fused_gemv.on("reference")(x, **made_of)
            near = torch.allclose(room[:3].float(), exact.float(), atol=0.1)
            if not near or bool((room[3] != 7).any()):
                return f"{rows} rows of {k}, {scheme}"
            for _ in range(50):  # what is read before it is there is there most of the time
                again = kernelhub.ops.fused_gemv.on("mutant")(x, **made_of)
                if not torch.equal(again, room[:3]):
                    return f"{rows} rows of {k}, {scheme}, again"
    return ""


def _many_items(scheme: str) -> str:
    """What differs where a block works through several items, which cases are too small for."""
    made = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made, device="cuda").bfloat16()

    def far(result: torch.Tensor, exact: torch.Tensor) -> bool:
        return not bool(((result.float() - exact).abs() < exact.std() / 16).all())

    def weights(*shape: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A weight `[..., N, K]` as an op takes it, and its values."""
        made_of = operands(scheme, normal(*shape))
        if scheme == "dense":
            return made_of, made_of["weight"].float()
        return made_of, quantize.dequantize_fp8(made_of["weight"], made_of["weight_scale"])

    made_of, values = weights(1 << 16, 512)
    x = normal(33, 512)
    result = kernelhub.ops.fused_gemv.on("mutant")(x, **made_of)
    if far(result, x.float() @ values.T):
        return f"a weight of many rows, 33 rows of x, {scheme}"
    (experts, values), x = weights(300, 512, 512), normal(40, 8, 512)
    first = {name: t[:5] for name, t in experts.items()}
    ids = torch.stack([torch.randperm(300, generator=made, device="cuda")[:8] for _ in range(40)])
    few = torch.arange(80, device="cuda").view(40, 2) % 5
    for tokens, chosen in ((1, ids[:1]), (40, ids), (16, few[:16] % 2), (40, few)):
        columns = x[:tokens, : chosen.shape[1]]
        op, ids_of = kernelhub.ops.fused_moe_gemv.on("mutant"), few[:tokens]
        result = op(columns, topk_ids=chosen, **experts)
        exact = torch.einsum("tsk,tsnk->tsn", columns.float(), values[chosen])
        shared = op(columns[:, 0], topk_ids=ids_of, **first)
        of_one = torch.einsum("tk,tsnk->tsn", columns[:, 0].float(), values[ids_of])
        if far(result, exact) or far(shared, of_one):
            return f"many items, {tokens} tokens, {scheme}"
    return ""


def judged(library: Path, of: str) -> str:
    """The same of a child process, which a fault may crash or keep from ending."""
    command = [sys.executable, "-m", "tests.vendor.cuda_mutants", "--run", str(library), of]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    except subprocess.TimeoutExpired:
        return "did not end"
    said = run.stdout.strip() or (run.stderr.strip().splitlines() or ["died"])[-1]
    return said if run.returncode else ""


def main(*names: str) -> int:
    if names[:1] == ("--run",):
        found = failing_case(Path(names[1]), names[2])
        print(found)
        return 1 if found else 0
    faults = [(mutant.module, mutant) for mutant in MUTANTS]
    faults += [(op, mutant) for op in PORTABLE for mutant in portable(op)]
    faults = [f for f in faults if not names or f[0] in names or f[1].name in names]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        root, at_once = Path(temporary), Semaphore(8)
        sound = _sound_objects(root, pool)

        def judge(library: Path, of: str) -> str:
            with at_once:
                return judged(library, of)

        whole = _link(sound.values(), root)
        kinds = sorted({of for of, _ in faults})
        said = [why for why in pool.map(lambda of: judge(whole, of), kinds) if why]
        for why in said:
            print(f"without a fault: {why}", flush=True)

        def run(fault: tuple[str, Mutant]) -> str:
            of, mutant = fault
            why = judge(_library_of(mutant, root, sound), of)
            print(f"{of} {mutant.name}: {why[:150] or 'NOT CAUGHT'}", flush=True)
            return why

        caught = sum(map(bool, pool.map(run, faults)))
    print(f"{caught} of {len(faults)} caught")
    return 1 if said or caught < len(faults) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
