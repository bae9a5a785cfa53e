// SPDX-License-Identifier: Apache-2.0
// top_k_top_p_sampling_from_probs: one token a sample, to the bit as docs/sampling.md defines it.
#include "sampling.muh"

namespace kh::sampling {
namespace {

// ---- kernels --------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads, 2) sample_kernel(Arguments a) {
  KH_DYNAMIC_SHARED(Shared, shared);
  Shared& s = *shared;
  const int64_t sample = blockIdx.x;
  await_last();
  Rules r;
  const int64_t number = row_of(a, sample, &r);
  if (number < 0) {
    if (threadIdx.x == 0) answer(a, sample, 0, false);
    return;
  }
  draw_by_one(a, sample, Row<T>(a, number), r, s);
}

// The same by several blocks a row: first the reading, then the rest.

template <class T>
__global__ void __launch_bounds__(kThreads, 2) stream_kernel(Arguments a, int blocks, Part* parts) {
  KH_DYNAMIC_SHARED(Shared, shared);
  Shared& s = *shared;
  const int64_t sample = blockIdx.x / blocks;
  await_last();
  Rules r;
  const int64_t number = row_of(a, sample, &r);
  if (number < 0) return;
  const Row<T> row(a, number);
  const Slice slice = slice_of(row, static_cast<int>(blockIdx.x % blocks), blocks);
  const typename Row<T>::Step values = read_step(row, slice, 0);
  const Plan plan = read(row, slice, r, blocks, values, s);
  Part& part = parts[blockIdx.x];
  if (threadIdx.x == 0) {
    part.plan = plan;
    part.found = s.found;
  }
  const unsigned listed = s.listed < kCapacity ? s.listed : kCapacity;
  for (unsigned i = threadIdx.x; i < listed; i += kThreads) part.list[i] = s.list[i];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    draw_kernel(Arguments a, int blocks, const Part* all_parts) {
  KH_DYNAMIC_SHARED(Shared, shared);
  Shared& s = *shared;
  const int64_t sample = blockIdx.x;
  // Before the reading kernel has ended: it waited for all that wrote what is read here.
  Rules r;
  const int64_t number = row_of(a, sample, &r);
  if (number >= 0 && threadIdx.x == kThreads - 1) s.random = random_of(a, sample);
  await_last();
  if (number < 0) {
    if (threadIdx.x == 0) answer(a, sample, 0, false);
    return;
  }
  const Row<T> row(a, number);
  const Part* parts = all_parts + sample * blocks;
  Plan plan = parts[0].plan;
  if (in_first_warp()) {
    // Each block's list reaches down to a bound of its own; the whole list to the greatest.
    const int low = warp_max(static_cast<int>(lane() < blocks ? parts[lane()].plan.low : 0));
    const Found own = lane() < blocks ? parts[lane()].found : Found{};
    const unsigned first = warp_sum_through(own.listed) - own.listed;
    const Found found = sum_of(own);
    if (warp() == 0) {
      s.parts[lane()] = own.above;
      s.runs[lane()] = run_of(first, own.listed);
      if (lane() == 0) {
        s.found = found;
        s.low = static_cast<unsigned>(low);
        s.rounds = 1;
      }
    }
  }
  __syncthreads();
  plan.low = s.low;
  for (int part = warp(); s.found.listed <= kCapacity && part < blocks; part += kWarps) {
    const unsigned first = s.runs[part] >> kRunBits, listed = s.runs[part] % (1u << kRunBits);
    for (unsigned i = lane(); i < listed; i += kLanes) s.list[first + i] = parts[part].list[i];
  }
  __syncthreads();
  finish(a, sample, row, r, plan, {blocks, packs_a_warp(row.packs, blocks) * kWarps}, s);
}

// ---- launcher -------------------------------------------------------------------------------

constexpr int kSharedBytes = sizeof(Shared);
static_assert(kSharedBytes <= 48 << 10, "what every platform has");

template <class T>
int run(const Arguments& a, int64_t blocks_a_row, Part* parts, stream_t stream) {
  const dim3 samples(static_cast<unsigned>(a.batch_size)), threads(kThreads);
  if (blocks_a_row == 1)
    return launch_early(sample_kernel<T>, samples, threads, kSharedBytes, stream, a);
  const dim3 all(static_cast<unsigned>(a.batch_size * blocks_a_row));
  const int blocks = static_cast<int>(blocks_a_row);
  const int status =
      launch_early(stream_kernel<T>, all, threads, kSharedBytes, stream, a, blocks, parts);
  if (status != 0) return status;
  return launch_early(draw_kernel<T>, samples, threads, kSharedBytes, stream, a, blocks, parts);
}

// One number for each row or sample.
bool vector_of(const kh_tensor& t, int64_t size) {
  return well_formed(t) && t.ndim == 1 && t.shape[0] == size;
}
bool integers_of(const kh_tensor& t, int64_t size) {
  return !present(t) || (vector_of(t, size) && (t.dtype == KH_INT32 || t.dtype == KH_INT64));
}
bool shares_of(const kh_tensor& t, int64_t size) {
  return !present(t) || (vector_of(t, size) && t.dtype == KH_FLOAT32);
}
bool random_words_of(const kh_tensor& t, int64_t size) {
  return !present(t) || ((vector_of(t, size) || vector_of(t, 1)) && t.dtype == KH_INT64);
}

Numbers numbers_of(const kh_tensor& t) {
  if (!present(t)) return {nullptr, 0, false};
  return {t.data, t.shape[0] == 1 ? 0 : t.stride[0], t.dtype == KH_INT64};
}

int32_t sampling_launch(const kh_top_k_top_p_sampling_from_probs_args& a, stream_t stream) {
  KH_REQUIRE(present(a.probs) && well_formed(a.probs) && a.probs.ndim == 2, "probs must be [R, V]");
  KH_REQUIRE(present(a.tokens) && a.tokens.ndim == 1 && a.tokens.dtype == KH_INT32 &&
                 well_formed(a.tokens),
             "tokens must be int32 [B]");
  const int64_t num_rows = a.probs.shape[0], vocab_size = a.probs.shape[1];
  const int64_t batch_size = a.tokens.shape[0];
  KH_REQUIRE(!present(a.valid) || (a.valid.dtype == KH_BOOL && vector_of(a.valid, batch_size)),
             "valid must be bool [B]");
  KH_REQUIRE(integers_of(a.indices, batch_size) && (present(a.indices) || batch_size == num_rows),
             "indices must be int32 or int64 [B], and are needed where B is not R");
  KH_REQUIRE(integers_of(a.top_k, num_rows) && shares_of(a.top_p, num_rows) &&
                 shares_of(a.min_p, num_rows),
             "top_k must be int32 or int64 [R], top_p and min_p fp32 [R]");
  KH_REQUIRE(random_words_of(a.seed, batch_size) && random_words_of(a.offset, batch_size),
             "seed and offset must be int64 [B] or [1]");
  if (batch_size == 0) return 0;
  KH_REQUIRE(vocab_size > 0 && vocab_size < kVocabLimit, "V must lie in [1, 2^19)");
  KH_REQUIRE(batch_size <= kMaxGridX / kMaxBlocks, "more samples than a grid has blocks");
  KH_REQUIRE(a.blocks_a_row >= 1 && a.blocks_a_row <= kMaxBlocks,
             "blocks_a_row must lie in [1, %d]", kMaxBlocks);
  KH_REQUIRE(a.blocks_a_row == 1 ||
                 (present(a.workspace) && a.workspace.dtype == KH_UINT8 && a.workspace.ndim == 1 &&
                  well_formed(a.workspace) && a.workspace.stride[0] == 1 &&
                  aligned(a.workspace.data, alignof(Part)) &&
                  a.workspace.shape[0] / (batch_size * a.blocks_a_row) >=
                      static_cast<int64_t>(sizeof(Part))),
             "workspace must have %d bytes a block", static_cast<int>(sizeof(Part)));

  Arguments args = {};
  args.probs = a.probs.data;
  args.row_stride = a.probs.stride[0];
  args.column_stride = a.probs.stride[1];
  args.num_rows = num_rows;
  args.batch_size = batch_size;
  args.vocab_size = static_cast<int>(vocab_size);
  args.joint = a.joint != 0;
  args.one_stream = present(a.seed) && a.seed.shape[0] == batch_size;
  args.top_k = numbers_of(a.top_k);
  args.top_p = numbers_of(a.top_p);
  args.min_p = numbers_of(a.min_p);
  args.top_k_value = a.top_k_value;
  args.top_p_value = static_cast<float>(a.top_p_value);
  args.min_p_value = static_cast<float>(a.min_p_value);
  args.indices = numbers_of(a.indices);
  args.seed = numbers_of(a.seed);
  args.offset = numbers_of(a.offset);
  args.seed_value = a.seed_value;
  args.offset_value = a.offset_value;
  args.tokens = static_cast<int32_t*>(a.tokens.data);
  args.token_stride = a.tokens.stride[0];
  args.valid = present(a.valid) ? static_cast<uint8_t*>(a.valid.data) : nullptr;
  args.valid_stride = present(a.valid) ? a.valid.stride[0] : 0;
  Part* parts = static_cast<Part*>(a.workspace.data);
  KH_REQUIRE(a.cluster_blocks >= 0, "cluster_blocks must not be negative");
  if constexpr (kStreams) {
    if (a.cluster_blocks > 0) {
      const int32_t status = run_held(args, a.probs.dtype, a.cluster_blocks, stream);
      if (status != kNotHeld) return status;
    }
  }
  return for_float_type(a.probs.dtype, "probs", [&](auto type) {
    using T = typename decltype(type)::type;
    return launched(run<T>(args, a.blocks_a_row, parts, stream));
  });
}

}  // namespace
}  // namespace kh::sampling

KH_EXPORT int32_t kh_top_k_top_p_sampling_from_probs(
    const kh_top_k_top_p_sampling_from_probs_args* args, void* stream) {
  kh::DeviceGuard guard(static_cast<int>(args->device));
  if (guard.status() != 0) return kh::launched(guard.status());
  return kh::sampling::sampling_launch(*args, static_cast<kh::stream_t>(stream));
}
