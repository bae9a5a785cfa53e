// SPDX-License-Identifier: Apache-2.0
// Kernels that keep the rules of the emulator, and kernels that break one each.
//
//     checks NAME     runs one; prints its result, and the emulator's report where it refuses it
//     checks all      runs every one that needs no sanitizer, and judges it; 0 where all is as told
#include <kh_vendor.h>
#include <stdio.h>

#include <memory>
#include <string>
#include <vector>

extern "C" int kh_simt_configure(const char* order, uint64_t seed, int threads, double timeout_s);
extern "C" void kh_simt_last_launch(simt::LastLaunch* out);

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
__global__ void spins_on_an_atomic(int* flag) {
  while (atomicCAS(flag, 1, 2) == 0) {  // HERE spins_on_an_atomic
  }
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
__global__ void deep_stack(float* y, int n) {
  volatile char big[4 << 20];
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

Run spin(bool atomic) {
  int flag = 0;
  Run r;
  r.code = atomic ? kh::launch(spins_on_an_atomic, dim3(1), dim3(1), 0, nullptr, &flag)
                  : kh::launch(spins, dim3(1), dim3(1), 0, nullptr, &flag);
  r.text = kh::launch_error(r.code);
  return r;
}

int failures = 0;

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
  NAMED(past_static_shared, 1, 64, 0, 1);
  NAMED(past_dynamic_shared, 1, 64, 256, 1);
  NAMED(overflows, 1, 4, 0, 1 << 20);
  NAMED(missing_barrier, 1, 64, 0);
  NAMED(blocks_race, 64, 32, 0);
  NAMED(deep_stack, 1, 4, 0, 10);
  if (name == "spins") return spin(false);
  if (name == "spins_on_an_atomic") return spin(true);
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
  judge("reverses", each(first(reverses, 3, 256, 0), 256, reversed), first(reverses, 3, 256, 0));
  Run r = first(reverses_often, 3, 256, 1024);
  judge("reverses_often", each(r, 256, reversed), r);
  r = first(counts, 1, 100, 0);
  judge("counts", each(r, 100, [](int) { return 50.f; }), r);
  r = first(shuffles, 2, 128, 0);
  judge("shuffles", each(r, 128, [](int) { return 1.f; }), r);
  r = first(half_a_warp, 1, 64, 0);
  judge("half_a_warp", each(r, 64, [](int i) { return i % simt::kWarp < 16 ? 16.f : 1.f; }), r);
  r = first(ends_early, 1, 64, 0);
  judge("ends_early", each(r, 64, [](int i) { return i < 40 ? 2.f : 1.f; }), r);
  r = first(adds_up, 50, 64, 0);
  judge("adds_up", each(r, 64, [](int) { return 50.f; }), r);
  r = first(reads_unwritten, 9, 64, 256);
  judge("reads_unwritten", r.code == 0 && r.y[0] != r.y[0] && r.y[575] != r.y[575], r);
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
  judge("nonsense",
        kh_simt_configure("sideways", 0, 0, 0) && kh_simt_configure("forward", 0, -1, 0) &&
            kh_simt_configure("forward", 0, 0, -1),
        one);
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
      {"masks_differ", "mask differs from that of lanes that wait at __shfl_xor_sync (checks.mu:"},
      {"not_in_its_mask", "calling lane is not in its own mask"},
      {"reads_outside_its_mask", "reads lane 20 which is not in the mask"},
      {"mixed_waits", "waiting at __shfl_xor_sync (checks.mu:"},
      {"odd_width", "width 24"},
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
  refused("no threads", first(adds_up, 1, 0, 0), "a block of 0 threads");
  refused("many threads", first(adds_up, 1, 1025, 0), "a block of 1025 threads");
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
              after.grid[0] == 2 && after.block[0] == 32 && simt::current_device == 1,
          r);
  }
  judge("device restored", simt::current_device == 0, Run());
}

}  // namespace

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "all";
  if (name != "all") {
    if (name == "spins") kh_simt_configure("forward", 0, 0, 0.2);
    const Run r = run_named(name);
    printf("code %d %s\n", r.code, r.text.c_str());
    return r.code;
  }
  check_good_kernels();
  check_orders();
  check_refusals();
  check_last_launch();
  printf("%d wrong\n", failures);
  return failures ? 1 : 0;
}
