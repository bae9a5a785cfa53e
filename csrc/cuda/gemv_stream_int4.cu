// SPDX-License-Identifier: Apache-2.0
#include "gemv_stream.muh"

namespace kh::gemv {
namespace {

template <class T, bool kPlain>
int32_t choose_tiles(const Problem& p, const Cut& cut, stream_t stream) {
  return cut.tiles == 1 ? launch_format<Format<T, kInt4, 1, kPlain>>(p, cut, stream)
                        : launch_format<Format<T, kInt4, 2, kPlain>>(p, cut, stream);
}

template <class T>
int32_t choose_format(Problem p, const Cut& cut, stream_t stream) {
  p.int4_base = Pairs<T>::kBase;
  const Table& scale = p.weight_scale;
  const bool wide = scale.dtype == KH_FLOAT32;
  if (!wide && scale.dtype != p.x_dtype) return kNotServed;
  if (!wide && p.weight_zero.data == nullptr && p.group_shift == 7 && scale.group_stride == 1 &&
      scale.row_stride % 2 == 0 && scale.expert_stride % 2 == 0 && aligned(scale.data, 4))
    return choose_tiles<T, true>(p, cut, stream);
  return choose_tiles<T, false>(p, cut, stream);
}

}  // namespace

int32_t run_stream_int4(const Problem& p, const Cut& cut, stream_t stream) {
  return p.x_dtype == KH_FLOAT16 ? choose_format<half_t>(p, cut, stream)
                                 : choose_format<bf16_t>(p, cut, stream);
}

}  // namespace kh::gemv
