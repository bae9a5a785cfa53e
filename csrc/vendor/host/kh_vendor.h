// SPDX-License-Identifier: Apache-2.0
// The CPU: the names that kernels use, on the emulator in simt/. See docs/emulator.md.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/launch.h"

#ifndef KH_PLATFORM
#define KH_PLATFORM "simt"
#endif
#define KH_WARP_SIZE KH_SIMT_WARP_SIZE
#define KH_EXPORT extern "C" __attribute__((visibility("default")))
#define KH_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(::simt::running_block->shared())

// ---- the language ----------------------------------------------------------------------------

#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __constant__ static const
#ifdef KH_SIMT_SERIAL
#define __shared__ static  // AddressSanitizer sees the edges of what is not thread-local
#else
#define __shared__ static thread_local  // an OS thread runs one block at a time
#endif
#define threadIdx (::simt::running_thread->index)
#define blockIdx (::simt::running_block->index)
#define blockDim (::simt::running_block->launch().block)
#define gridDim (::simt::running_block->launch().grid)

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

// The place of a call, as default arguments of what threads wait in.
#define SIMT_PLACE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define SIMT_HERE(name) (::simt::At{name, file_, line_})

// ---- barriers and collectives ----------------------------------------------------------------

inline void __syncthreads(SIMT_PLACE) { simt::running_block->barrier(SIMT_HERE("__syncthreads")); }
inline int __syncthreads_count(int predicate, SIMT_PLACE) {
  return simt::running_block->barrier(SIMT_HERE("__syncthreads_count"), predicate != 0);
}
inline int __syncthreads_or(int predicate, SIMT_PLACE) {
  return simt::running_block->barrier(SIMT_HERE("__syncthreads_or"), predicate != 0) > 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_PLACE) {
  simt::Block* block = simt::running_block;
  block->finish(block->meet(simt::lanes_of(mask), "", 1, SIMT_HERE("__syncwarp")));
}

namespace simt {

// The value that lane `source` brought; one's own where the warp has no such lane.
template <class T>
T exchange(unsigned mask, T value, int source, At at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take values of 4 or 8 bytes");
  Block* block = running_block;
  Collective* c = block->meet(lanes_of(mask), &value, sizeof(T), at);
  if (c->arrived & lane_bit(source)) {
    Quiet quiet;
    memcpy(&value, c->values[source], sizeof(T));
  } else if (block->has_lane(running_thread->warp, source)) {
    block->finish(c);
    Quiet quiet;
    block->fail(at.text() + ": reads lane " + std::to_string(source) + " which is not in the mask");
  }
  block->finish(c);
  return value;
}

inline Lanes vote(unsigned mask, bool predicate, At at) {
  Block* block = running_block;
  Collective* c = block->meet(lanes_of(mask), &predicate, 1, at);
  Lanes votes = 0;
  {
    Quiet quiet;
    for (int lane = 0; lane < kWarp; ++lane)
      if ((c->arrived & lane_bit(lane)) && c->values[lane][0]) votes |= lane_bit(lane);
  }
  block->finish(c);
  return votes;
}

// The lane's group of `width` lanes, by its first.
inline int group_of(int width, At at) {
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) {
    Quiet quiet;
    running_block->fail(at.text() + ": width " + std::to_string(width));
  }
  return running_thread->lane / width * width;
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width, SIMT_PLACE) {
  const simt::At at = SIMT_HERE("__shfl_sync");
  const int group = simt::group_of(width, at);
  return simt::exchange(mask, v, group + (source & (width - 1)), at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width, SIMT_PLACE) {
  const simt::At at = SIMT_HERE("__shfl_xor_sync");
  const int end = simt::group_of(width, at) + width, lane = simt::running_thread->lane;
  return simt::exchange(mask, v, (lane ^ lanes) < end ? lane ^ lanes : lane, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width, SIMT_PLACE) {
  const simt::At at = SIMT_HERE("__shfl_up_sync");
  const int first = simt::group_of(width, at), lane = simt::running_thread->lane;
  return simt::exchange(mask, v, lane - int(by) >= first ? lane - int(by) : lane, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width, SIMT_PLACE) {
  const simt::At at = SIMT_HERE("__shfl_down_sync");
  const int end = simt::group_of(width, at) + width, lane = simt::running_thread->lane;
  return simt::exchange(mask, v, lane + int(by) < end ? lane + int(by) : lane, at);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_PLACE) {
  return simt::vote(mask, predicate != 0, SIMT_HERE("__any_sync")) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_PLACE) {
  return simt::vote(mask, predicate == 0, SIMT_HERE("__all_sync")) == 0;
}

// ---- atomics and fences: a thread that spins on them is found out of time here ----------------

template <class T, class F>
T simt_read_modify_write(T* p, F f, const simt::At& at) {
  simt::running_block->may_spin(at);
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    next = f(old);
  } while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
#define SIMT_ATOMIC(NAME, EXPRESSION)                                            \
  template <class T>                                                             \
  T NAME(T* p, T v, SIMT_PLACE) {                                                \
    return simt_read_modify_write(                                               \
        p, [=](T old) { return static_cast<T>(EXPRESSION); }, SIMT_HERE(#NAME)); \
  }
SIMT_ATOMIC(atomicAdd, old + v)
SIMT_ATOMIC(atomicMax, old < v ? v : old)
SIMT_ATOMIC(atomicMin, v < old ? v : old)
SIMT_ATOMIC(atomicOr, old | v)
SIMT_ATOMIC(atomicExch, ((void)old, v))
template <class T>
T atomicCAS(T* p, T expected, T v, SIMT_PLACE) {
  return simt_read_modify_write(
      p, [=](T old) { return old == expected ? v : old; }, SIMT_HERE("atomicCAS"));
}
inline void __threadfence(SIMT_PLACE) {
  simt::running_block->may_spin(SIMT_HERE("__threadfence"));
  simt::fence();
}
inline void __threadfence_block(SIMT_PLACE) {
  simt::running_block->may_spin(SIMT_HERE("__threadfence_block"));
  simt::fence();
}

// ---- arithmetic ------------------------------------------------------------------------------

using std::fmaf;
inline float __fmul_rn(float a, float b) { return a * b; }  // -ffp-contract=off keeps it apart
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  memcpy(&bits, &v, 4);
  return bits;
}

namespace kh {

using stream_t = void*;

inline float half_bits_to_float(uint16_t bits) {
  const unsigned sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return __uint_as_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = float(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}
inline uint16_t float_to_half_bits(float v) {
  const unsigned bits = __float_as_uint(v), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;           // NaN, as CUDA has it
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds past the largest half
  if (magnitude >= 0x38800000u) {                       // a normal half
    const unsigned shifted = magnitude - (112u << 23);
    return uint16_t(sign | (shifted + 0xfffu + (shifted >> 13 & 1u)) >> 13);
  }
  // Adding 0.5, whose last bit is worth 2^-24, leaves the subnormal's bits at the bottom, rounded
  // to nearest even.
  const unsigned rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  return uint16_t(sign | rounded);
}
inline uint16_t float_to_bf16_bits(float v) {
  const unsigned bits = __float_as_uint(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN, as CUDA has it
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, stream_t stream,
           A&&... args) {
  return simt::launch(kernel, grid, block, shared_bytes, stream, static_cast<A&&>(args)...);
}

inline const char* launch_error(int) { return simt::launch_text.c_str(); }

// There is but one device; which one was asked for is kept for tests.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : before_(simt::current_device) {
    simt::current_device = device;
  }
  ~DeviceGuard() { simt::current_device = before_; }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int status() const { return 0; }

 private:
  int before_;
};

}  // namespace kh
