// SPDX-License-Identifier: Apache-2.0
// In which order the threads of a block get their turn, and the blocks of a grid theirs. Hardware
// promises none, so a kernel must give the same results in all of them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

namespace simt {

struct Order {
  enum Kind { kForward, kReverse, kRandom } kind = kForward;
  uint64_t seed = 0;

  // The threads of that block, by whose turn it is; the same again and again while it runs.
  std::vector<int> of_threads(int count, uint64_t block) const {
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (kind == kReverse) std::reverse(order.begin(), order.end());
    if (kind == kRandom)
      std::shuffle(order.begin(), order.end(), std::mt19937_64(seed + block * kOdd));
    return order;
  }

  // The block that comes in place `turn` of `count`.
  uint64_t block(uint64_t turn, uint64_t count) const {
    if (kind == kReverse) return count - 1 - turn;
    if (kind != kRandom) return turn;
    // A multiplier without a common factor with `count` visits every block once.
    uint64_t step = (seed * kOdd >> 40) % count + 1;
    while (std::gcd(step, count) != 1) ++step;
    using Wide = unsigned __int128;
    return uint64_t((Wide{step} * turn + seed % count) % count);
  }

 private:
  static constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;  // spreads neighbouring seeds
};

}  // namespace simt
