// SPDX-License-Identifier: Apache-2.0
// What the parts of the emulator talk about: sizes, lanes of a warp, places in a kernel's source.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>

#ifndef KH_SIMT_WARP_SIZE
#define KH_SIMT_WARP_SIZE 32
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr int kWarp = KH_SIMT_WARP_SIZE;
static_assert(kWarp == 32 || kWarp == 128, "warps of 32 and of 128 lanes exist");
constexpr int kGroup = 32;  // lanes that a mask counts and a shuffle reaches, whatever the warp

#if KH_SIMT_WARP_SIZE == 32
using Lanes = uint32_t;  // one bit a lane of a warp
#else
using Lanes = unsigned __int128;
#endif
constexpr Lanes lane_bit(int lane) { return Lanes{1} << lane; }
constexpr Lanes kAllLanes = ~Lanes{0};

// The lanes of a warp that a mask names when `lane` passes it. All bits set is the whole warp;
// any other mask counts the lanes of the caller's own group of 32.
constexpr Lanes lanes_of(unsigned mask, int lane) {
  return mask == 0xffffffffu ? kAllLanes : Lanes{mask} << (lane / kGroup * kGroup);
}

// A place in a kernel's source, and what is called there.
struct At {
  const char* what = nullptr;
  const char* file = nullptr;
  int line = 0;

  bool operator==(const At& o) const {
    return line == o.line && strcmp(what, o.what) == 0 && strcmp(file, o.file) == 0;
  }
  std::string text() const {
    const char* base = strrchr(file, '/');
    return std::string(what) + " (" + (base ? base + 1 : file) + ":" + std::to_string(line) + ")";
  }
};

// The place of a call, as default arguments of whatever a kernel calls.
#define SIMT_PLACE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define SIMT_HERE(name) (::simt::At{name, file_, line_})

}  // namespace simt
