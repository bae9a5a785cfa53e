// SPDX-License-Identifier: Apache-2.0
// Barriers, shuffles and votes by the names that kernels use. Of what a warp does together only
// __syncwarp orders memory: hardware promises no more.
#pragma once
#include <cstring>
#include <string>
#include <type_traits>

#include "block.h"

inline void __syncthreads(SIMT_PLACE) { simt::self()->block->barrier(SIMT_HERE("__syncthreads")); }
inline int __syncthreads_count(int predicate, SIMT_PLACE) {
  return simt::self()->block->barrier(SIMT_HERE("__syncthreads_count"), predicate != 0);
}
inline int __syncthreads_or(int predicate, SIMT_PLACE) {
  return simt::self()->block->barrier(SIMT_HERE("__syncthreads_or"), predicate != 0) > 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_PLACE) {
  simt::Thread* thread = simt::self();
  const simt::Lanes lanes = simt::lanes_of(mask, thread->lane);
  thread->block->finish(thread->block->meet(lanes, "", 1, SIMT_HERE("__syncwarp"), true));
}

namespace simt {

// The value that lane `source` brought.
template <class T>
T exchange(unsigned mask, T value, int source, At at) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles take numbers of 4 or 8 bytes");
  Block* block = self()->block;
  Collective* c = block->meet(lanes_of(mask, self()->lane), &value, sizeof(T), at);
  {
    Quiet quiet;
    if (!block->has_lane(self()->warp, source))
      block->fail(at.text() + ": reads lane " + std::to_string(source) +
                  " which is past the end of the block");
    if (!(c->arrived & lane_bit(source)))
      block->fail(at.text() + ": reads lane " + std::to_string(source) +
                  " which is not in the mask");
    memcpy(&value, c->values[source], sizeof(T));
  }
  block->finish(c);
  return value;
}

// The lanes of the mask that voted for.
inline Lanes vote(unsigned mask, bool predicate, At at) {
  Block* block = self()->block;
  Collective* c = block->meet(lanes_of(mask, self()->lane), &predicate, 1, at);
  Lanes votes = 0;
  {
    Quiet quiet;
    for (int lane = 0; lane < kWarp; ++lane)
      if ((c->arrived & lane_bit(lane)) && c->values[lane][0]) votes |= lane_bit(lane);
  }
  block->finish(c);
  return votes;
}

// The first lane of the caller's group of `width`. Wider shuffles than 32 are right on no part.
inline int group_of(int width, At at) {
  if (width < 1 || width > kGroup || (width & (width - 1)) != 0) {
    Quiet quiet;
    self()->block->fail(at.text() + ": width " + std::to_string(width) +
                        "; powers of two up to 32 are possible");
  }
  return self()->lane / width * width;
}

}  // namespace simt

// No default width: a warp may have 128 lanes, and only groups of up to 32 may shuffle.
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width, SIMT_PLACE) {
  const simt::At at = SIMT_HERE("__shfl_sync");
  const int first = simt::group_of(width, at);
  return simt::exchange(mask, v, first + (source & (width - 1)), at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width, SIMT_PLACE) {
  const simt::At at = SIMT_HERE("__shfl_xor_sync");
  const int end = simt::group_of(width, at) + width, lane = simt::self()->lane;
  return simt::exchange(mask, v, (lane ^ lanes) < end ? lane ^ lanes : lane, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width, SIMT_PLACE) {
  const simt::At at = SIMT_HERE("__shfl_up_sync");
  const int first = simt::group_of(width, at), lane = simt::self()->lane;
  return simt::exchange(mask, v, int(by) <= lane - first ? lane - int(by) : lane, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width, SIMT_PLACE) {
  const simt::At at = SIMT_HERE("__shfl_down_sync");
  const int end = simt::group_of(width, at) + width, lane = simt::self()->lane;
  return simt::exchange(mask, v, int(by) < end - lane ? lane + int(by) : lane, at);
}

inline int __any_sync(unsigned mask, int predicate, SIMT_PLACE) {
  return simt::vote(mask, predicate != 0, SIMT_HERE("__any_sync")) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_PLACE) {
  return simt::vote(mask, predicate == 0, SIMT_HERE("__all_sync")) == 0;
}
// The votes of the caller's group of 32.
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_PLACE) {
  const int first = simt::self()->lane / simt::kGroup * simt::kGroup;
  return unsigned(simt::vote(mask, predicate != 0, SIMT_HERE("__ballot_sync")) >> first);
}
