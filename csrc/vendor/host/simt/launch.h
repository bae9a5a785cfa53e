// SPDX-License-Identifier: Apache-2.0
// A launch: blocks shared out over OS threads, under a watchdog.
#pragma once
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "block.h"

namespace simt {

// The limits of the smallest hardware that the kernels are for.
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 << 10;
constexpr unsigned kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;

struct Options {
  enum Order { kForward, kReverse, kRandom } order = kForward;
  uint64_t seed = 0;       // of the random order
  int threads = 0;         // OS threads; 0: one a core
  double timeout_s = 0.0;  // 0: none
};

// What tests can see of the launches of a library.
struct LastLaunch {
  unsigned long long count = 0;
  int device = 0;
  void* stream = nullptr;
  unsigned grid[3] = {}, block[3] = {};
};

// State of one library; two libraries in one process (two widths) have each their own.
struct Shared {
  std::mutex mutex;
  Options options;
  LastLaunch last;
  std::mutex serial;  // one launch at a time, where __shared__ is not kept apart by OS thread
};
inline Shared& shared() {
  static Shared* made = new Shared;  // never destroyed: kernels may run while a process exits
  return *made;
}
inline thread_local int current_device = 0;
inline thread_local std::string launch_text;  // of this OS thread's last failed launch

inline std::vector<int> turns(const Options& options, int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (options.order == Options::kReverse) std::reverse(order.begin(), order.end());
  if (options.order == Options::kRandom)
    std::shuffle(order.begin(), order.end(), std::mt19937_64(options.seed));
  return order;
}

// Marks a launch as expired in time. A kernel that spins without ever meeting a barrier,
// collective, fence or atomic cannot be ended from outside: then, after as long again, the process
// is.
class Watchdog {
 public:
  explicit Watchdog(Launch* launch) {
    if (launch->timeout_s > 0) thread_ = std::thread([this, launch] { watch(launch); });
  }
  ~Watchdog() {
    if (!thread_.joinable()) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      finished_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  void watch(Launch* launch) {
    const auto limit = std::chrono::duration<double>(launch->timeout_s);
    std::unique_lock<std::mutex> lock(mutex_);
    if (wake_.wait_for(lock, limit, [this] { return finished_; })) return;
    launch->expired = true;
    if (wake_.wait_for(lock, limit, [this] { return finished_; })) return;
    fprintf(
        stderr,
        "simt: a kernel (grid %u,%u,%u block %u,%u,%u) spins without a barrier, fence or atomic "
        "and cannot be ended after %g s; the process is\n",
        launch->grid.x, launch->grid.y, launch->grid.z, launch->block.x, launch->block.y,
        launch->block.z, 2 * launch->timeout_s);
    abort();
  }

  std::thread thread_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool finished_ = false;
};

// Runs every block. Returns the first error, or nothing.
inline std::string run_blocks(Launch* launch, int os_threads) {
  const unsigned long long blocks = 1ull * launch->grid.x * launch->grid.y * launch->grid.z;
  std::atomic<unsigned long long> next{0};
  std::atomic<bool> failed{false};
  std::string error;  // written by the one that sets `failed`
  auto work = [&] {
    std::string wrong;
    try {
      Block block(launch);
      while (wrong.empty() && !failed) {
        const unsigned long long number = next++;
        if (number >= blocks) break;
        if (launch->expired)
          wrong = "still running after " + std::to_string(launch->timeout_s) + " s";
        if (wrong.empty()) wrong = block.run(number);
      }
    } catch (const std::exception& e) {
      wrong = e.what();
    }
    if (!wrong.empty() && !failed.exchange(true)) error = wrong;
  };
  Watchdog watchdog(launch);
  std::vector<std::thread> helpers;
  const unsigned long long wanted = std::min<unsigned long long>(os_threads, blocks);
  for (unsigned long long i = 1; i < wanted; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  return error;
}

inline std::string bad_configuration(const Launch& l) {
  const unsigned long long threads = 1ull * l.block.x * l.block.y * l.block.z;
  if (threads < 1 || threads > kMaxThreads)
    return "a block of " + std::to_string(threads) + " threads; 1 to 1024 are possible";
  if (l.grid.x < 1 || l.grid.y < 1 || l.grid.z < 1 || l.grid.x > kMaxGridX ||
      l.grid.y > kMaxGridYZ || l.grid.z > kMaxGridYZ)
    return "a grid of " + std::to_string(l.grid.x) + "," + std::to_string(l.grid.y) + "," +
           std::to_string(l.grid.z) + " blocks; 1 to 2147483647, 65535, 65535 are possible";
  if (l.shared_bytes > kMaxSharedBytes)
    return std::to_string(l.shared_bytes) + " bytes of dynamic shared memory; 49152 are portable";
  return {};
}

// Runs a kernel to its end. Returns 0, or 1 with the reason in `launch_text`.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           A&&... args) {
  try {
    Launch l;
    l.grid = grid;
    l.block = block;
    l.shared_bytes = shared_bytes;
    launch_text = bad_configuration(l);
    if (!launch_text.empty()) return 1;
    Options options;
    {
      std::lock_guard<std::mutex> lock(shared().mutex);
      options = shared().options;
      shared().last = {shared().last.count + 1,
                       current_device,
                       stream,
                       {grid.x, grid.y, grid.z},
                       {block.x, block.y, block.z}};
    }
    std::tuple<std::decay_t<P>...> values(static_cast<P>(args)...);
    l.body = [&] { std::apply(kernel, values); };
    l.order = turns(options, int(block.x * block.y * block.z));
    l.timeout_s = options.timeout_s;
    int os_threads = options.threads ? options.threads : int(std::thread::hardware_concurrency());
#ifdef KH_SIMT_SERIAL
    std::lock_guard<std::mutex> one_at_a_time(shared().serial);
    os_threads = 1;
#endif
    launch_text = run_blocks(&l, std::max(os_threads, 1));
    return launch_text.empty() ? 0 : 1;
  } catch (const std::exception& e) {  // no memory, no threads
    launch_text = e.what();
    return 1;
  }
}

}  // namespace simt
