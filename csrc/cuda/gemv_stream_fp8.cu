// SPDX-License-Identifier: Apache-2.0
#include "gemv_stream.muh"

namespace kh::gemv {

int32_t run_stream_fp8(const Problem& p, const Cut& cut, stream_t stream) {
  return p.x_dtype == KH_FLOAT16 ? launch_format<Format<half_t, kFp8, 1>>(p, cut, stream)
                                 : launch_format<Format<bf16_t, kFp8, 1>>(p, cut, stream);
}

}  // namespace kh::gemv
