// SPDX-License-Identifier: Apache-2.0
// The CPU: the names that kernels use, on the emulator in simt/. See docs/emulator.md.
#pragma once
#include <cstdint>

#include "simt/arithmetic.h"
#include "simt/atomics.h"
#include "simt/half.h"
#include "simt/launch.h"
#include "simt/matrix.h"
#include "simt/sync.h"

#ifndef KH_PLATFORM
#define KH_PLATFORM "simt"
#endif
#define KH_WARP_SIZE KH_SIMT_WARP_SIZE
#define KH_EXPORT extern "C" __attribute__((visibility("default")))
#define KH_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(::simt::self()->block->shared())

// ---- the language ----------------------------------------------------------------------------

#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline  // not forced: a compiler for CPUs takes four times as long then
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __constant__ static const
#ifdef KH_SIMT_SERIAL
#define __shared__ static  // AddressSanitizer sees the edges of what is not thread-local
#else
#define __shared__ static thread_local  // an OS thread runs one block at a time
#endif
#define threadIdx (::simt::self()->index)
#define blockIdx (::simt::self()->block->index)
#define blockDim (::simt::self()->block->launch().block)
#define gridDim (::simt::self()->block->launch().grid)

#define SIMT_PAIR(T, NAME, ALIGN) \
  struct alignas(ALIGN) NAME {    \
    T x, y;                       \
  };                              \
  inline NAME make_##NAME(T x, T y) { return {x, y}; }
#define SIMT_QUAD(T, NAME, ALIGN) \
  struct alignas(ALIGN) NAME {    \
    T x, y, z, w;                 \
  };                              \
  inline NAME make_##NAME(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_PAIR(float, float2, 8)
SIMT_QUAD(float, float4, 16)
SIMT_PAIR(int, int2, 8)
SIMT_QUAD(int, int4, 16)
SIMT_PAIR(unsigned, uint2, 8)
SIMT_QUAD(unsigned, uint4, 16)

namespace kh {

using stream_t = void*;

namespace matrix = simt::wmma;
// A lane's elements of 16 bits, two to a word.
using word_of_two_t = uint32_t __attribute__((may_alias));
template <class Fragment>
word_of_two_t* words_of(Fragment& f) {
  static_assert(sizeof f.x == 16, "32 lanes share out 256 elements");
  return reinterpret_cast<word_of_two_t*>(f.x);
}
// The other tiles of GEMV are then tested at either width, those of the matrix unit at one.
constexpr bool kMatrixUnit = KH_WARP_SIZE == 32;
constexpr bool kStreams = false;
constexpr int64_t kThreadsAtOnce = 1 << 11;  // few, so that cases have fewer and more

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, stream_t stream,
           A&&... args) {
  return simt::launch(kernel, grid, block, shared_bytes, stream, static_cast<A&&>(args)...);
}

// Kernels follow each other: none is brought up before the last has ended.
inline void await_last() {}
template <class... P, class... A>
int launch_early(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, stream_t stream,
                 A&&... args) {
  return launch(kernel, grid, block, shared_bytes, stream, static_cast<A&&>(args)...);
}

inline const char* launch_error(int) { return simt::os_thread.error; }

// There is but one device; which one was asked for is kept for tests.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : before_(simt::os_thread.device) {
    simt::os_thread.device = device;
  }
  ~DeviceGuard() { simt::os_thread.device = before_; }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int status() const { return 0; }

 private:
  int before_;
};

}  // namespace kh
