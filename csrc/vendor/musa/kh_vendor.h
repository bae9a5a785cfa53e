// SPDX-License-Identifier: Apache-2.0
// Moore Threads: everything in which MUSA differs from the other platforms. Compiled by mcc with
// the MUSA SDK; for tests by nvcc, with MUSA names defined on top of CUDA. Not run on MUSA hardware
// yet.
#pragma once
#include <mma.h>
#include <musa_bf16.h>
#include <musa_fp16.h>
#include <musa_runtime.h>
#include <stdint.h>

#ifndef KH_PLATFORM
#define KH_PLATFORM "musa"
#endif
// Lanes that shuffle with each other. Parts whose warp is 128 wide take masks of 32 lanes too.
#define KH_WARP_SIZE 32
#define KH_EXPORT extern "C" __attribute__((visibility("default")))
#define KH_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(32) unsigned char kh_dynamic_[]; \
  type* name = reinterpret_cast<type*>(kh_dynamic_)

namespace kh {

using stream_t = musaStream_t;

// The header of half is known to spell conversions as CUDA does; of reading its bits that is not
// known.
__device__ __forceinline__ float half_bits_to_float(uint16_t bits) {
  __half v;
  *reinterpret_cast<uint16_t*>(&v) = bits;
  return __half2float(v);
}
__device__ __forceinline__ uint16_t float_to_half_bits(float v) {
  const __half rounded = __float2half_rn(v);
  return *reinterpret_cast<const uint16_t*>(&rounded);
}
// In integers: mp_21 has no bf16 arithmetic.
__device__ __forceinline__ uint16_t float_to_bf16_bits(float v) {
  const unsigned bits = __float_as_uint(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN, as CUDA has it
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// a + b rounded towards zero, of a >= b >= 0; the difference is exact. Not known: whether mcc has
// __fadd_rz.
__device__ __forceinline__ float add_toward_zero(float a, float b) {
  const float sum = __fadd_rn(a, b);
  return __fadd_rn(sum, -a) > b ? __uint_as_float(__float_as_uint(sum) - 1) : sum;
}

// Two 16-bit floats in one word. Not known: whether mcc joins a product and a difference of halves.
__device__ __forceinline__ uint32_t subtract_half_pairs(uint32_t a, uint32_t b) {
  const __half2 result =
      __hsub2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}
__device__ __forceinline__ uint32_t multiply_half_pairs(uint32_t a, uint32_t b) {
  const __half2 result =
      __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}
#if defined(__MUSA_ARCH__) && __MUSA_ARCH__ < 220  // no bf16 arithmetic
// Through fp32, which changes no result: it has more than twice the bits of bf16.
__device__ __forceinline__ float bf16_of_pair(uint32_t pair, int shift) {
  return __uint_as_float(pair >> shift << 16);
}
__device__ __forceinline__ uint32_t subtract_bf16_pairs(uint32_t a, uint32_t b) {
  const uint32_t low = float_to_bf16_bits(__fadd_rn(bf16_of_pair(a, 0), -bf16_of_pair(b, 0)));
  const uint32_t high = float_to_bf16_bits(__fadd_rn(bf16_of_pair(a, 16), -bf16_of_pair(b, 16)));
  return low | high << 16;
}
__device__ __forceinline__ uint32_t multiply_bf16_pairs(uint32_t a, uint32_t b) {
  const uint32_t low = float_to_bf16_bits(__fmul_rn(bf16_of_pair(a, 0), bf16_of_pair(b, 0)));
  const uint32_t high = float_to_bf16_bits(__fmul_rn(bf16_of_pair(a, 16), bf16_of_pair(b, 16)));
  return low | high << 16;
}
#else
__device__ __forceinline__ uint32_t subtract_bf16_pairs(uint32_t a, uint32_t b) {
  const __mt_bfloat162 result = __hsub2(reinterpret_cast<const __mt_bfloat162&>(a),
                                        reinterpret_cast<const __mt_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}
__device__ __forceinline__ uint32_t multiply_bf16_pairs(uint32_t a, uint32_t b) {
  const __mt_bfloat162 result = __hmul2(reinterpret_cast<const __mt_bfloat162&>(a),
                                        reinterpret_cast<const __mt_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}
#endif

namespace matrix = mtmusa::wmma;
using native_half_t = __half;
using native_bf16_t = __mt_bfloat16;
// A lane's elements of 16 bits, two to a word.
template <class Fragment>
__device__ __forceinline__ uint32_t* words_of(Fragment& f) {
  static_assert(sizeof f.x == 16, "32 lanes share out 256 elements");
  return reinterpret_cast<uint32_t*>(f.x);
}
constexpr bool kStreams = false;
constexpr int64_t kThreadsAtOnce = 160 << 10;  // a guess: that of an H200
// From mp_31 on. None of it has been run on MUSA hardware.
#if defined(__MUSA_ARCH__) && __MUSA_ARCH__ < 310
constexpr bool kMatrixUnit = false;
#else
constexpr bool kMatrixUnit = true;
#endif

inline const char* launch_error(int code) {
  return musaGetErrorString(static_cast<musaError_t>(code));
}

// Queues a kernel. Returns what is wrong with the launch itself, or an error that waits on the
// device from earlier work, or 0.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, stream_t stream,
           A&&... args) {
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(args)...);
  return static_cast<int>(musaGetLastError());
}

// Kernels follow each other: none is brought up before the last has ended.
__device__ __forceinline__ void await_last() {}
template <class... P, class... A>
int launch_early(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, stream_t stream,
                 A&&... args) {
  return launch(kernel, grid, block, shared_bytes, stream, static_cast<A&&>(args)...);
}

// Makes a device current for a scope, and the one before it afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = static_cast<int>(musaGetDevice(&before_));
    if (status_ == 0 && before_ != device) {
      status_ = static_cast<int>(musaSetDevice(device));
      changed_ = status_ == 0;
    }
  }
  ~DeviceGuard() {
    if (changed_) musaSetDevice(before_);
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
