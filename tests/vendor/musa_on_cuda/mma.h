// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../../../csrc/vendor/cuda/matrix.h"

namespace mtmusa {
namespace wmma = ::kh_cuda::wmma;
}
