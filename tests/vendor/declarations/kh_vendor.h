// SPDX-License-Identifier: Apache-2.0
// Declarations only: what a portable kernel may use, and nothing else. With it a plain clang checks
// the host and the device side of the kernels without any SDK; a name that is not here is an error.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define __host__ __attribute__((host))
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __constant__ __attribute__((constant))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))

#define KH_PLATFORM "declarations"
#define KH_WARP_SIZE 32
#define KH_EXPORT extern "C" __attribute__((visibility("default")))
#define KH_DYNAMIC_SHARED(type, name)                                         \
  extern __shared__ __attribute__((aligned(32))) unsigned char kh_dynamic_[]; \
  type* name = reinterpret_cast<type*>(kh_dynamic_)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  __host__ __device__ constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1)
      : x(x), y(y), z(z) {}
};
extern __device__ const uint3 threadIdx, blockIdx;
extern __device__ const dim3 blockDim, gridDim;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
__device__ uint2 make_uint2(unsigned, unsigned);
__device__ uint4 make_uint4(unsigned, unsigned, unsigned, unsigned);

__device__ void __syncthreads() __attribute__((convergent));
__device__ int __syncthreads_or(int) __attribute__((convergent));
__device__ int __syncthreads_count(int) __attribute__((convergent));
__device__ void __syncwarp(unsigned = 0xffffffffu) __attribute__((convergent));
// No default width: a warp may have 128 lanes, and only groups of up to 32 may shuffle.
template <class T>
__device__ T __shfl_sync(unsigned, T, int, int) __attribute__((convergent));
template <class T>
__device__ T __shfl_xor_sync(unsigned, T, int, int) __attribute__((convergent));
template <class T>
__device__ T __shfl_up_sync(unsigned, T, unsigned, int) __attribute__((convergent));
template <class T>
__device__ T __shfl_down_sync(unsigned, T, unsigned, int) __attribute__((convergent));

#define DECLARED_ATOMIC(NAME, T) __device__ T NAME(T*, T)
DECLARED_ATOMIC(atomicAdd, int);
DECLARED_ATOMIC(atomicAdd, unsigned);
DECLARED_ATOMIC(atomicAdd, unsigned long long);
DECLARED_ATOMIC(atomicMax, int);
DECLARED_ATOMIC(atomicMax, unsigned);
DECLARED_ATOMIC(atomicMin, int);
DECLARED_ATOMIC(atomicMin, unsigned);

// Of numbers alone: what vendors have for vectors and 16-bit floats differs.
#define DECLARED_LOAD(T) __device__ T __ldg(const T*)
DECLARED_LOAD(signed char);
DECLARED_LOAD(unsigned char);
DECLARED_LOAD(short);
DECLARED_LOAD(unsigned short);
DECLARED_LOAD(int);
DECLARED_LOAD(unsigned);
DECLARED_LOAD(long);
DECLARED_LOAD(unsigned long);
DECLARED_LOAD(long long);
DECLARED_LOAD(unsigned long long);
DECLARED_LOAD(float);

#define DECLARED_MIN_MAX(T) \
  __device__ T min(T, T);   \
  __device__ T max(T, T)
DECLARED_MIN_MAX(int);
DECLARED_MIN_MAX(unsigned);
DECLARED_MIN_MAX(long);
DECLARED_MIN_MAX(unsigned long);
DECLARED_MIN_MAX(long long);
DECLARED_MIN_MAX(unsigned long long);
DECLARED_MIN_MAX(float);

__device__ int __popc(unsigned);
__device__ int __ffs(int);
__device__ int __clz(int);
__device__ unsigned long long __umul64hi(unsigned long long, unsigned long long);

__device__ float expf(float);
__device__ float tanhf(float);
__device__ float sqrtf(float);
__device__ float rsqrtf(float);
__device__ float fabsf(float);
__device__ float floorf(float);
__device__ float fmaf(float, float, float);
__device__ float __fmul_rn(float, float);
__device__ float __fadd_rn(float, float);
__device__ float __fdiv_rn(float, float);
__device__ float __int_as_float(int);
__device__ int __float_as_int(float);
__device__ float __uint_as_float(unsigned);
__device__ unsigned __float_as_uint(float);

typedef struct declared_stream* declared_stream_t;
extern "C" __host__ int cudaConfigureCall(dim3, dim3, size_t = 0, declared_stream_t = 0);
extern "C" __host__ int __cudaPushCallConfiguration(dim3, dim3, size_t = 0, declared_stream_t = 0);
extern "C" __host__ int cudaLaunchKernel(const void*, dim3, dim3, void**, size_t,
                                         declared_stream_t);

namespace kh {

using stream_t = declared_stream_t;

__device__ float half_bits_to_float(uint16_t);
__device__ uint16_t float_to_half_bits(float);
__device__ uint16_t float_to_bf16_bits(float);
__device__ float add_toward_zero(float, float);
__device__ uint32_t subtract_half_pairs(uint32_t, uint32_t);
__device__ uint32_t subtract_bf16_pairs(uint32_t, uint32_t);
__device__ uint32_t multiply_half_pairs(uint32_t, uint32_t);
__device__ uint32_t multiply_bf16_pairs(uint32_t, uint32_t);
__host__ const char* launch_error(int code);

struct native_half_t {
  uint16_t declared_bits;
};
struct native_bf16_t {
  uint16_t declared_bits;
};
constexpr bool kMatrixUnit = true;
constexpr bool kStreams = false;
constexpr int64_t kThreadsAtOnce = 1 << 11;

namespace matrix {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

// Which elements a lane has differs; only an accumulator's may be looked at, and of the others
// words of two, which have to be treated all alike.
template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment;
template <class T>
struct fragment<matrix_a, 16, 16, 16, T, row_major> {};
template <class T>
struct fragment<matrix_b, 16, 16, 16, T, col_major> {};
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

__device__ void fill_fragment(Accumulator&, float);
template <class T>
__device__ void load_matrix_sync(FragmentA<T>&, const T*, unsigned) __attribute__((convergent));
template <class T>
__device__ void load_matrix_sync(FragmentB<T>&, const T*, unsigned) __attribute__((convergent));
__device__ void load_matrix_sync(Accumulator&, const float*, unsigned, layout_t)
    __attribute__((convergent));
__device__ void store_matrix_sync(float*, const Accumulator&, unsigned, layout_t)
    __attribute__((convergent));
template <class T>
__device__ void mma_sync(Accumulator&, const FragmentA<T>&, const FragmentB<T>&, const Accumulator&)
    __attribute__((convergent));

}  // namespace matrix

template <class Fragment>
__device__ uint32_t* words_of(Fragment&);

template <class... P, class... A>
__host__ int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t bytes, stream_t stream,
                    A&&... args) {
  kernel<<<grid, block, bytes, stream>>>(static_cast<P>(args)...);
  return 0;
}

__device__ void await_last();
template <class... P, class... A>
__host__ int launch_early(void (*kernel)(P...), dim3 grid, dim3 block, size_t bytes,
                          stream_t stream, A&&... args) {
  return launch(kernel, grid, block, bytes, stream, static_cast<A&&>(args)...);
}

class DeviceGuard {
 public:
  __host__ explicit DeviceGuard(int device);
  __host__ int status() const;
};

}  // namespace kh
