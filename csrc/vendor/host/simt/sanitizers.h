// SPDX-License-Identifier: Apache-2.0
// What AddressSanitizer and ThreadSanitizer must be told of stacks that change and of threads that
// are none of the system's. Without a sanitizer all of it is empty.
//
// To ThreadSanitizer each GPU thread is a thread of its own, and only what orders GPU threads
// orders these: the block's barrier, a warp's collectives, fences, the end of a launch. A missing
// barrier is then a race at its source line. The emulator's bookkeeping is hidden (`Quiet`).
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateHappensBefore(const char*, int, const volatile void*);
void AnnotateHappensAfter(const char*, int, const volatile void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define SIMT_UNWATCHED __attribute__((no_sanitize("thread")))
#else
#define SIMT_UNWATCHED
#endif

namespace simt {

#if defined(__SANITIZE_THREAD__)
constexpr bool kRaceChecked = true;
inline void release_order(const void* at) { AnnotateHappensBefore(__FILE__, __LINE__, at); }
inline void acquire_order(const void* at) { AnnotateHappensAfter(__FILE__, __LINE__, at); }
inline void ignore_accesses() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
inline void watch_accesses() {
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
}
#else
constexpr bool kRaceChecked = false;
inline void release_order(const void*) {}
inline void acquire_order(const void*) {}
inline void ignore_accesses() {}
inline void watch_accesses() {}
#endif

// The emulator's own accesses, which are no business of the race checker.
struct Quiet {
  Quiet() { ignore_accesses(); }
  ~Quiet() { watch_accesses(); }
};
// Around a switch away from a quiet stretch: the state belongs to each thread.
struct Loud {
  Loud() { watch_accesses(); }
  ~Loud() { ignore_accesses(); }
};

// The sanitizers' view of one stack: of a GPU thread, or of the scheduler.
struct Watched {
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* tsan_fiber = nullptr;
};

SIMT_UNWATCHED inline void before_switch(Watched* from, const Watched& to, bool for_good) {
  (void)from, (void)to, (void)for_good;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from->fake_stack, to.bottom, to.bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
}

// `from`, where given, learns the bounds of the stack that was left.
SIMT_UNWATCHED inline void after_switch(Watched* now, Watched* from) {
  (void)now, (void)from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(now->fake_stack, from ? &from->bottom : nullptr,
                                  from ? &from->bytes : nullptr);
#endif
}

inline void watch_new_stack(Watched* stack, char* memory, size_t bytes) {
  stack->fake_stack = nullptr;
  stack->bottom = memory;
  stack->bytes = bytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, bytes);  // frames of an earlier thread that never returned
#endif
#if defined(__SANITIZE_THREAD__)
  if (stack->tsan_fiber == nullptr) stack->tsan_fiber = __tsan_create_fiber(0);
#endif
}

inline void watch_scheduler(Watched* stack) {
  (void)stack;
#if defined(__SANITIZE_THREAD__)
  stack->tsan_fiber = __tsan_get_current_fiber();
#endif
}

inline void unwatch(Watched* stack) {
  (void)stack;
#if defined(__SANITIZE_ADDRESS__)
  if (stack->bottom) __asan_unpoison_memory_region(stack->bottom, stack->bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  if (stack->tsan_fiber) __tsan_destroy_fiber(stack->tsan_fiber);
  stack->tsan_fiber = nullptr;
#endif
}

}  // namespace simt
