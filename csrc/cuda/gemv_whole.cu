// SPDX-License-Identifier: Apache-2.0
#include "gemv_whole.muh"

namespace kh::gemv {

int32_t run_whole(const Problem& p, stream_t stream) {
  return p.x_dtype == KH_FLOAT16 ? launch_whole<half_t>(p, stream)
                                 : launch_whole<bf16_t>(p, stream);
}

}  // namespace kh::gemv
