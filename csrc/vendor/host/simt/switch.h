// SPDX-License-Identifier: Apache-2.0
// The switch between stacks. ucontext takes a microsecond a round trip, which a kernel of a
// thousand threads and a few barriers cannot afford; fifteen instructions do the same.
#pragma once
#include <cstddef>
#include <cstdint>

// In switch.cpp: saves the callee's registers on this stack, its address in *save, and goes on from
// the stack `to`.
extern "C" __attribute__((visibility("hidden"))) void kh_simt_switch(void** save, void* to);

namespace simt {

// The saved state of a thread that will begin in `entry` on a fresh stack that ends at `end`.
inline void* begin_on(char* end, void (*entry)()) {
  auto slot = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(end) & ~uintptr_t{15});
#if defined(__x86_64__)
  *--slot = nullptr;  // where a call would have left its return address
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;  // rbp rbx r12 r13 r14 r15
#elif defined(__aarch64__)
  constexpr int kSlots = 20;   // x19..x30, d8..d15
  constexpr int kReturn = 11;  // x30
  slot -= kSlots;
  for (int i = 0; i < kSlots; ++i) slot[i] = nullptr;
  slot[kReturn] = reinterpret_cast<void*>(entry);
#else
#error "the emulator needs a switch of stacks for this processor: see switch.cpp"
#endif
  return slot;
}

}  // namespace simt
