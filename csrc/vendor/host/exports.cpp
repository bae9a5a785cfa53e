// SPDX-License-Identifier: Apache-2.0
// The emulator's own exports: its options, and what tests ask of it.
#include <cstring>
#include <mutex>
#include <string>

#include "kh_vendor.h"

namespace {
constexpr double kLongestTimeout = 1e6;  // s; the clocks take no more than they can count
}

// Sets the options of the launches to come: the order of threads and blocks ("forward", "reverse"
// or "random"), the seed of the random one, how many OS threads run blocks (0: one a core), and
// after how many seconds a kernel counts as hanging (0: never). Returns 0; or 1 for options that
// make no sense, with the reason in kh_simt_error(), and changes nothing.
KH_EXPORT int kh_simt_configure(const char* order, uint64_t seed, int threads, double timeout_s) {
  const char* const names[] = {"forward", "reverse", "random"};
  const simt::Order::Kind kinds[] = {simt::Order::kForward, simt::Order::kReverse,
                                     simt::Order::kRandom};
  simt::Options options;
  bool known = false;
  for (int i = 0; i < 3; ++i)
    if (order != nullptr && strcmp(order, names[i]) == 0) {
      options.order = {kinds[i], seed};
      known = true;
    }
  if (!known)
    return simt::fail_launch("order '" + std::string(order ? order : "") +
                             "'; forward, reverse and random are possible");
  if (threads < 0 || threads > simt::kMaxOsThreads)
    return simt::fail_launch(std::to_string(threads) + " OS threads; 0 to " +
                             std::to_string(simt::kMaxOsThreads) + " are possible");
  if (!(timeout_s >= 0 && timeout_s <= kLongestTimeout))
    return simt::fail_launch("a timeout of " + std::to_string(timeout_s) +
                             " s; 0 to 1000000 are possible");
  options.threads = threads;
  options.timeout_s = timeout_s;
  std::lock_guard<std::mutex> lock(simt::shared().mutex);
  simt::shared().options = options;
  return 0;
}

// Why the calling thread's latest configuration or launch that failed did so.
KH_EXPORT const char* kh_simt_error(void) { return simt::os_thread.error; }

// The latest launch, and how many there were.
KH_EXPORT void kh_simt_last_launch(simt::LastLaunch* out) {
  std::lock_guard<std::mutex> lock(simt::shared().mutex);
  *out = simt::shared().last;
}
