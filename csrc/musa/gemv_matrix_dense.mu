// SPDX-License-Identifier: Apache-2.0
// GEMV of dense weights on the matrix unit.
#include "gemv_matrix.muh"

namespace kh::gemv {

int32_t run_matrix_dense(const Problem& p, int64_t tile, stream_t stream) {
  return p.x_dtype == KH_FLOAT16 ? choose_tile<Format<half_t, kDense>>(p, tile, stream)
                                 : choose_tile<Format<bf16_t, kDense>>(p, tile, stream);
}

}  // namespace kh::gemv
