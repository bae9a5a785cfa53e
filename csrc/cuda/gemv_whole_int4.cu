// SPDX-License-Identifier: Apache-2.0
#include "gemv_whole_int4.muh"

namespace kh::gemv {
namespace {

template <class T>
int32_t choose_zeros(Problem p, stream_t stream) {
  p.int4_base = Pairs<T>::kBase;
  if (p.weight_scale.dtype != KH_FLOAT32 && p.weight_scale.dtype != p.x_dtype) return kNotServed;
  return p.weight_zero.data == nullptr ? launch_whole<T, false>(p, stream)
                                       : launch_whole<T, true>(p, stream);
}

}  // namespace

int32_t run_whole_int4(const Problem& p, stream_t stream) {
  return p.x_dtype == KH_FLOAT16 ? choose_zeros<half_t>(p, stream)
                                 : choose_zeros<bf16_t>(p, stream);
}

}  // namespace kh::gemv
