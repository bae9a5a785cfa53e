// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cuda_bf16.h>

using __mt_bfloat16 = __nv_bfloat16;
using __mt_bfloat162 = __nv_bfloat162;
