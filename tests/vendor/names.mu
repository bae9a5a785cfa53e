// SPDX-License-Identifier: Apache-2.0
// One use of each name that portable kernels may use: every platform must compile it, and must
// find the numbers that test_vendor.py expects. One block of 32 threads.
#include <kh_vendor.h>

namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kBig = 10240;  // 40 KB of int

__global__ void names(float* floats /*[16]*/, unsigned long long* integers /*[32]*/) {
  __shared__ int big[kBig];
  __shared__ unsigned counter;
  __shared__ unsigned long long wide;
  KH_DYNAMIC_SHARED(uint4, dynamic);
  const int t = static_cast<int>(threadIdx.x);
  const float x = 1.5f + static_cast<float>(blockIdx.x);             // not known to the compiler
  const int n = 40 + static_cast<int>(gridDim.x * blockDim.x) - 32;  // 40
  const unsigned long long ones = ~static_cast<unsigned long long>(blockIdx.x);
  if (t == 0) counter = 0, wide = 1ull << 40;
  dynamic[t] = make_uint4(1u, 2u, 3u, static_cast<unsigned>(t));
  big[t * (kBig / 32)] = t;
  __syncthreads();
  atomicAdd(&counter, 2u);
  atomicAdd(&wide, 1ull << 32);
  atomicAdd(integers, 3ull);
  atomicMax(reinterpret_cast<unsigned*>(integers + 1), static_cast<unsigned>(t));
  atomicMin(reinterpret_cast<unsigned*>(integers + 2), static_cast<unsigned>(t));
  const int sum = __shfl_xor_sync(kFull, t, 1, 32) + __shfl_down_sync(kFull, t, 1, 16);
  const unsigned long long far = __shfl_sync(kFull, ones - t, 5, 8);
  const float up = __shfl_up_sync(kFull, x + t, 1, 32);
  __syncwarp();
  const int odd = __syncthreads_count(t % 2), any = __syncthreads_or(t == 9);
  if (t != 9) return;
  const uint2 pair = make_uint2(counter, dynamic[31].w);
  int i = 3;
  integers[i++] = pair.x;
  integers[i++] = wide;
  integers[i++] = pair.y;
  integers[i++] = static_cast<unsigned>(big[31 * (kBig / 32)]);
  integers[i++] = static_cast<unsigned>(sum);
  integers[i++] = far;
  integers[i++] = static_cast<unsigned>(odd * (any != 0));
  integers[i++] = static_cast<unsigned>(__popc(0xf0u + n));
  integers[i++] = static_cast<unsigned>(__ffs(n));
  integers[i++] = static_cast<unsigned>(__clz(n));
  integers[i++] = __umul64hi(ones, ones);
  integers[i++] = static_cast<unsigned>(min(n, 7) + max(n, 7));
  integers[i++] = min(ones, 9ull) + max(static_cast<uint64_t>(n), static_cast<uint64_t>(t));
  integers[i++] = static_cast<unsigned>(__float_as_int(x));
  integers[i++] = __float_as_uint(-x);
  integers[i++] = __ldg(integers + 3);
  i = 0;
  floats[i++] = __int_as_float(__float_as_int(x) + (1 << 23));
  floats[i++] = __uint_as_float(__float_as_uint(x) - (1u << 23));
  floats[i++] = expf(x);
  floats[i++] = tanhf(x);
  floats[i++] = sqrtf(x);
  floats[i++] = rsqrtf(x);
  floats[i++] = fabsf(-x);
  floats[i++] = floorf(-x);
  floats[i++] = fmaf(x, x, 1.f);
  floats[i++] = __fadd_rn(__fmul_rn(x, x), __fdiv_rn(1.f, x));
  floats[i++] = min(x, 2.f) + max(x, 2.f);
  floats[i++] = up;
  floats[i++] = __ldg(floats);
  floats[i++] = (kh::add_toward_zero(4.f, x * 0x1p-22f) - 4.f) * 0x1p21f;
}

__global__ void pairs(const uint32_t* a /*[count]*/, const uint32_t* b /*[count]*/,
                      uint32_t* y /*[4, count]*/, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  y[i] = kh::subtract_half_pairs(a[i], b[i]);
  y[count + i] = kh::multiply_half_pairs(a[i], b[i]);
  y[2 * count + i] = kh::subtract_bf16_pairs(a[i], b[i]);
  y[3 * count + i] = kh::multiply_bf16_pairs(a[i], b[i]);
}

// y = 2 (y + a b^T), by one warp, where there is a matrix unit.
template <class T>
__global__ void multiplies(const T* a /*[16, 32]*/, const T* b /*[16, 32]*/,
                           float* y /*[16, 16]*/) {
  namespace matrix = kh::matrix;
  if constexpr (kh::kMatrixUnit) {
    matrix::fragment<matrix::accumulator, 16, 16, 16, float> sum, more;
    matrix::fill_fragment(sum, 0.f);
    for (int k = 0; k < 32; k += 16) {
      matrix::fragment<matrix::matrix_a, 16, 16, 16, T, matrix::row_major> left;
      matrix::fragment<matrix::matrix_b, 16, 16, 16, T, matrix::col_major> right;
      matrix::load_matrix_sync(left, a + k, 32);
      matrix::load_matrix_sync(right, b + k, 32);
      matrix::mma_sync(sum, left, right, sum);
    }
    matrix::load_matrix_sync(more, y, 16, matrix::mem_row_major);
    for (int i = 0; i < sum.num_elements; ++i) sum.x[i] = 2.f * (sum.x[i] + more.x[i]);
    matrix::store_matrix_sync(y, sum, 16, matrix::mem_row_major);
  }
}

}  // namespace

KH_EXPORT int kh_matrix_unit() { return kh::kMatrixUnit; }
KH_EXPORT int kh_multiplies(int bf16, const void* a, const void* b, float* y, void* stream) {
  const kh::stream_t on = static_cast<kh::stream_t>(stream);
  if (bf16)
    return kh::launch(multiplies<kh::native_bf16_t>, dim3(1), dim3(32), 0, on,
                      static_cast<const kh::native_bf16_t*>(a),
                      static_cast<const kh::native_bf16_t*>(b), y);
  return kh::launch(multiplies<kh::native_half_t>, dim3(1), dim3(32), 0, on,
                    static_cast<const kh::native_half_t*>(a),
                    static_cast<const kh::native_half_t*>(b), y);
}
KH_EXPORT int kh_pairs(const uint32_t* a, const uint32_t* b, uint32_t* y, int count, void* stream) {
  return kh::launch(pairs, dim3((count + 31) / 32), dim3(32), 0, static_cast<kh::stream_t>(stream),
                    a, b, y, count);
}
KH_EXPORT int kh_names(float* floats, unsigned long long* integers, void* stream) {
  return kh::launch(names, dim3(1), dim3(32), 32 * sizeof(uint4), static_cast<kh::stream_t>(stream),
                    floats, integers);
}
