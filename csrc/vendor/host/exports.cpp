// SPDX-License-Identifier: Apache-2.0
// The emulator's own exports: its options, and what tests ask of it.
#include <cmath>
#include <cstring>

#include "kh_vendor.h"

// Options of the launches to come. Returns 0, or 1 for options that make no sense.
KH_EXPORT int kh_simt_configure(const char* order, uint64_t seed, int threads, double timeout_s) {
  simt::Options options;
  if (strcmp(order, "forward") == 0) {
    options.order = simt::Options::kForward;
  } else if (strcmp(order, "reverse") == 0) {
    options.order = simt::Options::kReverse;
  } else if (strcmp(order, "random") == 0) {
    options.order = simt::Options::kRandom;
  } else {
    return 1;
  }
  if (threads < 0 || !(timeout_s >= 0) || std::isinf(timeout_s)) return 1;
  options.seed = seed;
  options.threads = threads;
  options.timeout_s = timeout_s;
  std::lock_guard<std::mutex> lock(simt::shared().mutex);
  simt::shared().options = options;
  return 0;
}

// The latest launch, and how many there were.
KH_EXPORT void kh_simt_last_launch(simt::LastLaunch* out) {
  std::lock_guard<std::mutex> lock(simt::shared().mutex);
  *out = simt::shared().last;
}
