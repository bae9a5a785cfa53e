// SPDX-License-Identifier: Apache-2.0
// The interface of wmma for 16x16x16 products on NVIDIA, over mma.sync and ldmatrix, whose layouts
// the PTX manual gives. nvcc's own wmma computes addresses anew at every load, a fifth of all
// instructions of the kernels here. All but an accumulator's matrices come from shared memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace kh_cuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment;
template <class T>
struct fragment<matrix_a, 16, 16, 16, T, row_major> {
  static constexpr int num_elements = 8;
  union {
    uint32_t pairs[4];
    T x[num_elements];
  };
};
template <class T>
struct fragment<matrix_b, 16, 16, 16, T, col_major> {
  static constexpr int num_elements = 8;
  union {
    uint32_t pairs[4];
    T x[num_elements];
  };
};
template <>
struct fragment<accumulator, 16, 16, 16, float> {
  static constexpr int num_elements = 8;
  float x[num_elements];
};
template <class T>
using FragmentA = fragment<matrix_a, 16, 16, 16, T, row_major>;
template <class T>
using FragmentB = fragment<matrix_b, 16, 16, 16, T, col_major>;
using Accumulator = fragment<accumulator, 16, 16, 16, float>;

__device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }

__device__ __forceinline__ void fill_fragment(Accumulator& f, float v) {
#pragma unroll
  for (int i = 0; i < 8; ++i) f.x[i] = v;
}

// Four matrices of 8x8; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_four(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

template <class T>
__device__ __forceinline__ void load_matrix_sync(FragmentA<T>& f, const T* p, unsigned stride) {
  load_four(f.pairs, p + lane() % 16 * stride + lane() / 16 * 8);
}
template <class T>
__device__ __forceinline__ void load_matrix_sync(FragmentB<T>& f, const T* p, unsigned stride) {
  load_four(f.pairs, p + (lane() % 8 + lane() / 16 * 8) * stride + lane() / 8 % 2 * 8);
}

// Element i of an accumulator's lane.
__device__ __forceinline__ uint32_t row_of(int i) { return lane() / 4 + i / 2 % 2 * 8; }
__device__ __forceinline__ uint32_t column_of(int i) { return lane() % 4 * 2 + i % 2 + i / 4 * 8; }

__device__ __forceinline__ void load_matrix_sync(Accumulator& f, const float* p, unsigned stride,
                                                 layout_t) {
#pragma unroll
  for (int i = 0; i < 8; ++i) f.x[i] = p[row_of(i) * stride + column_of(i)];
}
__device__ __forceinline__ void store_matrix_sync(float* p, const Accumulator& f, unsigned stride,
                                                  layout_t) {
#pragma unroll
  for (int i = 0; i < 8; ++i) p[row_of(i) * stride + column_of(i)] = f.x[i];
}

#define KH_CUDA_MMA(TYPE, NAME)                                                                   \
  __device__ __forceinline__ void multiply(const TYPE*, float* d, const uint32_t* a,              \
                                           const uint32_t* b, const float* c) {                   \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                    \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), \
          "f"(c[2]), "f"(c[3]));                                                                  \
  }
KH_CUDA_MMA(__half, "f16")
KH_CUDA_MMA(__nv_bfloat16, "bf16")
#undef KH_CUDA_MMA

// Columns 0 to 7, then 8 to 15.
template <class T>
__device__ __forceinline__ void mma_sync(Accumulator& d, const FragmentA<T>& a,
                                         const FragmentB<T>& b, const Accumulator& c) {
  multiply(static_cast<const T*>(nullptr), d.x, a.pairs, b.pairs, c.x);
  multiply(static_cast<const T*>(nullptr), d.x + 4, a.pairs, b.pairs + 2, c.x + 4);
}

}  // namespace wmma
}  // namespace kh_cuda
