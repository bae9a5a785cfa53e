// SPDX-License-Identifier: Apache-2.0
// Arithmetic by the names that kernels use. Compiled with -ffp-contract=off, so that a product and
// a sum are two roundings unless a kernel says fmaf.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

#define SIMT_MIN_MAX(T)                            \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
// One that is NaN counts as absent.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

namespace simt {

template <class To, class From>
To same_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "bits are neither made nor lost");
  To bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}

}  // namespace simt

inline float __int_as_float(int bits) { return simt::same_bits<float>(bits); }
inline int __float_as_int(float v) { return simt::same_bits<int>(v); }
inline float __uint_as_float(unsigned bits) { return simt::same_bits<float>(bits); }
inline unsigned __float_as_uint(float v) { return simt::same_bits<unsigned>(v); }

namespace kh {

// a + b rounded towards zero, of a >= b >= 0; the difference is exact.
inline float add_toward_zero(float a, float b) {
  const float sum = __fadd_rn(a, b);
  return __fadd_rn(sum, -a) > b ? __uint_as_float(__float_as_uint(sum) - 1) : sum;
}

}  // namespace kh

template <class T>
T __ldg(const T* p) {
  return *p;
}
