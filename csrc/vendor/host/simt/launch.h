// SPDX-License-Identifier: Apache-2.0
// A launch: blocks shared out over OS threads, under a watchdog.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "block.h"

// What the smallest hardware that the kernels are for gives a block.
#ifndef KH_SIMT_SHARED_BYTES
#define KH_SIMT_SHARED_BYTES 49152
#endif

namespace simt {

struct Options {
  Order order;
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

  // Round a fork, so that the child finds the locks free whatever other threads are at.
  void lock() {
    serial.lock();
    mutex.lock();
    stacks().mutex.lock();
  }
  void unlock() {
    stacks().mutex.unlock();
    mutex.unlock();
    serial.unlock();
  }
};
inline Shared& shared();
inline Shared* make_shared_state() {
  stacks();
  pthread_atfork([] { shared().lock(); }, [] { shared().unlock(); }, [] { shared().unlock(); });
  return new Shared;
}
// Made when the library is loaded, and never destroyed, as the stacks.
inline Shared* const shared_state = make_shared_state();
inline Shared& shared() { return *shared_state; }

// Starts a thread with forks held off: while it frees what an earlier thread left, the C library
// is in a state that makes a child free it twice.
template <class F>
std::thread start_thread(F run) {
  std::lock_guard<std::mutex> lock(shared().mutex);
  return std::thread(std::move(run));
}

// Marks a launch as expired in time. A kernel that spins without ever meeting a barrier,
// collective, fence or atomic cannot be ended from outside: then, after as long again, the process
// is.
class Watchdog {
 public:
  explicit Watchdog(Launch* launch) {
    if (launch->timeout_s > 0) thread_ = start_thread([this, launch] { watch(launch); });
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
    launch->expired.store(true, std::memory_order_relaxed);
    if (wake_.wait_for(lock, limit, [this] { return finished_; })) return;
    fprintf(stderr,
            "simt: a kernel (grid %u,%u,%u block %u,%u,%u) runs without a barrier, fence or atomic "
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

// Shares the blocks of a launch out over OS threads.
class Grid {
 public:
  explicit Grid(Launch* launch)
      : launch_(launch), blocks_(1ull * launch->grid.x * launch->grid.y * launch->grid.z) {}

  // Returns the first error, or nothing.
  std::string run(int os_threads) {
    Watchdog watchdog(launch_);
    if (kRaceChecked) {
      // An OS thread for each block: its thread-local memory is new, and nothing that happens in
      // one block comes before what happens in the next.
      while (more()) start_thread([this] { work(1); }).join();
    } else {
      std::vector<std::thread> helpers;
      try {
        for (int i = 1; i < os_threads; ++i)
          helpers.push_back(start_thread([this] { work(blocks_); }));
      } catch (const std::system_error&) {  // the machine gives no more: fewer will do
      }
      work(blocks_);
      for (std::thread& helper : helpers) helper.join();
    }
    acquire_order(&launch_->ends);
    return error_;
  }

 private:
  // Relaxed, as otherwise the order of counting would order the blocks for the race checker.
  bool more() const {
    return next_.load(std::memory_order_relaxed) < blocks_ &&
           !failed_.load(std::memory_order_relaxed);
  }

  // Runs up to `most` of the blocks that are left.
  void work(uint64_t most) {
    Quiet quiet;
    std::string wrong;
    try {
      // On the heap: what the race checker knows of an address ends with its allocation.
      const auto block = std::make_unique<Block>(launch_);
      for (uint64_t done = 0; done < most && wrong.empty() && more(); ++done) {
        const uint64_t turn = next_.fetch_add(1, std::memory_order_relaxed);
        if (turn >= blocks_) break;
        if (launch_->expired.load(std::memory_order_relaxed)) wrong = launch_->overdue();
        if (wrong.empty()) wrong = block->run(launch_->order.block(turn, blocks_));
      }
    } catch (const std::exception& e) {
      wrong = e.what();
    }
    if (!wrong.empty() && !failed_.exchange(true)) error_ = wrong;
  }

  Launch* launch_;
  const uint64_t blocks_;
  std::atomic<uint64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::string error_;  // written by the one that sets `failed_`
};

// ---- limits ----------------------------------------------------------------------------------

constexpr unsigned kMaxThreads = 1024, kMaxThreadsZ = 64;
constexpr unsigned kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;
constexpr size_t kMaxSharedBytes = KH_SIMT_SHARED_BYTES;
constexpr int kMaxOsThreads = 256;
// Each takes two of the 65530 mappings that a process may have.
constexpr int kMaxStacks = 16384;

inline std::string text_of(const dim3& d) {
  return std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z);
}

inline std::string bad_configuration(const Launch& l) {
  const dim3 &g = l.grid, &b = l.block;
  const uint64_t threads = 1ull * b.x * b.y * (b.z <= kMaxThreadsZ ? b.z : 0);
  if (b.x > kMaxThreads || b.y > kMaxThreads || threads < 1 || threads > kMaxThreads)
    return "a block of " + text_of(b) + " threads; 1 to 1024 are possible, and 64 in z";
  if (g.x < 1 || g.y < 1 || g.z < 1 || g.x > kMaxGridX || g.y > kMaxGridYZ || g.z > kMaxGridYZ)
    return "a grid of " + text_of(g) + " blocks; 1 to 2147483647, 65535, 65535 are possible";
  if (l.shared_bytes > kMaxSharedBytes)
    return std::to_string(l.shared_bytes) + " bytes of dynamic shared memory; " +
           std::to_string(kMaxSharedBytes) + " are possible";
  return {};
}

inline int os_threads(const Options& options, const Launch& launch) {
#ifdef KH_SIMT_SERIAL
  return 1;
#endif
  const uint64_t wanted = options.threads ? options.threads : std::thread::hardware_concurrency();
  const uint64_t blocks = 1ull * launch.grid.x * launch.grid.y * launch.grid.z;
  const uint64_t threads = 1ull * launch.block.x * launch.block.y * launch.block.z;
  const uint64_t most = std::min({wanted, blocks, kMaxStacks / threads, uint64_t{kMaxOsThreads}});
  return int(std::max<uint64_t>(most, 1));
}

// ---- the launch itself -----------------------------------------------------------------------

// Keeps a text for `launch_error`.
inline int fail_launch(const std::string& why) {
  snprintf(os_thread.error, sizeof os_thread.error, "%s", why.c_str());
  return 1;
}

// Runs a kernel to its end. Returns 0, or 1 with the reason in `os_thread.error`.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           A&&... args) {
  try {
    if (os_thread.runs_blocks) {
      Quiet quiet;
      self()->block->fail("a launch inside a kernel");
    }
    Launch l;
    l.grid = grid;
    l.block = block;
    l.shared_bytes = shared_bytes;
    const std::string bad = bad_configuration(l);
    if (!bad.empty()) return fail_launch(bad);
    Options options;
    {
      std::lock_guard<std::mutex> lock(shared().mutex);
      options = shared().options;
      shared().last = {shared().last.count + 1,
                       os_thread.device,
                       stream,
                       {grid.x, grid.y, grid.z},
                       {block.x, block.y, block.z}};
    }
    std::tuple<std::decay_t<P>...> values(static_cast<P>(args)...);
    l.body = [&] { std::apply(kernel, values); };
    l.order = options.order;
    l.timeout_s = options.timeout_s;
#ifdef KH_SIMT_SERIAL
    std::lock_guard<std::mutex> one_at_a_time(shared().serial);
#endif
    const std::string wrong = Grid(&l).run(os_threads(options, l));
    return wrong.empty() ? 0 : fail_launch(wrong);
  } catch (const std::exception& e) {  // no memory, no threads
    return fail_launch(e.what());
  }
}

}  // namespace simt
