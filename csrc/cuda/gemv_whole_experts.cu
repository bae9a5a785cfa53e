// SPDX-License-Identifier: Apache-2.0
#include "gemv_whole.muh"

namespace kh::gemv {
namespace {

template <class T>
int32_t launch_whole_experts(const Problem& p, stream_t stream) {
  Whole cut = {};
  if (!fill(cut, p) || cut.units > kStepUnits) return kNotServed;
  return in_parts(p, kPlaces / p.slots, [&](const Problem& part) {
    // 8 columns at a time are faster, and few experts have more where each has 4 on average.
    cut.wide = part.columns > 4 * part.num_experts;
    if (cut.units <= 2 * kMostUnits) return run_units<T, 2, kExperts>(part, cut, stream);
    if (cut.units <= 4 * kMostUnits) return run_units<T, 4, kExperts>(part, cut, stream);
    if (cut.units <= 8 * kMostUnits) return run_units<T, 8, kExperts>(part, cut, stream);
    return run_units<T, kMostWarps, kExperts>(part, cut, stream);
  });
}

}  // namespace

int32_t run_whole_experts(const Problem& p, stream_t stream) {
  return p.x_dtype == KH_FLOAT16 ? launch_whole_experts<half_t>(p, stream)
                                 : launch_whole_experts<bf16_t>(p, stream);
}

}  // namespace kh::gemv
