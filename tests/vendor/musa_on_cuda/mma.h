// SPDX-License-Identifier: Apache-2.0
#pragma once
#include_next <mma.h>

namespace mtmusa {
namespace wmma = nvcuda::wmma;
}
