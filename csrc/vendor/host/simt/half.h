// SPDX-License-Identifier: Apache-2.0
// 16-bit floats: conversions, rounded to nearest even with subnormals kept; the types that a matrix
// unit takes; two of them in one 32-bit word.
#pragma once
#include <cstdint>

#include "arithmetic.h"

namespace kh {

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

struct native_half_t {
  uint16_t bits;
  operator float() const { return half_bits_to_float(bits); }
  static native_half_t rounded(float v) { return {float_to_half_bits(v)}; }
};
struct native_bf16_t {
  uint16_t bits;
  operator float() const { return __uint_as_float(unsigned{bits} << 16); }
  static native_bf16_t rounded(float v) { return {float_to_bf16_bits(v)}; }
};

}  // namespace kh

namespace simt {

// fp32 has more than twice the bits of a 16-bit float and two: rounding to it on the way changes
// no sum, difference or product.
template <class T, class F>
uint32_t for_each_of_pair(uint32_t a, uint32_t b, F f) {
  uint32_t result = 0;
  for (int shift : {0, 16}) {
    const T x{uint16_t(a >> shift)}, y{uint16_t(b >> shift)};
    result |= uint32_t{T::rounded(f(float(x), float(y))).bits} << shift;
  }
  return result;
}
inline float difference(float x, float y) { return x - y; }
inline float product(float x, float y) { return x * y; }

}  // namespace simt

namespace kh {

inline uint32_t subtract_half_pairs(uint32_t a, uint32_t b) {
  return simt::for_each_of_pair<native_half_t>(a, b, simt::difference);
}
inline uint32_t multiply_half_pairs(uint32_t a, uint32_t b) {
  return simt::for_each_of_pair<native_half_t>(a, b, simt::product);
}
inline uint32_t subtract_bf16_pairs(uint32_t a, uint32_t b) {
  return simt::for_each_of_pair<native_bf16_t>(a, b, simt::difference);
}
inline uint32_t multiply_bf16_pairs(uint32_t a, uint32_t b) {
  return simt::for_each_of_pair<native_bf16_t>(a, b, simt::product);
}

}  // namespace kh
