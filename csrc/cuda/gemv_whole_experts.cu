// SPDX-License-Identifier: Apache-2.0
#include "gemv_whole.muh"

namespace kh::gemv {
namespace {

template <class T, int kWarps>
int32_t run_units(const Problem& p, const Whole& cut, stream_t stream) {
  return cut.units <= kWarps * kLeastUnits
             ? run_width<T, kWarps, kLeastUnits, kExperts>(p, cut, stream)
             : run_width<T, kWarps, kMostUnits, kExperts>(p, cut, stream);
}

template <class T>
int32_t launch_whole_experts(const Problem& p, stream_t stream) {
  Whole cut = {};
  if (!fill(cut, p) || cut.units > kStepUnits) return kNotServed;
  const int64_t tokens = p.columns / p.slots, most = kPlaces / p.slots;
  for (int64_t first = 0; first < tokens; first += most) {
    const Problem part = part_of(p, first, std::min(most, tokens - first));
    // 8 columns at a time are faster, and few experts have more where each has 4 on average.
    cut.wide = part.columns > 4 * part.num_experts;
    const int32_t status = cut.units <= 2 * kMostUnits   ? run_units<T, 2>(part, cut, stream)
                           : cut.units <= 4 * kMostUnits ? run_units<T, 4>(part, cut, stream)
                           : cut.units <= 8 * kMostUnits
                               ? run_units<T, 8>(part, cut, stream)
                               : run_units<T, kMostWarps>(part, cut, stream);
    if (status != 0) return status;
  }
  return 0;
}

}  // namespace

int32_t run_whole_experts(const Problem& p, stream_t stream) {
  return p.x_dtype == KH_FLOAT16 ? launch_whole_experts<half_t>(p, stream)
                                 : launch_whole_experts<bf16_t>(p, stream);
}

}  // namespace kh::gemv
