// SPDX-License-Identifier: Apache-2.0
// GEMV of int4 weights on the matrix unit.
#include "gemv_matrix.muh"

namespace kh::gemv {
namespace {

template <class T, bool kZeros>
int32_t choose(const Problem& p, int64_t tile, stream_t stream) {
  return short_groups(p, tile)
             ? choose_tile<Format<T, kInt4, false, true, kZeros>>(p, tile, stream)
             : choose_tile<Format<T, kInt4, false, false, kZeros>>(p, tile, stream);
}

template <class T>
int32_t choose(Problem p, int64_t tile, stream_t stream) {
  p.int4_base = Pairs<T>::kBase;
  return p.weight_zero.data != nullptr ? choose<T, true>(p, tile, stream)
                                       : choose<T, false>(p, tile, stream);
}

}  // namespace

int32_t run_matrix_int4(const Problem& p, int64_t tile, stream_t stream) {
  return p.x_dtype == KH_FLOAT16 ? choose<half_t>(p, tile, stream)
                                 : choose<bf16_t>(p, tile, stream);
}

}  // namespace kh::gemv
