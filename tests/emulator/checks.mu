// SPDX-License-Identifier: Apache-2.0
// Kernels that keep the rules of the emulator, and kernels that break one each.
//
//     checks NAME     runs one; prints its result, and the emulator's report where it refuses it
//     checks all      runs every one that needs no sanitizer, and judges it; 0 where all is as told
//     checks good     does that with those that keep the rules
#include <kh_vendor.h>
#include <stdio.h>
#include <string.h>

#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" int kh_simt_configure(const char* order, uint64_t seed, int threads, double timeout_s);
extern "C" void kh_simt_last_launch(simt::LastLaunch* out);
extern "C" const char* kh_simt_error(void);

namespace {

constexpr unsigned kFull = 0xffffffffu;

// ---- kernels that are right ------------------------------------------------------------------

__global__ void reverses(float* y) {
  __shared__ float s[256];
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  y[blockIdx.x * blockDim.x + threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
__global__ void reverses_often(float* y) {
  KH_DYNAMIC_SHARED(float, s);
  float v = static_cast<float>(threadIdx.x);
  for (int i = 0; i < 5; ++i) {
    s[threadIdx.x] = v;
    __syncthreads();
    v = s[blockDim.x - 1 - threadIdx.x];
    __syncthreads();
  }
  y[blockIdx.x * blockDim.x + threadIdx.x] = v;
}
__global__ void counts(float* y) {
  const int even = __syncthreads_count(threadIdx.x % 2 == 0);
  const int none = __syncthreads_or(0), some = __syncthreads_or(threadIdx.x == 7);
  y[threadIdx.x] = static_cast<float>(even + (none ? 1000 : 0) + (some ? 0 : 1000));
}
__global__ void shuffles(float* y) {
  const int lane = threadIdx.x % 32, group = threadIdx.x - lane;
  const float v = static_cast<float>(threadIdx.x);
  bool right = __shfl_xor_sync(kFull, v, 5, 32) == static_cast<float>(group + (lane ^ 5));
  right &= __shfl_sync(kFull, v, 3, 8) == static_cast<float>(group + lane / 8 * 8 + 3);
  right &= __shfl_up_sync(kFull, v, 2, 16) ==
           static_cast<float>(group + (lane % 16 < 2 ? lane : lane - 2));
  right &= __shfl_down_sync(kFull, v, 2, 16) ==
           static_cast<float>(group + (lane % 16 > 13 ? lane : lane + 2));
  const unsigned long long wide = __shfl_xor_sync(kFull, 0x100000000ull + threadIdx.x, 1, 32);
  right &= wide == 0x100000000ull + (threadIdx.x ^ 1u);
  right &= __any_sync(kFull, lane == 31) && !__any_sync(kFull, 0);
  right &= __all_sync(kFull, 1) && !__all_sync(kFull, lane != 0);
  y[blockIdx.x * blockDim.x + threadIdx.x] = right ? 1.f : 0.f;
}
__global__ void half_a_warp(float* y) {
  float v = 1.f;
  if (threadIdx.x % KH_WARP_SIZE < 16) {
    for (int lanes = 8; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffu, v, lanes, 16);
    __syncwarp(0xffffu);
  }
  y[threadIdx.x] = v;
}
// Lanes that wait for the whole warp do not keep others from meeting among themselves first.
__global__ void meets_twice(float* y) {
  float v = 1.f;
  if (threadIdx.x % 32 >= 16)
    for (int lanes = 8; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffff0000u, v, lanes, 16);
  y[threadIdx.x] = v + __shfl_xor_sync(kFull, v, 16, 32);
}
__global__ void ballots(float* y) {
  const unsigned odd = __ballot_sync(kFull, threadIdx.x & 1);
  const unsigned own = __ballot_sync(kFull, threadIdx.x / 32 == 1);
  const bool right = odd == 0xaaaaaaaau && own == (threadIdx.x / 32 == 1 ? kFull : 0u);
  y[threadIdx.x] = right && __popc(odd) == 16 && __ffs(odd) == 2 && __clz(odd) == 0 ? 1.f : 0.f;
}
// The last block to come sums up what all wrote: fences, not barriers, put that in order.
__device__ void sum_of_blocks(float* y, bool fenced) {
  __shared__ bool last;
  unsigned* arrived = reinterpret_cast<unsigned*>(y + 1000);
  if (threadIdx.x == 0) {
    y[64 + blockIdx.x] = 1.f;
    if (fenced) __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  float sum = 0.f;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += y[64 + b];  // HERE sums_unfenced
  if (threadIdx.x == 0) y[0] = sum;
}
__global__ void sums_fenced(float* y) { sum_of_blocks(y, true); }
__global__ void writes_a_local_array(float* y) {  // on stacks that change hands
  float squares[64];
  for (unsigned i = 0; i < 64; ++i) squares[i] = static_cast<float>(i * blockDim.x);
  y[blockIdx.x * blockDim.x + threadIdx.x] = squares[threadIdx.x * 7 % 64];
}
__global__ void reads_unwritten_static(float* y) {
  __shared__ float s[64];
  y[blockIdx.x * blockDim.x + threadIdx.x] = s[threadIdx.x];
  s[threadIdx.x] = 1.f;  // must not be seen by the next block
}
__global__ void notes_blocks(float* y) { y[blockIdx.x] = atomicAdd(y + 1000, 1.f); }
__global__ void ends_early(float* y) {
  y[threadIdx.x] = 1.f;
  if (threadIdx.x >= 40) return;
  y[threadIdx.x] = 2.f;
}
__global__ void adds_up(float* y) { atomicAdd(y + threadIdx.x, 1.f); }
__global__ void reads_unwritten(float* y) {
  KH_DYNAMIC_SHARED(float, s);
  y[blockIdx.x * blockDim.x + threadIdx.x] = s[threadIdx.x];
  s[threadIdx.x] = 1.f;  // must not be seen by the next block
}
__global__ void notes_order(float* y) { y[threadIdx.x] = atomicAdd(y + 255, 1.f); }
__global__ void notes_indices(float* y) {
  if (threadIdx.x == 1 && threadIdx.y == 1 && threadIdx.z == 1)
    y[blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)] =
        static_cast<float>(100 * blockIdx.z + 10 * blockIdx.y + blockIdx.x);
}

// Each group of 32 lanes multiplies a 16x16 matrix of its own by that of all: a b + 1.
template <class T>
__device__ void multiply_as(float* y) {
  namespace matrix = kh::matrix;
  alignas(32) __shared__ T a[3][256];
  alignas(32) __shared__ T b[256];
  alignas(32) __shared__ float results[3][256];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  for (int i = lane; i < 256; i += 32) {
    a[group][i] = T::rounded(static_cast<float>(i / 16 - i % 5 + group));
    if (group == 0) b[i] = T::rounded(static_cast<float>(i % 7 - i / 16) * 0.25f);
  }
  __syncthreads();
  matrix::fragment<matrix::matrix_a, 16, 16, 16, T, matrix::row_major> left;
  matrix::fragment<matrix::matrix_b, 16, 16, 16, T, matrix::col_major> right;
  matrix::fragment<matrix::accumulator, 16, 16, 16, float> sum;
  matrix::fill_fragment(sum, 1.f);
  matrix::load_matrix_sync(left, a[group], 16);
  matrix::load_matrix_sync(right, b, 16);
  matrix::mma_sync(sum, left, right, sum);
  matrix::store_matrix_sync(results[group], sum, 16, matrix::mem_row_major);
  __syncthreads();
  for (int i = lane; i < 256; i += 32) y[256 * group + i] = results[group][i];
}
__global__ void multiplies(float* y) { multiply_as<kh::native_half_t>(y); }
__global__ void multiplies_bf16(float* y) { multiply_as<kh::native_bf16_t>(y); }
float multiplied(int i) {
  const int group = i / 256, row = i / 16 % 16, column = i % 16;
  float sum = 1.f;
  for (int k = 0; k < 16; ++k) {
    const int a = 16 * row + k, b = 16 * column + k;
    sum += static_cast<float>(a / 16 - a % 5 + group) * static_cast<float>(b % 7 - b / 16) * 0.25f;
  }
  return sum;
}
__global__ void reads_unfilled(float* y) {
  kh::matrix::fragment<kh::matrix::accumulator, 16, 16, 16, float> sum;
  y[threadIdx.x] = sum.x[7];
}

// ---- kernels that break a rule, at the line that ends in the kernel's name --------------------

__global__ void barrier_for_some(float* y) {
  if (threadIdx.x < 32) __syncthreads();  // HERE barrier_for_some
  y[threadIdx.x] = 1.f;
}
__global__ void two_barriers(float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();  // HERE two_barriers
  } else {
    y[threadIdx.x] = 1.f;
    __syncthreads();
  }
}
__global__ void barrier_after_exit(float* y) {
  if (threadIdx.x < 40) return;
  __syncthreads();  // HERE barrier_after_exit
  y[threadIdx.x] = 1.f;
}
__global__ void shuffle_for_some(float* y) {
  float v = 1.f;
  if (threadIdx.x % 2) v = __shfl_xor_sync(kFull, v, 1, 32);  // HERE shuffle_for_some
  y[threadIdx.x] = v;
}
__global__ void shuffle_after_exit(float* y) {
  if (threadIdx.x == 3) return;
  y[threadIdx.x] = __shfl_xor_sync(kFull, 1.f, 1, 32);  // HERE shuffle_after_exit
}
__global__ void two_shuffles(float* y) {
  float v = 1.f;
  if (threadIdx.x % 32 < 16) {
    v = __shfl_xor_sync(kFull, v, 1, 32);  // HERE two_shuffles
  } else {
    v = __shfl_xor_sync(kFull, v, 2, 32);
  }
  y[threadIdx.x] = v;
}
__global__ void masks_differ(float* y) {
  const unsigned mask = threadIdx.x == 2 ? 0xffu : 0xffffu;
  y[threadIdx.x] = __shfl_xor_sync(mask, 1.f, 1, 32);  // HERE masks_differ
}
__global__ void not_in_its_mask(float* y) {
  y[threadIdx.x] = __shfl_sync(0xfffeu, 1.f, 1, 32);  // HERE not_in_its_mask
}
__global__ void reads_outside_its_mask(float* y) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
  y[threadIdx.x] = __shfl_sync(mask, 1.f, 20, 32);  // HERE reads_outside_its_mask
}
__global__ void past_the_block(float* y) {               // whose last warp has eight lanes
  y[threadIdx.x] = __shfl_xor_sync(kFull, 1.f, 16, 32);  // HERE past_the_block
}
__global__ void wide_shuffle(float* y) {
  y[threadIdx.x] = __shfl_xor_sync(kFull, 1.f, 1, 64);  // HERE wide_shuffle
}
__global__ void launches(float* y) {
  y[0] = static_cast<float>(kh::launch(ends_early, dim3(1), dim3(1), 0, nullptr, y));
}
__global__ void throws(float*) { throw std::runtime_error("of the kernel"); }
__global__ void mixed_waits(float* y) {
  float v = 1.f;
  if (threadIdx.x < 16) v = __shfl_xor_sync(kFull, v, 1, 32);  // HERE mixed_waits
  if (threadIdx.x >= 16) __syncthreads();
  y[threadIdx.x] = v;
}
__global__ void odd_width(float* y) {
  y[threadIdx.x] = __shfl_xor_sync(kFull, 1.f, 1, 24);  // HERE odd_width
}
__global__ void spins(volatile int* flag) {
  while (*flag == 0) __threadfence();  // HERE spins
}
// No barrier, fence or atomic: nothing but the end of the process ends it.
__global__ void spins_blindly(volatile int* flag) {
  while (*flag == 0) {
  }
}
__global__ void spins_on_an_atomic(int* flag) {
  while (atomicCAS(flag, 1, 2) == 0) {  // HERE spins_on_an_atomic
  }
}

using Matrix = kh::matrix::fragment<kh::matrix::matrix_a, 16, 16, 16, kh::native_half_t,
                                    kh::matrix::row_major>;
__device__ const kh::native_half_t* a_matrix() {
  alignas(32) __shared__ kh::native_half_t s[1024];
  return s;
}
__global__ void matrix_unaligned(float*) {
  Matrix m;
  kh::matrix::load_matrix_sync(m, a_matrix() + 8, 16);  // HERE matrix_unaligned
}
__global__ void matrix_odd_ldm(float*) {
  Matrix m;
  kh::matrix::load_matrix_sync(m, a_matrix(), 20);  // HERE matrix_odd_ldm
}
__global__ void matrix_of_two_pointers(float*) {
  Matrix m;
  const int by = threadIdx.x == 7 ? 16 : 0;
  kh::matrix::load_matrix_sync(m, a_matrix() + by, 16);  // HERE matrix_of_two_pointers
}
__global__ void matrix_of_two_strides(float*) {
  Matrix m;
  const int ldm = threadIdx.x == 7 ? 16 : 24;
  kh::matrix::load_matrix_sync(m, a_matrix(), ldm);  // HERE matrix_of_two_strides
}
__global__ void matrix_for_some(float*) {
  Matrix m;
  if (threadIdx.x != 5) kh::matrix::load_matrix_sync(m, a_matrix(), 16);  // HERE matrix_for_some
  __syncthreads();
}
__global__ void matrix_of_a_few(float*) {
  Matrix m;
  kh::matrix::load_matrix_sync(m, a_matrix(), 16);  // HERE matrix_of_a_few
}

// ---- for the sanitizers ----------------------------------------------------------------------

__global__ void past_global(float* y, const float* x) {
  y[threadIdx.x] = x[threadIdx.x + (threadIdx.x == 63)];  // HERE past_global
}
__global__ void past_static_shared(float* y, int by) {
  __shared__ float s[64];
  s[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + by];  // HERE past_static_shared
}
__global__ void past_dynamic_shared(float* y, int by) {
  KH_DYNAMIC_SHARED(float, s);
  s[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + by];  // HERE past_dynamic_shared
}
__global__ void misaligned(float* y, const float* x) {
  const float4 v = *reinterpret_cast<const float4*>(x + 1);  // HERE misaligned
  y[threadIdx.x] = v.x;
}
__global__ void overflows(float* y, int n) {
  y[threadIdx.x] = static_cast<float>(n * 4096 + static_cast<int>(threadIdx.x));  // HERE overflows
}
__global__ void missing_barrier(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE missing_barrier
}
__global__ void blocks_race(float* y) {
  if (threadIdx.x == 0) y[0] += 1.f;  // HERE blocks_race
}
__global__ void warps_race(float* y) {  // two collectives of each warp order nothing between them
  __shared__ float s[256];
  float v = __shfl_xor_sync(kFull, 1.f, 1, 32);
  s[threadIdx.x] = v;
  v = __shfl_xor_sync(kFull, v, 1, 32);
  y[threadIdx.x] = s[(threadIdx.x + 128) % 256] + v;  // HERE warps_race
}
__global__ void shuffle_orders_nothing(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = 1.f;
  const float v = __shfl_xor_sync(kFull, 1.f, 1, 32);
  y[threadIdx.x] = s[threadIdx.x ^ 1] + v;  // HERE shuffle_orders_nothing
}
__global__ void matrix_unsynced(float*) {
  KH_DYNAMIC_SHARED(kh::native_half_t, s);
  for (int i = 0; i < 8; ++i) s[threadIdx.x * 8 + i] = {0};
  Matrix m;
  kh::matrix::load_matrix_sync(m, s, 16);  // HERE matrix_unsynced
}
__global__ void matrix_past_shared(float*) {
  KH_DYNAMIC_SHARED(kh::native_half_t, s);
  Matrix m;
  kh::matrix::load_matrix_sync(m, s, 16);  // HERE matrix_past_shared
}
__global__ void same_threads_race(float* y) {
  y[threadIdx.x] += 1.f;  // HERE same_threads_race
}
__global__ void sums_unfenced(float* y) { sum_of_blocks(y, false); }
__global__ void deep_stack(float* y, int n) {
  volatile char big[300000];  // past the guard, into the next stack, unless probed
  big[n] = 1;
  y[0] = big[n];
}

// ---- running them ----------------------------------------------------------------------------

struct Run {
  int code = 0;
  std::string text;
  std::vector<float> y;
};

// Runs a kernel whose first argument is y.
template <class... P, class... A>
Run first(void (*kernel)(float*, P...), int blocks, int threads, size_t shared, A... args) {
  Run r;
  r.y.assign(1024, 0.f);
  float* y = r.y.data();
  r.code = kh::launch(kernel, dim3(blocks), dim3(threads), shared, nullptr, y, args...);
  r.text = r.code ? kh::launch_error(r.code) : "";
  return r;
}

template <class T>
Run spin(void (*kernel)(T*)) {
  int flag = 0;
  Run r;
  r.code = kh::launch(kernel, dim3(1), dim3(1), 0, nullptr, &flag);
  r.text = kh::launch_error(r.code);
  return r;
}

#ifdef KH_SIMT_SERIAL
constexpr bool kStaticSharedIsFilled = false;
#else
constexpr bool kStaticSharedIsFilled = true;
#endif

int failures = 0;
thread_local char kept[4] = "";  // what a launcher keeps lies beside the static shared memory

void judge(const char* name, bool right, const Run& r) {
  if (right) return;
  ++failures;
  printf("WRONG %s: code %d, y[0..3] %g %g %g %g, %s\n", name, r.code, r.y.empty() ? 0 : r.y[0],
         r.y.size() > 1 ? r.y[1] : 0, r.y.size() > 2 ? r.y[2] : 0, r.y.size() > 3 ? r.y[3] : 0,
         r.text.c_str());
}

template <class F>
bool each(const Run& r, int count, F expected) {
  if (r.code != 0) return false;
  for (int i = 0; i < count; ++i)
    if (r.y[i] != expected(i)) return false;
  return true;
}

void refused(const char* name, const Run& r, const char* text) {
  judge(name, r.code != 0 && r.text.find(text) != std::string::npos, r);
}

Run run_named(const std::string& name) {
#define NAMED(kernel, ...) \
  if (name == #kernel) return first(kernel, __VA_ARGS__)
  NAMED(reverses, 4, 256, 0);
  NAMED(reverses_often, 4, 256, 1024);
  NAMED(half_a_warp, 1, 64, 0);
  NAMED(barrier_for_some, 1, 64, 0);
  NAMED(two_barriers, 1, 64, 0);
  NAMED(barrier_after_exit, 1, 64, 0);
  NAMED(shuffle_for_some, 1, 64, 0);
  NAMED(shuffle_after_exit, 1, 32, 0);
  NAMED(two_shuffles, 1, 32, 0);
  NAMED(masks_differ, 1, 16, 0);
  NAMED(not_in_its_mask, 1, 16, 0);
  NAMED(reads_outside_its_mask, 1, 32, 0);
  NAMED(mixed_waits, 1, 32, 0);
  NAMED(odd_width, 1, 32, 0);
  NAMED(wide_shuffle, 1, 128, 0);
  NAMED(past_the_block, 1, 40, 0);
  NAMED(matrix_unaligned, 1, 32, 0);
  NAMED(matrix_odd_ldm, 1, 32, 0);
  NAMED(matrix_of_two_pointers, 1, 32, 0);
  NAMED(matrix_of_two_strides, 1, 32, 0);
  NAMED(matrix_for_some, 1, 32, 0);
  NAMED(matrix_of_a_few, 1, 16, 0);
  NAMED(matrix_unsynced, 1, 32, 512);
  NAMED(matrix_past_shared, 1, 32, 256);
  NAMED(shuffle_orders_nothing, 1, 32, 0);
  NAMED(multiplies, 1, 96, 0);
  NAMED(launches, 1, 1, 0);
  NAMED(throws, 1, 1, 0);
  NAMED(meets_twice, 1, 128, 0);
  NAMED(sums_fenced, 6, 32, 0);
  NAMED(sums_unfenced, 6, 32, 0);
  NAMED(writes_a_local_array, 3, 64, 0);
  NAMED(warps_race, 1, 256, 0);
  NAMED(same_threads_race, 2, 4, 0);
  NAMED(past_static_shared, 1, 64, 0, 1);
  NAMED(past_dynamic_shared, 1, 64, 256, 1);
  NAMED(overflows, 1, 4, 0, 1 << 20);
  NAMED(missing_barrier, 1, 64, 0);
  NAMED(blocks_race, 3, 32, 0);
  NAMED(deep_stack, 1, 4, 0, 10);
  if (name == "spins") return spin(spins);
  if (name == "spins_blindly") return spin(spins_blindly);
  if (name == "spins_on_an_atomic") return spin(spins_on_an_atomic);
  if (name == "past_global" || name == "misaligned") {
    const std::unique_ptr<float[]> x(new float[64]());
    return name == "misaligned" ? first(misaligned, 1, 8, 0, x.get())
                                : first(past_global, 1, 64, 0, x.get());
  }
  Run none;
  none.code = 2;
  none.text = "no kernel of that name";
  return none;
}

void check_good_kernels() {
  const auto reversed = [](int i) { return 255.f - i; };
  strcpy(kept, "own");
  Run r = first(reverses, 3, 256, 0);
  judge("reverses", each(r, 256, reversed), r);
  judge("kept", strcmp(kept, "own") == 0, r);
  r = first(reverses_often, 3, 256, 1024);
  judge("reverses_often", each(r, 256, reversed), r);
  r = first(counts, 1, 100, 0);
  judge("counts", each(r, 100, [](int) { return 50.f; }), r);
  r = first(shuffles, 2, 128, 0);
  judge("shuffles", each(r, 128, [](int) { return 1.f; }), r);
  r = first(half_a_warp, 1, 64, 0);
  judge("half_a_warp", each(r, 64, [](int i) { return i % simt::kWarp < 16 ? 16.f : 1.f; }), r);
  r = first(meets_twice, 1, 128, 0);
  judge("meets_twice", each(r, 128, [](int) { return 17.f; }), r);
  r = first(ballots, 1, 128, 0);
  judge("ballots", each(r, 128, [](int) { return 1.f; }), r);
  r = first(multiplies, 1, 96, 0);
  judge("multiplies", each(r, 768, multiplied), r);
  r = first(multiplies_bf16, 1, 96, 0);
  judge("multiplies_bf16", each(r, 768, multiplied), r);
  r = first(reads_unfilled, 1, 32, 0);
  judge("reads_unfilled", r.code == 0 && r.y[0] != r.y[0], r);
  r = first(sums_fenced, 6, 32, 0);
  judge("sums_fenced", each(r, 1, [](int) { return 6.f; }), r);
  r = first(ends_early, 1, 64, 0);
  judge("ends_early", each(r, 64, [](int i) { return i < 40 ? 2.f : 1.f; }), r);
  r = first(adds_up, 50, 64, 0);
  judge("adds_up", each(r, 64, [](int) { return 50.f; }), r);
  r = first(reads_unwritten, 9, 64, 256);
  judge("reads_unwritten", r.code == 0 && r.y[0] != r.y[0] && r.y[575] != r.y[575], r);
  if (kStaticSharedIsFilled) {
    r = first(reads_unwritten_static, 9, 64, 0);
    judge("reads_unwritten_static", r.code == 0 && r.y[0] != r.y[0] && r.y[575] != r.y[575], r);
  }
  r = Run();
  r.y.assign(1024, 0.f);
  float* y = r.y.data();
  r.code = kh::launch(notes_indices, dim3(3, 2, 2), dim3(2, 2, 2), 0, nullptr, y);
  judge("notes_indices",
        each(r, 12, [](int i) { return 100.f * (i / 6) + 10 * (i / 3 % 2) + i % 3; }), r);
}

void check_orders() {
  kh_simt_configure("forward", 0, 1, 0);
  Run r = first(notes_order, 1, 64, 0);
  judge("forward", each(r, 64, [](int i) { return 1.f * i; }), r);
  kh_simt_configure("reverse", 0, 1, 0);
  r = first(notes_order, 1, 64, 0);
  judge("reverse", each(r, 64, [](int i) { return 63.f - i; }), r);
  kh_simt_configure("random", 5, 1, 0);
  const Run one = first(notes_order, 1, 64, 0), two = first(notes_order, 1, 64, 0);
  kh_simt_configure("random", 6, 1, 0);
  const Run other = first(notes_order, 1, 64, 0);
  judge("random", one.y == two.y && one.y != other.y && one.y != r.y, one);
  check_good_kernels();
}

void check_order_of_blocks() {
  kh_simt_configure("forward", 0, 1, 0);
  Run r = first(notes_blocks, 60, 1, 0);
  judge("forward blocks", each(r, 60, [](int i) { return 1.f * i; }), r);
  kh_simt_configure("reverse", 0, 1, 0);
  r = first(notes_blocks, 60, 1, 0);
  judge("reverse blocks", each(r, 60, [](int i) { return 59.f - i; }), r);
  kh_simt_configure("random", 5, 1, 0);
  const Run one = first(notes_blocks, 60, 1, 0), two = first(notes_blocks, 60, 1, 0);
  kh_simt_configure("random", 6, 1, 0);
  const Run other = first(notes_blocks, 60, 1, 0);
  judge("random blocks", one.y == two.y && one.y != other.y && one.y != r.y, one);
  float sum = 0;  // each turn is taken once
  for (int i = 0; i < 60; ++i) sum += one.y[i] * one.y[i];
  judge("every block", sum == 59 * 60 * 119 / 6, one);
}

void check_options() {
  struct Nonsense {
    const char* order;
    int threads;
    double timeout_s;
    const char* reason;
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const Nonsense all[] = {{"sideways", 0, 0, "order 'sideways'"}, {nullptr, 0, 0, "order ''"},
                          {"forward", -1, 0, "-1 OS threads"},    {"forward", 257, 0, "257 OS"},
                          {"forward", 0, -1, "timeout of -1"},    {"forward", 0, nan, "nan"},
                          {"forward", 0, 1e300, "timeout of 1"}};
  for (const Nonsense& n : all) {
    Run r;
    r.code = kh_simt_configure(n.order, 0, n.threads, n.timeout_s);
    r.text = kh_simt_error();
    refused("nonsense", r, n.reason);
  }
  kh_simt_configure("forward", 0, 0, 0);
}

void check_refusals() {
  const char* const refusals[][2] = {
      {"barrier_for_some", "__syncthreads (checks.mu:"},
      {"two_barriers", "barrier divergence: __syncthreads (checks.mu:"},
      {"barrier_after_exit", "__syncthreads (checks.mu:"},
      {"shuffle_for_some", "a lane named in the mask has exited"},
      {"shuffle_after_exit", "a lane named in the mask has exited"},
      {"two_shuffles", "warp divergence: __shfl_xor_sync (checks.mu:"},
      {"masks_differ", "1 thread(s) waiting at __shfl_xor_sync (checks.mu:"},
      {"not_in_its_mask", "calling lane is not in its own mask"},
      {"reads_outside_its_mask", "reads lane 20 which is not in the mask"},
      {"mixed_waits", "waiting at __shfl_xor_sync (checks.mu:"},
      {"odd_width", "width 24"},
      {"wide_shuffle", "width 64"},
      {"past_the_block", "which is past the end of the block"},
      {"matrix_unaligned", "not aligned to 32 bytes"},
      {"matrix_odd_ldm", "ldm 20 is not a multiple of 16 bytes"},
      {"matrix_of_two_pointers", "lanes disagree"},
      {"matrix_of_two_strides", "lanes disagree"},
      {"matrix_for_some", "31 thread(s) waiting at load_matrix_sync (checks.mu:"},
      {"matrix_of_a_few", "takes 32 lanes, and the block has fewer"},
      {"launches", "a launch inside a kernel"},
      {"throws", "exception: of the kernel"},
  };
  for (const char* order : {"forward", "reverse"}) {
    kh_simt_configure(order, 0, 0, 0);
    for (auto& [name, text] : refusals) {
      refused(name, run_named(name), text);
    }
  }
  kh_simt_configure("forward", 0, 0, 0.2);
  refused("spins", run_named("spins"), "still running after 0.2");
  refused("spins", run_named("spins"), "__threadfence (checks.mu:");
  refused("spins_on_an_atomic", run_named("spins_on_an_atomic"), "atomicCAS (checks.mu:");
  kh_simt_configure("forward", 0, 0, 0);
  refused("no threads", first(adds_up, 1, 0, 0), "a block of 0,1,1 threads");
  refused("many threads", first(adds_up, 1, 1025, 0), "a block of 1025,1,1 threads");
  const dim3 misfits[][2] = {{dim3(1), dim3(1, 1, 65)},
                             {dim3(1), dim3(536903681, 536838145, 64)},  // 2^64 + 64 threads
                             {dim3(1), dim3(1u << 31, 2, 1)},
                             {dim3(1u << 31), dim3(1)},
                             {dim3(1, 65536), dim3(1)},
                             {dim3(1, 1, 65536), dim3(1)},
                             {dim3(1, 0), dim3(1)}};
  for (auto& [grid, block] : misfits) {
    Run r;
    float y = 0;
    r.code = kh::launch(adds_up, grid, block, 0, nullptr, &y);
    r.text = kh::launch_error(r.code);
    refused("misfit", r, "are possible");
  }
  refused("no blocks", first(adds_up, 0, 32, 0), "a grid of 0,1,1 blocks");
  refused("much memory", first(reads_unwritten, 1, 32, 49153), "49153 bytes");
  check_good_kernels();  // a refused kernel leaves nothing behind
}

void check_last_launch() {
  simt::LastLaunch before, after;
  kh_simt_last_launch(&before);
  {
    kh::DeviceGuard guard(1);
    int stream;
    float y[64] = {};
    kh::launch(adds_up, dim3(2), dim3(32), 0, &stream, y + 0);
    kh_simt_last_launch(&after);
    Run r;
    judge("last launch",
          after.count == before.count + 1 && after.device == 1 && after.stream == &stream &&
              after.grid[0] == 2 && after.block[0] == 32 && simt::os_thread.device == 1,
          r);
  }
  judge("device restored", simt::os_thread.device == 0, Run());
}

}  // namespace

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "all";
  if (name == "good") {
    check_good_kernels();
    printf("%d wrong\n", failures);
    return failures ? 1 : 0;
  }
  if (name != "all") {
    if (name.rfind("spins", 0) == 0) kh_simt_configure("forward", 0, 0, 0.2);
    const Run r = run_named(name);
    printf("code %d %s\n", r.code, r.text.c_str());
    return r.code;
  }
  check_good_kernels();
  check_orders();
  check_order_of_blocks();
  check_options();
  check_refusals();
  check_last_launch();
  printf("%d wrong\n", failures);
  return failures ? 1 : 0;
}
