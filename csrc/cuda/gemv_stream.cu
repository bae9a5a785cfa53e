// SPDX-License-Identifier: Apache-2.0
// Which calls the streaming kernels serve, and how a tile shares them out.
#include "gemv_stream.muh"

namespace kh::gemv {

int32_t run_stream_fp8(const Problem& p, const Cut& cut, stream_t stream);
int32_t run_stream_int4(const Problem& p, const Cut& cut, stream_t stream);
int32_t run_whole(const Problem& p, stream_t stream);
int32_t run_whole_experts(const Problem& p, stream_t stream);
int32_t run_whole_int4(const Problem& p, stream_t stream);

namespace {

// In the order of the tiles: warps along rows and along K, blocks to a cluster, tiles of 16 rows to
// a warp.
constexpr int kShapes[][4] = {{2, 4, 2, 1}, {2, 8, 2, 1}, {4, 1, 1, 1}, {4, 2, 1, 1},
                              {4, 2, 2, 1}, {4, 2, 4, 1}, {4, 4, 2, 1}, {4, 4, 4, 1},
                              {8, 2, 1, 1}, {8, 2, 4, 1}, {4, 2, 1, 2}, {4, 2, 2, 2}};

}  // namespace

int32_t run_stream(const Problem& p, int32_t weight_dtype, int64_t tile, stream_t stream) {
  constexpr int64_t kCount = sizeof(kShapes) / sizeof(kShapes[0]);
  const int64_t index = tile - kStream;
  KH_REQUIRE(index <= kCount, "'tile': there is no %lld", static_cast<long long>(tile));
  const int entry_shift = log2_of(p.weight_scale.rows_an_entry);
  constexpr int64_t kFar = int64_t{1} << 31;  // offsets of scales have 32 bits
  if (p.weight.access_bytes != kVectorBytes || p.x.access_bytes != kVectorBytes ||
      p.x_dtype == KH_FLOAT8_E4M3FN || p.x_dtype == KH_FLOAT32 || p.group_shift < 7 ||
      entry_shift < 0 || p.k == 0 || p.num_experts > kMostExperts || p.slots > kPlaces ||
      p.rows * p.weight_scale.row_stride + p.k / kSliceK * p.weight_scale.group_stride >= kFar ||
      p.columns * ceil_div(p.outputs, kTileRows / 2) >= kFar)
    return kNotServed;
  const bool experts = p.topk_ids.data != nullptr, whole = index == kCount;
  if (weight_dtype == p.x_dtype) {
    if (!whole) return kNotServed;
    return experts ? run_whole_experts(p, stream) : run_whole(p, stream);
  }
  if (whole)
    return experts || weight_dtype == KH_FLOAT8_E4M3FN ? kNotServed : run_whole_int4(p, stream);
  const int(&shape)[4] = kShapes[index];
  Cut cut = {};
  cut.warps_n = shape[0];
  cut.warps_k = shape[1];
  cut.cluster = shape[2];
  cut.tiles = shape[3];
  cut.entry_shift = entry_shift;
  if (weight_dtype == KH_FLOAT8_E4M3FN) return run_stream_fp8(p, cut, stream);
  return run_stream_int4(p, cut, stream);
}

}  // namespace kh::gemv
