// SPDX-License-Identifier: Apache-2.0
// Atomics and fences by the names that kernels use. A thread that spins on them is ended when the
// launch's time is up. Atomics are relaxed, as on a GPU: they order nothing but themselves.
#pragma once
#include <atomic>

#include "block.h"

namespace simt {

template <class T, class F>
T read_modify_write(T* p, F f, At at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics take values of 4 or 8 bytes");
  self()->block->check_time(at);
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    next = f(old);
  } while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

inline void fence(At at) {
  self()->block->check_time(at);
  if (kRaceChecked) {
    self()->block->fence();  // which the race checker knows nothing of by itself
  } else {
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    __sync_synchronize();
  }
}

template <class T>
struct Value {
  using type = T;
};

}  // namespace simt

// The value's type follows from the pointer's, as with overloads.
#define SIMT_ATOMIC(NAME, EXPRESSION)                                            \
  template <class T>                                                             \
  T NAME(T* p, typename simt::Value<T>::type v, SIMT_PLACE) {                    \
    return simt::read_modify_write(                                              \
        p, [=](T old) { return static_cast<T>(EXPRESSION); }, SIMT_HERE(#NAME)); \
  }
SIMT_ATOMIC(atomicAdd, old + v)
SIMT_ATOMIC(atomicMax, old < v ? v : old)
SIMT_ATOMIC(atomicMin, v < old ? v : old)
SIMT_ATOMIC(atomicOr, old | v)
SIMT_ATOMIC(atomicExch, ((void)old, v))
template <class T>
T atomicCAS(T* p, typename simt::Value<T>::type expected, typename simt::Value<T>::type v,
            SIMT_PLACE) {
  return simt::read_modify_write(
      p, [=](T old) { return old == expected ? v : old; }, SIMT_HERE("atomicCAS"));
}

inline void __threadfence(SIMT_PLACE) { simt::fence(SIMT_HERE("__threadfence")); }
inline void __threadfence_block(SIMT_PLACE) { simt::fence(SIMT_HERE("__threadfence_block")); }
