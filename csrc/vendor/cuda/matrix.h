// SPDX-License-Identifier: Apache-2.0
// CUDA's wmma with loads of bf16 that know that they read shared memory. nvcc 13.0 loses that for
// this type, and generic loads of 4 bytes took 2.5 times the instructions of the whole loop.
#pragma once
#include <cuda_bf16.h>
#include <mma.h>
#include <stdint.h>

namespace kh_cuda {
namespace wmma {

using nvcuda::wmma::accumulator;
using nvcuda::wmma::col_major;
using nvcuda::wmma::fill_fragment;
using nvcuda::wmma::fragment;
using nvcuda::wmma::layout_t;
using nvcuda::wmma::matrix_a;
using nvcuda::wmma::matrix_b;
using nvcuda::wmma::mem_row_major;
using nvcuda::wmma::mma_sync;
using nvcuda::wmma::row_major;
using nvcuda::wmma::store_matrix_sync;

// All but an accumulator's come from shared memory.
template <class Use, class T, class Layout>
__device__ __forceinline__ void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to,
                                                 const T* from, unsigned stride) {
  nvcuda::wmma::load_matrix_sync(to, from, stride);
}

__device__ __forceinline__ void load_matrix_sync(fragment<accumulator, 16, 16, 16, float>& to,
                                                 const float* from, unsigned stride,
                                                 layout_t layout) {
  nvcuda::wmma::load_matrix_sync(to, from, stride, layout);
}

__device__ __forceinline__ void load_matrix_sync(
    fragment<matrix_a, 16, 16, 16, __nv_bfloat16, row_major>& to, const __nv_bfloat16* from,
    unsigned stride) {
  uint32_t* words = reinterpret_cast<uint32_t*>(to.x);
  asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))), "r"(stride)
               : "memory");
}

__device__ __forceinline__ void load_matrix_sync(
    fragment<matrix_b, 16, 16, 16, __nv_bfloat16, col_major>& to, const __nv_bfloat16* from,
    unsigned stride) {
  uint32_t* words = reinterpret_cast<uint32_t*>(to.x);
  asm volatile("wmma.load.b.sync.aligned.col.m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))), "r"(stride)
               : "memory");
}

}  // namespace wmma
}  // namespace kh_cuda
