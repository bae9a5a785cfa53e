// SPDX-License-Identifier: Apache-2.0
// NVIDIA: everything in which CUDA differs from the other platforms.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <atomic>

#include "matrix.h"

#ifndef KH_PLATFORM
#define KH_PLATFORM "cuda"
#endif
#define KH_WARP_SIZE 32
#define KH_EXPORT extern "C" __attribute__((visibility("default")))
#define KH_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(32) unsigned char kh_dynamic_[]; \
  type* name = reinterpret_cast<type*>(kh_dynamic_)

namespace kh {

using stream_t = cudaStream_t;

__device__ __forceinline__ float half_bits_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t float_to_half_bits(float v) {
  return __half_as_ushort(__float2half_rn(v));
}
__device__ __forceinline__ uint16_t float_to_bf16_bits(float v) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(v));
}

// a + b rounded towards zero, of a >= b >= 0.
__device__ __forceinline__ float add_toward_zero(float a, float b) { return __fadd_rz(a, b); }

// Two 16-bit floats in one word. `_rn`: a product and a difference are not joined.
__device__ __forceinline__ uint32_t subtract_half_pairs(uint32_t a, uint32_t b) {
  const __half2 result =
      __hsub2_rn(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}
__device__ __forceinline__ uint32_t multiply_half_pairs(uint32_t a, uint32_t b) {
  const __half2 result =
      __hmul2_rn(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}
__device__ __forceinline__ uint32_t subtract_bf16_pairs(uint32_t a, uint32_t b) {
  const __nv_bfloat162 result = __hsub2_rn(reinterpret_cast<const __nv_bfloat162&>(a),
                                           reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}
__device__ __forceinline__ uint32_t multiply_bf16_pairs(uint32_t a, uint32_t b) {
  const __nv_bfloat162 result = __hmul2_rn(reinterpret_cast<const __nv_bfloat162&>(a),
                                           reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}

namespace matrix = ::kh_cuda::wmma;
using native_half_t = __half;
using native_bf16_t = __nv_bfloat16;
// A lane's elements of 16 bits, two to a word.
template <class Fragment>
__device__ __forceinline__ uint32_t* words_of(Fragment& f) {
  return f.pairs;
}
constexpr bool kMatrixUnit = true;
constexpr int64_t kThreadsAtOnce = 160 << 10;  // of simple kernels, on an H200
constexpr bool kStreams = true;                // gemv_stream.cu is there
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

inline const char* launch_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// A kernel that is launched early is brought up while the one before it works. It comes to
// `await_last` before it touches memory, and lets the next kernel be brought up only after that:
// who follows this kernel may read, without a wait of its own, what kernels before this one wrote,
// as kernels of torch's Inductor do.
__device__ __forceinline__ void await_last() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}
inline cudaLaunchAttribute before_last_ends() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}
// Whether the current device can bring up a kernel early.
inline bool brings_up_early() {
  constexpr int kMost = 64;
  static std::atomic<int> known[kMost];  // 1: no, 2: yes
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const int kept = device < kMost ? known[device].load(std::memory_order_relaxed) : 0;
  if (kept != 0) return kept == 2;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
    return false;
  if (device < kMost) known[device].store(major >= 9 ? 2 : 1, std::memory_order_relaxed);
  return major >= 9;
}

// Queues a kernel. Returns what is wrong with the launch itself, or an error that waits on the
// device from earlier work, or 0.
template <class... P, class... A>
int launch_early(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, stream_t stream,
                 A&&... args) {
  cudaLaunchAttribute attribute = before_last_ends();
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = brings_up_early() ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
  const cudaError_t waiting = cudaGetLastError();
  return static_cast<int>(status != cudaSuccess ? status : waiting);
}
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, stream_t stream,
           A&&... args) {
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(args)...);
  return static_cast<int>(cudaGetLastError());
}

// Makes a device current for a scope, and the one before it afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = static_cast<int>(cudaGetDevice(&before_));
    if (status_ == 0 && before_ != device) {
      status_ = static_cast<int>(cudaSetDevice(device));
      changed_ = status_ == 0;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int status() const { return status_; }

 private:
  int before_ = 0;
  int status_ = 0;
  bool changed_ = false;
};

}  // namespace kh
