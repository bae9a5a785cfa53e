// SPDX-License-Identifier: Apache-2.0
// Loaded into a process beside another of its kind, with threads and forks round it.
#include <kh_vendor.h>

namespace {

constexpr int kThreads = 64;

// Much static shared memory: a library may have more than fits where a process keeps the
// thread-local variables that it knew at its start.
__global__ void reverses(int* y, int rounds) {
  __shared__ int s[12000];
  int v = static_cast<int>(threadIdx.x);
  for (int i = 0; i < rounds; ++i) {
    s[threadIdx.x * 187] = v;
    __syncthreads();
    v = s[(kThreads - 1 - threadIdx.x) * 187];
    __syncthreads();
  }
  y[blockIdx.x * kThreads + threadIdx.x] = v;
}

}  // namespace

KH_EXPORT int warp() { return KH_WARP_SIZE; }
KH_EXPORT int run(int* y, int blocks, int rounds, int device, void* stream) {
  const kh::DeviceGuard guard(device);
  return kh::launch(reverses, dim3(blocks), dim3(kThreads), 0, stream, y, rounds);
}
KH_EXPORT const char* error() { return kh::launch_error(1); }
KH_EXPORT void decode_half(const uint16_t* bits, float* out, int count) {
  for (int i = 0; i < count; ++i) out[i] = kh::half_bits_to_float(bits[i]);
}
KH_EXPORT void encode(const float* v, uint16_t* half, uint16_t* bf16, int count) {
  for (int i = 0; i < count; ++i) {
    half[i] = kh::float_to_half_bits(v[i]);
    bf16[i] = kh::float_to_bf16_bits(v[i]);
  }
}
