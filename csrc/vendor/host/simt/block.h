// SPDX-License-Identifier: Apache-2.0
// One block of a kernel: its threads as fibers of one OS thread, the block's barrier, and the
// collectives of its warps. Threads run one at a time until they wait or end; when none can run,
// the block is in a deadlock, and where each thread waits is known.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "collectives.h"
#include "fiber.h"
#include "order.h"
#include "static_shared.h"

namespace simt {

// What all blocks of a launch share.
struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  std::function<void()> body;
  Order order;
  double timeout_s = 0;
  std::atomic<bool> expired{false};  // set by the watchdog

  // Addresses that stand for orders of events.
  char ends = 0, fences = 0;

  std::string overdue() const {
    char text[64];
    snprintf(text, sizeof text, "still running after %g s", timeout_s);
    return text;
  }
};

class Block {
 public:
  explicit Block(Launch* launch)
      : launch_(launch), count_(int(launch->block.x * launch->block.y * launch->block.z)) {
    const dim3& b = launch->block;
    threads_.resize(count_);
    for (int i = 0; i < count_; ++i) {
      Thread& t = threads_[i];
      t.block = this;
      t.number = i;
      t.lane = i % kWarp;
      t.warp = i / kWarp;
      t.index = {i % b.x, i / b.x % b.y, i / b.x / b.y};
    }
    const int warps = (count_ + kWarp - 1) / kWarp;
    collectives_.resize(warps);
    exited_.resize(warps);
    watch_scheduler(&scheduler_watched_);
    os_thread.runs_blocks = true;
  }

  ~Block() {
    for (Thread& t : threads_) {
      unwatch(&t.watched);
      if (t.stack) idle_stacks_.push_back(t.stack);
    }
    stacks().take_back(idle_stacks_);
    os_thread.runs_blocks = false;
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Called in a quiet stretch, as the constructor and the destructor are: runs the block of that
  // number. Returns what went wrong, after which this object is of no more use, or nothing.
  std::string run(unsigned long long number) {
    const dim3& g = launch_->grid;
    index = {unsigned(number % g.x), unsigned(number / g.x % g.y), unsigned(number / g.x / g.y)};
    reset();
    const std::vector<int> order = launch_->order.of_threads(count_, number);
    while (done_ < count_) {
      bool progress = false;
      for (int i : order) {
        Thread& t = threads_[i];
        if (t.state != State::kNew && t.state != State::kReady) continue;
        resume(t);
        progress = true;
        if (error_.empty() && t.state == State::kDone) retire(t);
        if (!error_.empty()) return where() + error_;
      }
      if (!progress) return where() + "deadlock" + waiting_threads();
    }
    return {};
  }

  // Called by a thread: waits for all threads of the block; returns the sum of what they add.
  int barrier(At at, int addend = 0) {
    check_time(at);
    Quiet quiet;
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

  // Called by a thread: meets `lanes` of its warp and leaves a value; `finish` must follow.
  Collective* meet(Lanes lanes, const void* value, size_t bytes, At at,
                   bool orders_memory = false) {
    check_time(at);
    Quiet quiet;
    Thread* thread = self();
    if (!(lanes & lane_bit(thread->lane)))
      fail(at.text() + ": calling lane is not in its own mask");
    const Lanes expected = lanes & existing_lanes(thread->warp);
    if (exited_[thread->warp] & expected) fail(at.text() + ": a lane named in the mask has exited");
    Collective* c = collectives_[thread->warp].pending(expected);
    if (c == nullptr) {
      c = collectives_[thread->warp].begin(expected, at);
    } else if (!(c->at == at)) {
      fail("warp divergence: " + at.text() + " while lanes wait at " + c->at.text());
    }
    memcpy(c->values[thread->lane], value, bytes);
    c->arrived |= lane_bit(thread->lane);
    ++c->readers;
    if (orders_memory) release_order(c);
    if (c->arrived == c->expected) {
      complete(c, thread->warp);
    } else {
      wait(at, c);
    }
    if (orders_memory) acquire_order(c);
    return c;
  }

  // Called by a thread that met others, after it has read what it wants.
  void finish(Collective* c) {
    Quiet quiet;
    --c->readers;
  }

  // Called by a thread in a fence: what it did before comes before what others do after theirs.
  void fence() {
    release_order(&launch_->fences);
    acquire_order(&launch_->fences);
  }

  // Called by a thread wherever it may spin.
  void check_time(At at) {
    if (!launch_->expired.load(std::memory_order_relaxed)) return;
    Quiet quiet;
    fail(launch_->overdue() + ", at " + at.text());
  }

  // Called by a thread in a quiet stretch: gives up the whole block.
  [[noreturn]] void fail(const std::string& message) {
    error_ = "thread " + std::to_string(self()->number) + ": " + message;
    self()->state = State::kWaiting;
    Loud loud;
    release_order(&launch_->ends);
    to_scheduler(false);
    __builtin_unreachable();
  }

  bool has_lane(int warp, int lane) const { return warp * kWarp + lane < count_; }
  unsigned char* shared() const { return shared_.get(); }
  const Launch& launch() const { return *launch_; }

  uint3 index{};

 private:
  struct FreeShared {
    void operator()(unsigned char* p) const { ::operator delete (p, std::align_val_t{128}); }
  };

  // ---- scheduling ----

  void reset() {
    barrier_waiting_ = barrier_sum_ = done_ = 0;
    error_.clear();
    for (Lanes& exited : exited_) exited = 0;
    for (Thread& t : threads_) {
      t.state = State::kNew;
      t.collective = nullptr;
      t.waits_at = {};
    }
    static_shared_.undefine();
    if (launch_->shared_bytes > 0) {
      // Of exact size, for AddressSanitizer to see the first byte past it.
      shared_.reset();
      shared_.reset(static_cast<unsigned char*>(
          ::operator new (launch_->shared_bytes, std::align_val_t{128})));
      memset(shared_.get(), kUndefined, launch_->shared_bytes);
    }
  }

  void resume(Thread& t) {
    if (t.state == State::kNew) {
      if (t.stack == nullptr) {
        if (idle_stacks_.empty()) idle_stacks_.push_back(stacks().lend());
        t.stack = idle_stacks_.back();
        idle_stacks_.pop_back();
      }
      Thread* const owner = &t;
      memcpy(top_of(t.stack), &owner, sizeof owner);
      t.stack_pointer = begin_on(top_of(t.stack), &enter);
      watch_new_stack(&t.watched, t.stack, kStackBytes);
    }
    t.state = State::kReady;
    before_switch(&scheduler_watched_, t.watched, false);
    kh_simt_switch(&scheduler_stack_pointer_, t.stack_pointer);
    after_switch(&scheduler_watched_, nullptr);
    if (t.state == State::kDone && !kRaceChecked) {
      idle_stacks_.push_back(t.stack);
      t.stack = nullptr;
    }
  }

  static void enter() {
    Block* block = self()->block;
    after_switch(&self()->watched, &block->scheduler_watched_);
    block->live();
    block->to_scheduler(true);
    __builtin_unreachable();
  }

  void live() {
    std::string wrong;
    try {
      launch_->body();
    } catch (const std::exception& e) {  // there is no way out of a fiber
      wrong = std::string("exception: ") + e.what();
    } catch (...) {
      wrong = "exception";
    }
    release_order(&launch_->ends);
    Quiet quiet;
    if (!wrong.empty()) fail(wrong);
    self()->state = State::kDone;
  }

  SIMT_UNWATCHED void to_scheduler(bool for_good) {
    Thread* thread = self();
    before_switch(&thread->watched, scheduler_watched_, for_good);
    kh_simt_switch(&thread->stack_pointer, scheduler_stack_pointer_);
    after_switch(&self()->watched, nullptr);
  }

  void wait(At at, Collective* c) {
    Thread* thread = self();
    thread->state = State::kWaiting;
    thread->waits_at = at;
    thread->collective = c;
    {
      Loud loud;
      release_order(&launch_->ends);  // it may never run again
      to_scheduler(false);
    }
    thread->waits_at = {};
  }

  void retire(const Thread& t) {
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

  Lanes existing_lanes(int warp) const {
    const int lanes = count_ - warp * kWarp;
    return lanes >= kWarp ? kAllLanes : lane_bit(lanes) - 1;
  }

  void complete(Collective* c, int warp) {
    c->pending = false;
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

  // Whom a thread waits for in a collective.
  static std::string mask_of(const Thread& t) {
    if (t.collective == nullptr) return {};
    std::string text;
    char word[16];
    for (int lane = kWarp - kGroup; lane >= 0; lane -= kGroup) {
      const auto lanes = uint32_t(t.collective->expected >> lane);
      snprintf(word, sizeof word, text.empty() ? "%08x" : "_%08x", lanes);
      text += word;
    }
    return " with lanes " + text;
  }

  // Threads by where they are, a line each.
  std::string waiting_threads() const {
    std::vector<std::pair<std::string, std::vector<int>>> groups;
    for (const Thread& t : threads_) {
      std::string state = t.state == State::kDone  ? "exited"
                          : t.state == State::kNew ? "not started"
                          : t.waits_at.what        ? "waiting at " + t.waits_at.text() + mask_of(t)
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
  StaticShared static_shared_;
  std::unique_ptr<unsigned char, FreeShared> shared_;
  void* scheduler_stack_pointer_ = nullptr;
  Watched scheduler_watched_;
  int done_ = 0;
  std::string error_;

  int barrier_waiting_ = 0, barrier_sum_ = 0, last_barrier_sum_ = 0;
  unsigned barriers_ = 0;
  At barrier_at_;
  char barrier_order_[2] = {};  // addresses that stand for the order of even and odd barriers

  std::vector<Collectives> collectives_;  // by warp
  std::vector<Lanes> exited_;             // by warp
};

}  // namespace simt
