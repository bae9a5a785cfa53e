// SPDX-License-Identifier: Apache-2.0
// Stacks for the threads of a block, and what is kept of each thread.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#include "sanitizers.h"
#include "switch.h"
#include "types.h"

namespace simt {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStackBytes = 256 << 10;  // instrumented frames are larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
// As large as a stack, so that no frame that would fit on an empty one can step over it.
constexpr size_t kGuardBytes = kStackBytes;
constexpr size_t kMappedBytes = kGuardBytes + kStackBytes;
static_assert((kMappedBytes & (kMappedBytes - 1)) == 0, "a mapping is aligned to its size");
constexpr size_t kTopBytes = 64;  // at the end of a stack: whose it is

// Stacks live as long as the process and are lent to the threads of one block after another.
class Stacks {
 public:
  char* lend() {
    char* stack = nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (!free_.empty()) {
        stack = free_.back();
        free_.pop_back();
      }
    }
    if (stack == nullptr) stack = map();
    if (kRaceChecked) renew(stack);
    return stack;
  }

  void take_back(const std::vector<char*>& stacks) {
    std::lock_guard<std::mutex> lock(mutex);
    free_.insert(free_.end(), stacks.begin(), stacks.end());
  }

  std::mutex mutex;  // also taken round a fork

 private:
  static char* map() {
    void* made = mmap(nullptr, 2 * kMappedBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) throw std::bad_alloc();
    // What lies before and after the aligned part goes back.
    const auto begin = static_cast<char*>(made);
    const size_t before = -reinterpret_cast<uintptr_t>(begin) & (kMappedBytes - 1);
    char* const guard = begin + before;
    if (before > 0) munmap(begin, before);
    munmap(guard + kMappedBytes, kMappedBytes - before);
    // An overflow is a fault, not a corrupted neighbour.
    if (mprotect(guard, kGuardBytes, PROT_NONE) != 0) {
      munmap(guard, kMappedBytes);
      throw std::bad_alloc();
    }
    return guard + kGuardBytes;
  }

  // To the race checker, memory that another thread used before is shared memory; mapped again it
  // is new. Only the part that kernels use, for this takes long.
  static void renew(char* stack) {
    constexpr size_t kUsedBytes = 32 << 10;
    char* const used = stack + kStackBytes - kUsedBytes;
    if (mmap(used, kUsedBytes, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
      throw std::bad_alloc();
  }

  std::vector<char*> free_;
};

inline Stacks& stacks() {
  static Stacks* made = new Stacks;  // never destroyed: kernels may run while a process exits
  return *made;
}

enum class State : uint8_t { kNew, kReady, kWaiting, kDone };

struct Collective;
class Block;

// A GPU thread.
struct Thread {
  Block* block = nullptr;
  State state = State::kNew;
  uint3 index{};
  int number = 0, lane = 0, warp = 0;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  At waits_at;                       // `what` is null while it runs
  Collective* collective = nullptr;  // null while it waits at the barrier
  Watched watched;
};

inline char* top_of(char* stack) { return stack + kStackBytes - kTopBytes; }

// The GPU thread that runs this code. Its address lies at the end of its stack, which any address
// on the stack leads to: in a shared library a thread-local variable takes far longer to find.
__attribute__((always_inline)) inline Thread* self() {
  const auto here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  const uintptr_t end = (here | (kMappedBytes - 1)) + 1;
  return *reinterpret_cast<Thread**>(end - kTopBytes);
}

// What an OS thread keeps. The first member's value puts all of it among the thread-local data
// that have initial values, apart from the kernels' __shared__ variables (static_shared.h).
struct OsThread {
  int initialised = 1;
  int device = 0;            // as the latest DeviceGuard has it
  bool runs_blocks = false;  // kernels' code runs here
  char error[2048] = "";     // of the last launch that failed here
};
// Of the general TLS model: with initial-exec all __shared__ memory of a library would count
// against the couple of kilobytes that a process has for libraries it loads later.
inline thread_local OsThread os_thread;

}  // namespace simt
