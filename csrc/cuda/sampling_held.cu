// SPDX-License-Identifier: Apache-2.0
#include "sampling_held.muh"

namespace kh::sampling {

// Rows of fp32 that vectors can be read of and that fit; the others are not served.
int32_t run_held(const Arguments& a, int32_t dtype, int64_t blocks, stream_t stream) {
  constexpr int kPack = Row<float>::kPack;
  KH_REQUIRE(blocks <= kMostHeldBlocks && (blocks & (blocks - 1)) == 0,
             "cluster_blocks must be a power of two of at most %d", kMostHeldBlocks);
  if (dtype != KH_FLOAT32 || a.column_stride != 1 || a.vocab_size % kPack != 0 ||
      !aligned(a.probs, kVectorBytes) || (a.num_rows > 1 && a.row_stride % kPack != 0))
    return kNotHeld;
  const int count = static_cast<int>(blocks);
  const int64_t vectors = ceil_div(a.vocab_size / kPack, kThreads * blocks);
  if (vectors <= 1) return run_held<1>(a, count, stream);
  if (vectors <= 2) return run_held<2>(a, count, stream);
  if (vectors <= 4) return run_held<4>(a, count, stream);
  const bool one_k = a.top_k.data == nullptr && a.vocab_size <= kHeldLimit;
  const bool off = a.top_k_value <= 0 || a.top_k_value >= a.vocab_size;
  if (one_k && !off && static_cast<uint64_t>(a.top_k_value) <= kMostHeldK)
    return run_held<8, Way::kList>(a, count, stream);
  if (vectors <= 8) return run_held<8>(a, count, stream);
  return one_k && off ? run_held<kSumVectors, Way::kSum>(a, count, stream) : kNotHeld;
}

}  // namespace kh::sampling
