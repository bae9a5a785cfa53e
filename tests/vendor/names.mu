// SPDX-License-Identifier: Apache-2.0
// One use of each name that portable kernels may use: every platform must compile it, and must
// find the numbers that test_vendor.py expects. One block of 32 threads.
#include <kh_vendor.h>

namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kBig = 10240;  // 40 KB of int

__global__ void names(float* floats /*[16]*/, unsigned long long* integers /*[32]*/) {
  __shared__ int big[kBig];
  __shared__ unsigned counter;
  __shared__ unsigned long long wide;
  KH_DYNAMIC_SHARED(uint4, dynamic);
  const int t = static_cast<int>(threadIdx.x);
  const float x = 1.5f + static_cast<float>(blockIdx.x);             // not known to the compiler
  const int n = 40 + static_cast<int>(gridDim.x * blockDim.x) - 32;  // 40
  const unsigned long long ones = ~static_cast<unsigned long long>(blockIdx.x);
  if (t == 0) counter = 0, wide = 1ull << 40;
  dynamic[t] = uint4{1u, 2u, 3u, static_cast<unsigned>(t)};
  big[t * (kBig / 32)] = t;
  __syncthreads();
  atomicAdd(&counter, 2u);
  atomicAdd(&wide, 1ull << 32);
  atomicAdd(integers, 3ull);
  atomicMax(reinterpret_cast<unsigned*>(integers + 1), static_cast<unsigned>(t));
  atomicMin(reinterpret_cast<unsigned*>(integers + 2), static_cast<unsigned>(t));
  const int sum = __shfl_xor_sync(kFull, t, 1, 32) + __shfl_down_sync(kFull, t, 1, 16);
  const unsigned long long far = __shfl_sync(kFull, ones - t, 5, 8);
  const float up = __shfl_up_sync(kFull, x + t, 1, 32);
  __syncwarp();
  const int odd = __syncthreads_count(t % 2), any = __syncthreads_or(t == 9);
  if (t != 9) return;
  const uint2 pair{counter, dynamic[31].w};
  int i = 3;
  integers[i++] = pair.x;
  integers[i++] = wide;
  integers[i++] = pair.y;
  integers[i++] = static_cast<unsigned>(big[31 * (kBig / 32)]);
  integers[i++] = static_cast<unsigned>(sum);
  integers[i++] = far;
  integers[i++] = static_cast<unsigned>(odd * (any != 0));
  integers[i++] = static_cast<unsigned>(__popc(0xf0u + n));
  integers[i++] = static_cast<unsigned>(__ffs(n));
  integers[i++] = static_cast<unsigned>(__clz(n));
  integers[i++] = __umul64hi(ones, ones);
  integers[i++] = static_cast<unsigned>(min(n, 7) + max(n, 7));
  integers[i++] = min(ones, 9ull) + max(static_cast<uint64_t>(n), static_cast<uint64_t>(t));
  integers[i++] = static_cast<unsigned>(__float_as_int(x));
  integers[i++] = __float_as_uint(-x);
  integers[i++] = __ldg(integers + 3);
  i = 0;
  floats[i++] = __int_as_float(__float_as_int(x) + (1 << 23));
  floats[i++] = __uint_as_float(__float_as_uint(x) - (1u << 23));
  floats[i++] = expf(x);
  floats[i++] = tanhf(x);
  floats[i++] = sqrtf(x);
  floats[i++] = rsqrtf(x);
  floats[i++] = fabsf(-x);
  floats[i++] = floorf(-x);
  floats[i++] = fmaf(x, x, 1.f);
  floats[i++] = __fadd_rn(__fmul_rn(x, x), __fdiv_rn(1.f, x));
  floats[i++] = min(x, 2.f) + max(x, 2.f);
  floats[i++] = up;
  floats[i++] = __ldg(floats);
}

}  // namespace

KH_EXPORT int kh_names(float* floats, unsigned long long* integers, void* stream) {
  return kh::launch(names, dim3(1), dim3(32), 32 * sizeof(uint4), static_cast<kh::stream_t>(stream),
                    floats, integers);
}
