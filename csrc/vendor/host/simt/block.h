// SPDX-License-Identifier: Apache-2.0
// One block of a kernel: its threads as fibers of one OS thread, the block's barrier, and the
// collectives of its warps. Threads run one at a time until they wait or end; when none can run,
// the block is in a deadlock, and where each thread waits is known.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sanitizers.h"
#include "switch.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#ifndef KH_SIMT_WARP_SIZE
#define KH_SIMT_WARP_SIZE 32
#endif

namespace simt {

constexpr int kWarp = KH_SIMT_WARP_SIZE;
static_assert(kWarp == 32 || kWarp == 128, "warps of 32 and of 128 lanes exist");

#if KH_SIMT_WARP_SIZE == 32
using Lanes = uint32_t;  // one bit a lane
#else
using Lanes = unsigned __int128;
#endif
constexpr Lanes lane_bit(int lane) { return Lanes{1} << lane; }
constexpr Lanes kAllLanes = ~Lanes{0};
// Masks have 32 bits in every kernel; all of them set means the whole warp, whatever its width.
constexpr Lanes lanes_of(unsigned mask) { return mask == 0xffffffffu ? kAllLanes : Lanes{mask}; }

// A place in a kernel's source.
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

// A pending exchange among lanes of one warp.
struct Collective {
  Lanes expected = 0, arrived = 0;
  int readers = 0;
  At at;
  alignas(16) unsigned char values[kWarp][16];
};

enum class State : uint8_t { kNew, kReady, kWaiting, kDone };

struct Thread {
  State state = State::kNew;
  uint3 index{};
  int number = 0, lane = 0, warp = 0;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  At waits_at;                       // `what` is null while it runs
  Collective* collective = nullptr;  // null while it waits at the barrier
  Watched watched;
};

// What all blocks of a launch share.
struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  std::function<void()> body;
  std::vector<int> order;            // in which threads get their turn
  std::atomic<bool> expired{false};  // set by the watchdog
  double timeout_s = 0;
};

class Block;
#ifdef KH_SIMT_SERIAL
inline Block* running_block = nullptr;
inline Thread* running_thread = nullptr;
#else
inline thread_local __attribute__((tls_model("initial-exec"))) Block* running_block = nullptr;
inline thread_local __attribute__((tls_model("initial-exec"))) Thread* running_thread = nullptr;
#endif

class Block {
 public:
  explicit Block(Launch* launch)
      : launch_(launch), count_(int(launch->block.x * launch->block.y * launch->block.z)) {
    const dim3& b = launch->block;
    threads_.resize(count_);
    for (int i = 0; i < count_; ++i) {
      Thread& t = threads_[i];
      t.number = i;
      t.lane = i % kWarp;
      t.warp = i / kWarp;
      t.index = {i % b.x, i / b.x % b.y, i / b.x / b.y};
    }
    watch_scheduler(&scheduler_watched_);
    if (launch->shared_bytes > 0)
      // Of exact size: AddressSanitizer sees the first byte past it.
      shared_.reset(static_cast<unsigned char*>(
          ::operator new (launch->shared_bytes, std::align_val_t{128})));
  }

  ~Block() {
    for (Thread& t : threads_) {
      unwatch(&t.watched);
      if (t.stack) idle_stacks_.push_back(t.stack);
    }
    Stacks::pool().take_back(idle_stacks_);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs the block of that number. Returns what went wrong, or nothing.
  std::string run(unsigned long long number) {
    const dim3& g = launch_->grid;
    index = {unsigned(number % g.x), unsigned(number / g.x % g.y), unsigned(number / g.x / g.y)};
    reset();
    release_order(&begins_);
    while (done_ < count_) {
      bool progress = false;
      for (int i : launch_->order) {
        Thread& t = threads_[i];
        if (t.state != State::kNew && t.state != State::kReady) continue;
        resume(t);
        progress = true;
        if (error_.empty() && t.state == State::kDone) retire(t);
        if (!error_.empty()) break;
      }
      if (error_.empty() && !progress) error_ = "deadlock" + waiting_threads();
      if (!error_.empty()) break;
    }
    acquire_order(&ends_);
    return error_.empty() ? error_ : where() + error_;
  }

  // Called by a thread: waits for all threads of the block; returns the sum of what they add.
  int barrier(At at, int addend = 0) {
    Quiet quiet;
    check_time(at);
    if (barrier_waiting_ == 0) {
      barrier_at_ = at;
    } else if (!(barrier_at_ == at)) {
      fail("barrier divergence: " + at.text() + " while others wait at " + barrier_at_.text());
    }
    if (done_ > 0)
      fail(at.text() + " reached after " + std::to_string(done_) +
           " thread(s) of the block had exited");
    const void* order = &barrier_order_[barriers_ & 1];
    release_order(order);
    barrier_sum_ += addend;
    if (++barrier_waiting_ == count_) {
      open_barrier();
    } else {
      wait(at, nullptr);
    }
    acquire_order(order);
    return last_barrier_sum_;
  }

  // Called by a thread: meets the lanes of `mask` and leaves a value; `finish` must follow.
  Collective* meet(Lanes mask, const void* value, size_t bytes, At at) {
    Quiet quiet;
    check_time(at);
    Thread* self = running_thread;
    if (!(mask & lane_bit(self->lane))) fail(at.text() + ": calling lane is not in its own mask");
    const Lanes expected = mask & existing_lanes(self->warp);
    if (exited_[self->warp] & expected) fail(at.text() + ": a lane named in the mask has exited");
    Collective* c = pending(self, expected);
    if (c == nullptr) {
      c = begin_collective(self->warp, expected, at);
    } else if (c->expected != expected) {
      fail(at.text() + ": mask differs from that of lanes that wait at " + c->at.text());
    } else if (!(c->at == at)) {
      fail("warp divergence: " + at.text() + " while lanes wait at " + c->at.text());
    }
    memcpy(c->values[self->lane], value, bytes);
    c->arrived |= lane_bit(self->lane);
    ++c->readers;
    release_order(c);
    if (c->arrived == c->expected) {
      complete(c, self->warp);
    } else {
      wait(at, c);
    }
    acquire_order(c);
    return c;
  }

  // Called by a thread that met others, after it has read what it wants.
  void finish(Collective* c) {
    Quiet quiet;
    if (--c->readers == 0) idle_collectives_.push_back(c);
  }

  // Called by a thread, in a quiet stretch: gives up the whole block.
  [[noreturn]] void fail(const std::string& message) {
    error_ = "thread " + std::to_string(running_thread->number) + ": " + message;
    running_thread->state = State::kWaiting;
    Loud loud;
    release_order(&ends_);
    to_scheduler(false);
    __builtin_unreachable();
  }

  // Called by a thread wherever it may spin.
  void may_spin(At at) {
    Quiet quiet;
    check_time(at);
  }

  bool has_lane(int warp, int lane) const { return warp * kWarp + lane < count_; }
  unsigned char* shared() const { return shared_.get(); }
  const Launch& launch() const { return *launch_; }

  uint3 index{};

 private:
  void check_time(At at) {
    if (launch_->expired.load(std::memory_order_relaxed))
      fail("still running after " + std::to_string(launch_->timeout_s) + " s, at " + at.text());
  }
  struct FreeShared {
    void operator()(unsigned char* p) const { ::operator delete (p, std::align_val_t{128}); }
  };

  // ---- scheduling ----

  void reset() {
    const int warps = (count_ + kWarp - 1) / kWarp;
    barrier_waiting_ = barrier_sum_ = done_ = 0;
    error_.clear();
    active_.assign(warps, {});
    exited_.assign(warps, 0);
    for (Thread& t : threads_) {
      t.state = State::kNew;
      t.collective = nullptr;
      t.waits_at = {};
    }
    // NaN in every floating type: what a kernel reads without having written it shows.
    if (shared_) memset(shared_.get(), 0xff, launch_->shared_bytes);
  }

  void resume(Thread& t) {
    Quiet quiet;
    if (t.state == State::kNew) {
      if (t.stack == nullptr) {
        if (idle_stacks_.empty()) idle_stacks_.push_back(Stacks::pool().lend());
        t.stack = idle_stacks_.back();
        idle_stacks_.pop_back();
      }
      t.stack_pointer = begin_on(t.stack, &enter);
      watch_new_stack(&t.watched, t.stack, kStackBytes);
    }
    t.state = State::kReady;
    Block* outer = running_block;
    running_block = this;
    running_thread = &t;
    before_switch(&scheduler_watched_, t.watched, false);
    kh_simt_switch(&scheduler_stack_pointer_, t.stack_pointer);
    after_switch(&scheduler_watched_, nullptr);
    running_thread = nullptr;
    running_block = outer;
    if (t.state == State::kDone && kStacksChangeHands) {
      idle_stacks_.push_back(t.stack);
      t.stack = nullptr;
    }
  }

  static void enter() {
    after_switch(&running_thread->watched, &running_block->scheduler_watched_);
    acquire_order(&running_block->begins_);
    running_block->launch_->body();
    release_order(&running_block->ends_);
    ignore_accesses();
    running_thread->state = State::kDone;
    watch_accesses();
    running_block->to_scheduler(true);
    __builtin_unreachable();
  }

  SIMT_UNWATCHED void to_scheduler(bool for_good) {
    Thread* self = running_thread;
    before_switch(&self->watched, scheduler_watched_, for_good);
    kh_simt_switch(&self->stack_pointer, scheduler_stack_pointer_);
    after_switch(&running_thread->watched, nullptr);
  }

  void wait(At at, Collective* c) {
    Thread* self = running_thread;
    self->state = State::kWaiting;
    self->waits_at = at;
    self->collective = c;
    {
      Loud loud;
      release_order(&ends_);  // it may never run again
      to_scheduler(false);
    }
    self->waits_at = {};
  }

  void retire(Thread& t) {
    ++done_;
    exited_[t.warp] |= lane_bit(t.lane);
    if (barrier_waiting_ > 0)
      error_ = "thread " + std::to_string(t.number) + " exited while " +
               std::to_string(barrier_waiting_) + " thread(s) wait at " + barrier_at_.text() +
               waiting_threads();
  }

  void open_barrier() {
    barrier_waiting_ = 0;
    last_barrier_sum_ = barrier_sum_;
    barrier_sum_ = 0;
    ++barriers_;
    for (Thread& t : threads_)
      if (t.state == State::kWaiting && t.collective == nullptr) t.state = State::kReady;
  }

  // ---- collectives ----

  Lanes existing_lanes(int warp) const {
    const int lanes = count_ - warp * kWarp;
    return lanes >= kWarp ? kAllLanes : lane_bit(lanes) - 1;
  }

  Collective* pending(const Thread* self, Lanes expected) {
    for (Collective* c : active_[self->warp])
      if ((c->expected & lane_bit(self->lane)) || c->expected == expected) return c;
    return nullptr;
  }

  Collective* begin_collective(int warp, Lanes expected, At at) {
    if (idle_collectives_.empty()) {
      all_collectives_.push_back(std::make_unique<Collective>());
      idle_collectives_.push_back(all_collectives_.back().get());
    }
    Collective* c = idle_collectives_.back();
    idle_collectives_.pop_back();
    c->expected = expected;
    c->arrived = 0;
    c->readers = 0;
    c->at = at;
    active_[warp].push_back(c);
    return c;
  }

  void complete(Collective* c, int warp) {
    auto& active = active_[warp];
    for (size_t i = 0; i < active.size(); ++i)
      if (active[i] == c) {
        active[i] = active.back();
        active.pop_back();
        break;
      }
    for (int i = warp * kWarp; i < count_ && i < (warp + 1) * kWarp; ++i) {
      Thread& t = threads_[i];
      if (t.state == State::kWaiting && t.collective == c) {
        t.collective = nullptr;
        t.state = State::kReady;
      }
    }
  }

  // ---- reports ----

  std::string where() const {
    return "block (" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
           std::to_string(index.z) + "): ";
  }

  // Threads by where they are, a line each.
  std::string waiting_threads() const {
    std::vector<std::pair<std::string, std::vector<int>>> groups;
    for (const Thread& t : threads_) {
      std::string state = t.state == State::kDone  ? "exited"
                          : t.state == State::kNew ? "not started"
                          : t.waits_at.what        ? "waiting at " + t.waits_at.text()
                                                   : "running";
      size_t i = 0;
      while (i < groups.size() && groups[i].first != state) ++i;
      if (i == groups.size()) groups.push_back({state, {}});
      groups[i].second.push_back(t.number);
    }
    std::string text;
    for (auto& [state, numbers] : groups) {
      text += "\n  " + std::to_string(numbers.size()) + " thread(s) " + state + ", such as";
      for (size_t i = 0; i < numbers.size() && i < 4; ++i) text += " " + std::to_string(numbers[i]);
    }
    return text;
  }

  Launch* launch_;
  int count_;
  std::vector<Thread> threads_;
  std::vector<char*> idle_stacks_;
  std::unique_ptr<unsigned char, FreeShared> shared_;
  void* scheduler_stack_pointer_ = nullptr;
  Watched scheduler_watched_;
  int done_ = 0;
  std::string error_;

  int barrier_waiting_ = 0, barrier_sum_ = 0, last_barrier_sum_ = 0;
  unsigned barriers_ = 0;
  At barrier_at_;

  std::vector<std::vector<Collective*>> active_;  // by warp
  std::vector<Lanes> exited_;                     // by warp
  std::vector<std::unique_ptr<Collective>> all_collectives_;
  std::vector<Collective*> idle_collectives_;

  // Addresses that stand for orders of events.
  char begins_ = 0, ends_ = 0, barrier_order_[2] = {};
};

}  // namespace simt
