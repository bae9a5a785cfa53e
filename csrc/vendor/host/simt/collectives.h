// SPDX-License-Identifier: Apache-2.0
// Where lanes of a warp meet. One collective belongs to one warp and one mask for as long as the
// block lives: what orders the lanes that share it orders no others.
#pragma once
#include <memory>
#include <vector>

#include "fiber.h"

namespace simt {

struct Collective {
  Lanes expected = 0, arrived = 0;
  bool pending = false;  // some arrived, some are missing
  int readers = 0;       // arrived and have not read yet
  At at;
  alignas(16) unsigned char values[kWarp][16];
};

// The collectives of one warp.
class Collectives {
 public:
  // The one where lanes of just this mask wait, or null.
  Collective* pending(Lanes expected) const {
    for (const auto& c : all_)
      if (c->pending && c->expected == expected) return c.get();
    return nullptr;
  }

  Collective* begin(Lanes expected, At at) {
    Collective* c = idle(expected);
    c->expected = expected;
    c->arrived = 0;
    c->pending = true;
    c->at = at;
    return c;
  }

 private:
  Collective* idle(Lanes expected) {
    for (const auto& c : all_)
      if (!c->pending && c->readers == 0 && c->expected == expected) return c.get();
    all_.push_back(std::make_unique<Collective>());
    return all_.back().get();
  }

  std::vector<std::unique_ptr<Collective>> all_;
};

}  // namespace simt
