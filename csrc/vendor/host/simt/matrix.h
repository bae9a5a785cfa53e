// SPDX-License-Identifier: Apache-2.0
// The matrix unit, by the names of CUDA's and MUSA's wmma: 16x16 matrices whose elements are spread
// over 32 lanes.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "block.h"
#include "half.h"

namespace simt {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

constexpr int kSide = 16;
constexpr int kElements = kSide * kSide / kGroup;  // of a lane

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == kSide && N == kSide && K == kSide, "matrices are 16x16");
  static constexpr int num_elements = kElements;
  alignas(16) T x[kElements];
  fragment() { memset(x, kUndefined, sizeof x); }
};

template <class T, class Layout>
using FragmentA = fragment<matrix_a, kSide, kSide, kSide, T, Layout>;
template <class T, class Layout>
using FragmentB = fragment<matrix_b, kSide, kSide, kSide, T, Layout>;
using Accumulator = fragment<accumulator, kSide, kSide, kSide, float>;

// Which element of the matrix, counted along rows, is element i of a lane. Not as on any GPU, so
// that a kernel that counts on a place fails.
inline int number_of(int i, int lane) { return i * kGroup + lane % kGroup; }

inline int first_of_group() { return self()->lane / kGroup * kGroup; }

// Meets the caller's group of 32 lanes.
inline Collective* meet_group(const void* value, size_t bytes, At at) {
  const int first = first_of_group();
  if (!self()->block->has_lane(self()->warp, first + kGroup - 1)) {
    Quiet quiet;
    self()->block->fail(at.text() + ": takes 32 lanes, and the block has fewer");
  }
  return self()->block->meet(Lanes{0xffffffffu} << first, value, bytes, at);
}

// A matrix in memory, as each lane names it.
template <class T>
struct Memory {
  T* p;
  unsigned ldm;  // elements from one row, or column, to the next
  layout_t layout;

  T& operator[](int number) const {
    const size_t row = number / kSide, column = number % kSide;
    return p[layout == mem_row_major ? row * ldm + column : column * ldm + row];
  }

  // Refuses what hardware leaves undefined.
  void check(At at) const {
    Block* block = self()->block;
    Collective* c = meet_group(this, sizeof *this, at);
    {
      Quiet quiet;
      if (memcmp(c->values[first_of_group()], this, sizeof *this) != 0)
        block->fail(at.text() + ": lanes disagree about the pointer, ldm or layout");
      if (reinterpret_cast<uintptr_t>(p) % 32 != 0)
        block->fail(at.text() + ": the pointer is not aligned to 32 bytes");
      if (ldm * sizeof(T) % 16 != 0)
        block->fail(at.text() + ": ldm " + std::to_string(ldm) + " is not a multiple of 16 bytes");
    }
    block->finish(c);
  }
};

template <class Fragment, class T>
void load(Fragment& f, const T* p, unsigned ldm, layout_t layout, At at) {
  const Memory<const T> memory{p, ldm, layout};
  memory.check(at);
  for (int i = 0; i < kElements; ++i) f.x[i] = memory[number_of(i, self()->lane)];
}

template <class Layout>
constexpr layout_t kLayout = std::is_same_v<Layout, row_major> ? mem_row_major : mem_col_major;

template <class T, class Layout>
void load_matrix_sync(FragmentA<T, Layout>& f, const T* p, unsigned ldm, SIMT_PLACE) {
  load(f, p, ldm, kLayout<Layout>, SIMT_HERE("load_matrix_sync"));
}
template <class T, class Layout>
void load_matrix_sync(FragmentB<T, Layout>& f, const T* p, unsigned ldm, SIMT_PLACE) {
  load(f, p, ldm, kLayout<Layout>, SIMT_HERE("load_matrix_sync"));
}
inline void load_matrix_sync(Accumulator& f, const float* p, unsigned ldm, layout_t layout,
                             SIMT_PLACE) {
  load(f, p, ldm, layout, SIMT_HERE("load_matrix_sync"));
}
inline void store_matrix_sync(float* p, const Accumulator& f, unsigned ldm, layout_t layout,
                              SIMT_PLACE) {
  const Memory<float> memory{p, ldm, layout};
  memory.check(SIMT_HERE("store_matrix_sync"));
  for (int i = 0; i < kElements; ++i) memory[number_of(i, self()->lane)] = f.x[i];
}

inline void fill_fragment(Accumulator& f, float v) {
  for (float& x : f.x) x = v;
}

// What a lane brings to a multiplication.
template <class T>
struct Operands {
  float* d;
  const T *a, *b;
  const float* c;
};

// d = a b + c for all lanes. A product of two 16-bit floats is exact in fp32 (bf16: unless it is
// out of range), so that a sum of rounded products is what fmaf gives.
template <class T>
void multiply(const Operands<T>* const (&lanes)[kGroup]) {
  float a[kSide][kSide], b[kSide][kSide];
  for (int lane = 0; lane < kGroup; ++lane)
    for (int i = 0; i < kElements; ++i) {
      const int n = number_of(i, lane);
      a[n / kSide][n % kSide] = lanes[lane]->a[i];
      b[n / kSide][n % kSide] = lanes[lane]->b[i];
    }
  float sums[kSide][kSide] = {};
  for (int row = 0; row < kSide; ++row)
    for (int k = 0; k < kSide; ++k)
      for (int column = 0; column < kSide; ++column) sums[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < kGroup; ++lane)
    for (int i = 0; i < kElements; ++i) {
      const int n = number_of(i, lane);
      lanes[lane]->d[i] = sums[n / kSide][n % kSide] + lanes[lane]->c[i];
    }
}

template <class T, class LayoutA, class LayoutB>
void mma_sync(Accumulator& d, const FragmentA<T, LayoutA>& a, const FragmentB<T, LayoutB>& b,
              const Accumulator& c, SIMT_PLACE) {
  const At at = SIMT_HERE("mma_sync");
  const Operands<T> mine{d.x, a.x, b.x, c.x};
  const Operands<T>* value = &mine;
  Collective* all = meet_group(&value, sizeof value, at);
  if (self()->lane == first_of_group()) {
    Quiet quiet;
    const Operands<T>* lanes[kGroup];
    for (int i = 0; i < kGroup; ++i) memcpy(&lanes[i], all->values[self()->lane + i], sizeof value);
    multiply(lanes);
  }
  self()->block->finish(all);
  self()->block->finish(meet_group("", 1, at));  // until the first lane is through
}

}  // namespace wmma
}  // namespace simt
