// SPDX-License-Identifier: Apache-2.0
// Stacks and the switch between them. ucontext takes a microsecond a round trip, which a kernel of
// a thousand threads and a few barriers cannot afford; fifteen instructions do the same.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

// In switch.cpp: saves the callee's registers on this stack, its address in *save, and goes on from
// the stack `to`.
extern "C" __attribute__((visibility("hidden"))) void kh_simt_switch(void** save, void* to);

namespace simt {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStackBytes = 256 << 10;  // instrumented frames are larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kGuardBytes = 4096;

// Stacks live as long as the process and are lent to the threads of one block after another.
class Stacks {
 public:
  static Stacks& pool() {
    static Stacks* made = new Stacks;  // never destroyed: kernels may run while a process exits
    return *made;
  }

  char* lend() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        char* stack = free_.back();
        free_.pop_back();
        return stack;
      }
    }
    void* made = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) throw std::bad_alloc();
    mprotect(made, kGuardBytes, PROT_NONE);  // an overflow is a fault, not a corrupted neighbour
    return static_cast<char*>(made) + kGuardBytes;
  }

  void take_back(const std::vector<char*>& stacks) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.insert(free_.end(), stacks.begin(), stacks.end());
  }

 private:
  std::mutex mutex_;
  std::vector<char*> free_;
};

// The saved state of a thread that will begin in `entry` on a fresh stack.
inline void* begin_on(char* stack, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{15};
#if defined(__x86_64__)
  auto slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // where a call would have left its return address
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;  // rbp rbx r12 r13 r14 r15
  return slot;
#elif defined(__aarch64__)
  constexpr int kSlots = 20;   // x19..x30, d8..d15
  constexpr int kReturn = 11;  // x30
  auto slot = reinterpret_cast<void**>(top) - kSlots;
  for (int i = 0; i < kSlots; ++i) slot[i] = nullptr;
  slot[kReturn] = reinterpret_cast<void*>(entry);
  return slot;
#else
#error "the emulator needs a switch of stacks for this processor: see switch.cpp"
#endif
}

}  // namespace simt
