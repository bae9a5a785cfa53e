// SPDX-License-Identifier: Apache-2.0
// GEMV of fp8 weights on the matrix unit.
#include "gemv_matrix.muh"

namespace kh::gemv {
namespace {

template <class T, bool kFp8X = false>
int32_t choose(const Problem& p, int64_t tile, stream_t stream) {
  return short_groups(p, tile) ? choose_tile<Format<T, kFp8, kFp8X, true>>(p, tile, stream)
                               : choose_tile<Format<T, kFp8, kFp8X>>(p, tile, stream);
}

}  // namespace

int32_t run_matrix_fp8(const Problem& p, int64_t tile, stream_t stream) {
  if (p.x_dtype == KH_FLOAT8_E4M3FN) return choose<bf16_t, true>(p, tile, stream);
  return p.x_dtype == KH_FLOAT16 ? choose<half_t>(p, tile, stream)
                                 : choose<bf16_t>(p, tile, stream);
}

}  // namespace kh::gemv
