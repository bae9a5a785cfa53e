// SPDX-License-Identifier: Apache-2.0
#include "gemv_whole.muh"

namespace kh::gemv {
namespace {

template <class T, int kWarps, Kind kKind>
int32_t run_steps(const Problem& p, const Whole& cut, stream_t stream) {
  const auto steps = ceil_div(cut.units, kStepUnits);  // as even as they can be
  const auto units = ceil_div(cut.units, steps * kWarps);
  if (units <= kLeastUnits) return run_width<T, kWarps, kLeastUnits, kKind>(p, cut, stream);
  if (units < kMostUnits) return run_width<T, kWarps, 7, kKind>(p, cut, stream);
  return run_width<T, kWarps, kMostUnits, kKind>(p, cut, stream);
}

template <class T>
int32_t launch_whole(const Problem& p, stream_t stream) {
  Whole cut = {};
  if (!fill(cut, p)) return kNotServed;
  constexpr int64_t kMost = int64_t{kMaxGridY} * 2 * kColumnTile;  // columns of a launch
  return in_parts(p, kMost, [&](const Problem& part) {
    cut.wide = part.columns > kColumnTile;
    if (cut.units <= 2 * kMostUnits) return run_units<T, 2, kShort>(part, cut, stream);
    if (cut.units <= 4 * kMostUnits) return run_units<T, 4, kShort>(part, cut, stream);
    if (cut.units <= 8 * kMostUnits) return run_steps<T, 8, kShort>(part, cut, stream);
    if (cut.units <= kStepUnits) return run_steps<T, kMostWarps, kShort>(part, cut, stream);
    return run_steps<T, kMostWarps, kLong>(part, cut, stream);
  });
}

}  // namespace

int32_t run_whole(const Problem& p, stream_t stream) {
  return p.x_dtype == KH_FLOAT16 ? launch_whole<half_t>(p, stream)
                                 : launch_whole<bf16_t>(p, stream);
}

}  // namespace kh::gemv
