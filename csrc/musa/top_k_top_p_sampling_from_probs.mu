// SPDX-License-Identifier: Apache-2.0
// top_k_top_p_sampling_from_probs: one token a sample, to the bit as docs/sampling.md defines it.
//
// What is kept is everything of at least a threshold, and masses are integers, so that no order of
// summation matters. The threshold is found by counting, in two readings of the row:
//
//  1. Count: a histogram of counts over the 44 binary orders that have mass, 256 bins each. A count
//     times the mass at either edge of its bin bounds the bin's mass to 1 in 256, and so the bins
//     in which the threshold can lie. Counts alone, for adding one in shared memory is cheap even
//     where all threads add to one bin; sums of masses are neither 32 bits wide nor cheap.
//  2. Gather: what lies above those bins is summed for each segment of the row, what lies in them
//     (1000 elements of 128256 are typical) is listed. Sorting the list gives the exact threshold.
//
// The segments' masses then say in which segment the token lies, and only that one is read again.
// Where the list would be longer than kCapacity, the threshold comes from exact histograms of the
// row, 2048 bins at a time: at most six further readings, slow and rare. The number of readings is
// bounded whatever the data.
//
// Bound by reading the row twice, the second time from the L2 cache where it fits, and by counting.
// A block takes a sample, one launch for all. Where samples are few and rows long, kSplit blocks
// take a row: the same steps as a sequence of launches, with the histogram, sums and list in a
// workspace. No block waits for another.
//
// 1024 threads, for with few samples the time is that of loads and barriers one after the other; 64
// registers each, so that one block fits on an SM of sm_90. Not tuned on hardware.
#include "launcher.muh"

namespace kh {
namespace {

// ---- shapes ---------------------------------------------------------------------------------

constexpr int kThreads = 1024;
constexpr int kLanes = 32;  // that shuffle with each other
constexpr int kWarps = kThreads / kLanes;
constexpr int kSegments = kWarps;  // of a row; each is read by a warp, or by a warp of each block
constexpr int kSplit = 8;          // blocks that share a row, where several do
static_assert(kWarps == kLanes, "a warp sums what the warps bring");

constexpr unsigned kLeast = 83u << 23;  // bits of 2^-44, the least value that has mass
constexpr unsigned kOne = 0x3f800000u;  // 1.0; from here on all have the mass of 1
constexpr unsigned kInfinity = 0x7f800000u;
constexpr uint64_t kWholeMass = uint64_t{1} << 44;

constexpr int kBinBits = 15;  // low bits that share a bin: 8 of the mantissa's 23 tell bins apart
constexpr int kBins = (kOne - kLeast) >> kBinBits;  // the last one takes all larger values too
constexpr int kBinsAThread = kBins / kThreads;
static_assert(kBins % kThreads == 0, "every thread takes as many bins");

constexpr int kCapacity = 4096;  // entries of the list; a power of two, to be sorted

constexpr int kExactBits = 11;
constexpr int kExactBins = 1 << kExactBits;
constexpr int kExactBinsAThread = kExactBins / kThreads;
constexpr int kLimbs = 4, kLimbBits = 13;  // 2^19 tokens of less than 2^13 stay within 32 bits
constexpr unsigned kLimbMask = (1u << kLimbBits) - 1;

constexpr uint64_t kNoLimit = ~uint64_t{0};
constexpr unsigned kWholePortion = 1u << 24;  // of top_p, in units of 2^-24: keeps all

// ---- arguments ------------------------------------------------------------------------------

struct Numbers {
  const void* data;  // null: absent
  int64_t stride;
  bool wide;  // int64, not int32; of integers
};

struct Arguments {
  const void* probs;  // [num_rows, vocab_size]
  int64_t row_stride, column_stride;
  int64_t num_rows, batch_size;
  int vocab_size;
  bool joint;
  bool one_stream;  // seeds [B], of which each has stream 0
  Numbers top_k, top_p, min_p;
  int64_t top_k_value;
  float top_p_value, min_p_value;
  Numbers indices, seed, offset;
  int64_t seed_value, offset_value;
  int32_t* tokens;  // [B]
  int64_t token_stride;
  uint8_t* valid;  // [B] or null
  int64_t valid_stride;
};

__device__ __forceinline__ int64_t integer_at(const Numbers& n, int64_t i) {
  return read_integer(n.data, n.wide, i * n.stride);
}
__device__ __forceinline__ float share_at(const Numbers& n, int64_t i, float value) {
  return n.data == nullptr ? value : static_cast<const float*>(n.data)[i * n.stride];
}
__device__ __forceinline__ float clamped(float share) {
  return share < 0.f ? 0.f : share > 1.f ? 1.f : share;
}

// ---- random bits ----------------------------------------------------------------------------

// The high 64 bits of a product.
__device__ __forceinline__ uint64_t multiply_high(uint64_t x, uint64_t y) {
  const uint64_t word = 0xffffffffu;
  const uint64_t middle = (x >> 32) * (y & word) + ((x & word) * (y & word) >> 32);
  const uint64_t other = (x & word) * (y >> 32) + (middle & word);
  return (x >> 32) * (y >> 32) + (middle >> 32) + (other >> 32);
}

// The first two words of Philox4x32-10, low word first.
__device__ __forceinline__ uint64_t random_bits(uint64_t seed, uint64_t offset, uint64_t stream) {
  unsigned key[2] = {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)};
  unsigned c[4] = {static_cast<unsigned>(offset), static_cast<unsigned>(offset >> 32),
                   static_cast<unsigned>(stream), static_cast<unsigned>(stream >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(c[0]) * 0xd2511f53u;
    const uint64_t second = static_cast<uint64_t>(c[2]) * 0xcd9e8d57u;
    c[0] = static_cast<unsigned>(second >> 32) ^ c[1] ^ key[0];
    c[1] = static_cast<unsigned>(second);
    c[2] = static_cast<unsigned>(first >> 32) ^ c[3] ^ key[1];
    c[3] = static_cast<unsigned>(first);
    key[0] += 0x9e3779b9u;
    key[1] += 0xbb67ae85u;
  }
  return static_cast<uint64_t>(c[1]) << 32 | c[0];
}

__device__ __forceinline__ uint64_t random_of(const Arguments& a, int64_t sample) {
  const int64_t seed = a.seed.data == nullptr ? a.seed_value : integer_at(a.seed, sample);
  const int64_t offset = a.offset.data == nullptr ? a.offset_value : integer_at(a.offset, sample);
  return random_bits(static_cast<uint64_t>(seed), static_cast<uint64_t>(offset),
                     a.one_stream ? 0 : static_cast<uint64_t>(sample));
}

// ---- filters --------------------------------------------------------------------------------

// The filters of one sample.
struct Rules {
  uint64_t top_k;    // kNoLimit: keeps all
  unsigned portion;  // kWholePortion: keeps all
  float min_p;       // 0: keeps all
  bool joint;

  __device__ bool has_k() const { return top_k != kNoLimit; }
  __device__ bool has_p() const { return portion != kWholePortion; }
  __device__ bool any() const { return has_k() || has_p() || min_p > 0.f; }
  // Whether top-p takes its share of what top-k keeps.
  __device__ bool of_survivors() const { return has_k() && has_p() && !joint; }
  // Whether it takes it of the whole row.
  __device__ bool needs_total() const { return has_p() && !of_survivors(); }
};

// The row that a sample reads, or -1 where it cannot be drawn. Sets its filters.
__device__ __forceinline__ int64_t row_of(const Arguments& a, int64_t sample, Rules* rules) {
  const int64_t row = a.indices.data == nullptr ? sample : integer_at(a.indices, sample);
  if (row < 0 || row >= a.num_rows) return -1;
  const float top_p = share_at(a.top_p, row, a.top_p_value);
  const float min_p = share_at(a.min_p, row, a.min_p_value);
  if (top_p != top_p || min_p != min_p) return -1;
  const int64_t top_k = a.top_k.data == nullptr ? a.top_k_value : integer_at(a.top_k, row);
  rules->top_k = top_k > 0 && top_k < a.vocab_size ? static_cast<uint64_t>(top_k) : kNoLimit;
  // Scaling by a power of two is exact, and the conversion truncates.
  const unsigned portion = static_cast<unsigned>(clamped(top_p) * kWholePortion);
  rules->portion = portion < 1 ? 1 : portion;
  rules->min_p = clamped(min_p);
  rules->joint = a.joint;
  return row;
}

// ---- masses ---------------------------------------------------------------------------------

// Of the bits of a value, whether it has mass: from 2^-44 up, neither negative nor infinite or NaN.
__device__ __forceinline__ bool has_mass(unsigned bits) {
  return bits - kLeast < kInfinity - kLeast;
}

// floor(min(p, 1) * 2^44) of a value that has mass.
__device__ __forceinline__ uint64_t mass_of(unsigned bits) {
  if (bits >= kOne) return kWholeMass;
  const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  return (mantissa << 20) >> (43u - ((bits - kLeast) >> 23));
}

// The least mass that is not below the share of `total`: ceil(portion * total / 2^24).
__device__ __forceinline__ uint64_t needed_of(unsigned portion, uint64_t total) {
  const uint64_t low = total & 0xffffffu;
  return portion * (total >> 24) + ((portion * low + 0xffffffu) >> 24);
}

// Bits in which the values of one bin differ, by the type that they are stored in.
template <class T>
constexpr unsigned kInBin = 0;  // bf16 has 7 bits of mantissa
template <>
constexpr unsigned kInBin<float> = (1u << kBinBits) - 1;
template <>
constexpr unsigned kInBin<half_t> = 3u << 13;  // fp16 has 10 bits

__device__ __forceinline__ int bin_of(unsigned bits) {
  const unsigned bin = (bits - kLeast) >> kBinBits;
  return bin < kBins ? static_cast<int>(bin) : kBins - 1;
}
__device__ __forceinline__ unsigned bin_floor(int bin) {
  return kLeast + (static_cast<unsigned>(bin) << kBinBits);
}
template <class T>
__device__ __forceinline__ uint64_t greatest_mass(int bin) {
  return bin == kBins - 1 ? kWholeMass : mass_of(bin_floor(bin) | kInBin<T>);
}

// ---- shared state ---------------------------------------------------------------------------

// Where to look for the threshold.
struct Plan {
  unsigned low, high;  // it lies in [low, high); low == high: it is high
  unsigned least;      // that of min-p, kLeast without it
  unsigned counted;    // elements in [low, high)
  uint64_t above;      // elements of at least high
};

// Where a running sum over the bins, from the greatest value down, reaches its limit.
struct Mark {
  int place;               // bins before this one
  uint64_t before, after;  // elements before and through it
};

// Which segment the token lies in.
struct Aim {
  uint64_t support;  // mass of all that is kept
  uint64_t left;     // of the target, when the segments before are passed
  int segment;
};

constexpr int kSums = 3;  // that a block makes at once

struct Exact {
  unsigned count[kExactBins];
  unsigned limbs[kLimbs][kExactBins];
};

struct Shared {
  union {  // one after the other
    unsigned bins[kBins];
    uint64_t list[kCapacity];  // value's bits above the index
    Exact exact;
  };
  uint64_t scratch[kSums][kWarps];
  uint64_t segments[kSegments];
  uint64_t random;
  Aim aim;
  Mark by_count, earliest, latest;
  uint64_t mass_before, mass_after;  // bounds of the mass before and through by_count
  unsigned listed;
  unsigned found_bin, key;
  bool found;
};

// What the launches that share a row hand on.
struct Work {
  unsigned bins[kBins];  // this and `listed` are cleared first
  unsigned listed;
  Plan plan;
  uint64_t totals[kSplit];
  unsigned largest[kSplit];
  unsigned bad[kSplit];
  uint64_t above[kSplit * kWarps];
  uint64_t list[kCapacity];
};

// ---- sums over a block ----------------------------------------------------------------------

__device__ __forceinline__ int lane() { return threadIdx.x % kLanes; }
__device__ __forceinline__ int warp() { return threadIdx.x / kLanes; }

// Whether this thread is in the warp that does what one warp is enough for; the shuffles of 1024
// threads take their time. All lanes of a wider warp must come along, though 32 would do.
__device__ __forceinline__ bool in_first_warp() { return threadIdx.x < KH_WARP_SIZE; }

__device__ __forceinline__ uint64_t warp_sum(uint64_t v) {
#pragma unroll
  for (int by = kLanes / 2; by > 0; by /= 2) v += __shfl_xor_sync(~0u, v, by, kLanes);
  return v;
}

// The sum of what the lanes through this one bring.
__device__ __forceinline__ uint64_t warp_sum_through(uint64_t v) {
#pragma unroll
  for (int by = 1; by < kLanes; by *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, v, by, kLanes);
    if (lane() >= by) v += other;
  }
  return v;
}

// Of N values at once: v becomes the sum of what the threads before this one bring, `all` the sum
// of what all bring.
template <int N>
__device__ __forceinline__ void sums_before(uint64_t (&v)[N], uint64_t (&all)[N], Shared& s) {
  static_assert(N <= kSums, "there is room in s.scratch");
  uint64_t own[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    own[n] = v[n];
    v[n] = warp_sum_through(v[n]);
    if (lane() == kLanes - 1) s.scratch[n][warp()] = v[n];
  }
  __syncthreads();
  if (in_first_warp()) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      // The others of a wider warp bring nothing: they would read what the first 32 write.
      const uint64_t through = warp_sum_through(warp() == 0 ? s.scratch[n][lane()] : 0);
      if (warp() == 0) s.scratch[n][lane()] = through;
    }
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    all[n] = s.scratch[n][kWarps - 1];
    v[n] += (warp() > 0 ? s.scratch[n][warp() - 1] : 0) - own[n];
  }
  __syncthreads();
}

__device__ __forceinline__ uint64_t sum_before(uint64_t v, Shared& s, uint64_t* all) {
  uint64_t before[] = {v}, sum[1];
  sums_before(before, sum, s);
  *all = sum[0];
  return before[0];
}

__device__ __forceinline__ uint64_t block_sum(uint64_t v, Shared& s) {
  uint64_t all;
  sum_before(v, s, &all);
  return all;
}

__device__ __forceinline__ int warp_max(int v) {
#pragma unroll
  for (int by = kLanes / 2; by > 0; by /= 2) {
    const int other = __shfl_xor_sync(~0u, v, by, kLanes);
    v = v < other ? other : v;
  }
  return v;
}

__device__ __forceinline__ int block_max(int v, Shared& s) {
  v = warp_max(v);
  if (lane() == 0) s.scratch[0][warp()] = static_cast<unsigned>(v);
  __syncthreads();
  v = warp_max(static_cast<int>(static_cast<unsigned>(s.scratch[0][lane()])));
  __syncthreads();
  return v;
}

// ---- loads ----------------------------------------------------------------------------------

// A row in packs that start on 16-byte boundaries: the first and the last reach past its ends.
template <class T>
struct Row {
  static constexpr int kPack = kVectorBytes / sizeof(T);
  static constexpr int kAhead = 16 / kPack;  // packs that a thread loads before it uses them
  using Values = Pack<T, kPack>;

  const T* data;
  int64_t stride;
  int size;
  int lead;  // elements of the first pack that lie before the row
  int packs, packs_a_segment;

  __device__ Row(const Arguments& a, int64_t row)
      : data(static_cast<const T*>(a.probs) + row * a.row_stride),
        stride(a.column_stride),
        size(a.vocab_size),
        lead(stride == 1 ? reinterpret_cast<uintptr_t>(data) / sizeof(T) % kPack : 0),
        packs((size + lead + kPack - 1) / kPack),
        packs_a_segment((packs + kSegments - 1) / kSegments) {}

  // Elements outside of the row are zero.
  __device__ __forceinline__ Values read(int pack) const {
    const int first = pack * kPack - lead;
    if (stride == 1 && first >= 0 && first + kPack <= size) return load<kPack>(data + first);
    Values v;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const int at = first + i;
      v.at[i] = at >= 0 && at < size ? data[at * stride] : T{};
    }
    return v;
  }
};

// The share of a row that one thread reads: every `step`th pack of [first, end).
struct Slice {
  int first, end, step;
};

template <class T>
__device__ __forceinline__ int segment_end(const Row<T>& row, int segment) {
  const int end = (segment + 1) * row.packs_a_segment;
  return end < row.packs ? end : row.packs;
}

// Of `blocks` blocks that share a row. Warps of one block, or one of each, share a segment.
template <class T>
__device__ __forceinline__ Slice slice_of(const Row<T>& row, int block, int blocks) {
  const int number = block * kWarps + warp();
  const int segment = number / blocks, part = number % blocks;
  return {segment * row.packs_a_segment + part * kLanes + lane(), segment_end(row, segment),
          kLanes * blocks};
}

// Calls use(bits of an element, its index).
template <class T, class Use>
__device__ __forceinline__ void each_element(const Row<T>& row, const Slice& slice, Use use) {
  constexpr int kPack = Row<T>::kPack, kAhead = Row<T>::kAhead;
  for (int pack = slice.first; pack < slice.end; pack += slice.step * kAhead) {
    typename Row<T>::Values values[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = pack + k * slice.step;
      values[k] = at < slice.end ? row.read(at) : typename Row<T>::Values{};
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int index = (pack + k * slice.step) * kPack - row.lead;
#pragma unroll
      for (int i = 0; i < kPack; ++i) use(__float_as_uint(to_float(values[k].at[i])), index + i);
    }
  }
}

// ---- step 1: count --------------------------------------------------------------------------

// Counts a slice into s.bins, which this clears. Sets the slice's mass and the bits of its largest
// value, as those of a signed number, which order as positive values do; 0 where not needed.
template <class T>
__device__ __forceinline__ void count(const Row<T>& row, const Slice& slice, const Rules& r,
                                      Shared& s, uint64_t* mass, int* largest) {
  const bool with_mass = r.needs_total();
  for (int i = threadIdx.x; i < kBins; i += kThreads) s.bins[i] = 0;
  __syncthreads();
  uint64_t sum = 0;
  int most = 0;
  each_element(row, slice, [&](unsigned bits, int) {
    most = most < static_cast<int>(bits) ? static_cast<int>(bits) : most;
    if (!has_mass(bits)) return;
    atomicAdd(&s.bins[bin_of(bits)], 1u);
    if (with_mass) sum += mass_of(bits);
  });
  __syncthreads();
  *mass = with_mass ? block_sum(sum, s) : 0;
  *largest = r.min_p > 0.f ? block_max(most, s) : 0;
}

// Calls see(place, count, bin) for this thread's bins that hold something, from the greatest down.
template <class See>
__device__ __forceinline__ void each_bin(const Shared& s, See see) {
  for (int i = 0; i < kBinsAThread; ++i) {
    const int place = static_cast<int>(threadIdx.x) * kBinsAThread + i;
    const int bin = kBins - 1 - place;
    const unsigned count = s.bins[bin];
    if (count > 0) see(place, count, bin);
  }
}

// Where the threshold can lie, from the counts in s.bins, the row's mass (used where top-p takes
// its share of all) and its largest value.
template <class T>
__device__ __forceinline__ Plan plan_of(const Rules& r, uint64_t total, int largest, Shared& s) {
  unsigned least = kLeast;
  if (r.min_p > 0.f && largest > 0) {
    const float product = __fmul_rn(r.min_p, __uint_as_float(static_cast<unsigned>(largest)));
    if (__float_as_uint(product) > least) least = __float_as_uint(product);
  }
  const Plan known = {least, least, least, 0, 0};
  if (!r.has_k() && !r.has_p()) return known;

  uint64_t own_count = 0, own_low = 0, own_high = 0;
  each_bin(s, [&](int, unsigned count, int bin) {
    own_count += count;
    own_low += count * mass_of(bin_floor(bin));
    own_high += count * greatest_mass<T>(bin);
  });
  uint64_t before_own[] = {own_count, own_low, own_high}, all[3];
  sums_before(before_own, all, s);
  const uint64_t count_before = before_own[0];
  const uint64_t low_before = before_own[1], high_before = before_own[2];
  if (threadIdx.x == 0) {
    s.by_count = s.earliest = s.latest = {kBins - 1, 0, all[0]};
    s.mass_before = all[1];
    s.mass_after = all[2];
  }
  __syncthreads();

  if (count_before < r.top_k && count_before + own_count >= r.top_k) {
    uint64_t before = count_before, low = low_before, high = high_before;
    each_bin(s, [&](int place, unsigned count, int bin) {
      const uint64_t after = before + count;
      high += count * greatest_mass<T>(bin);
      if (before < r.top_k && after >= r.top_k) {
        s.by_count = {place, before, after};
        s.mass_before = low;
        s.mass_after = high;
      }
      low += count * mass_of(bin_floor(bin));
      before = after;
    });
  }
  __syncthreads();
  if (r.has_k() && all[0] < r.top_k && !r.has_p()) return known;  // fewer have mass

  if (r.has_p()) {
    const uint64_t need = needed_of(r.portion, r.of_survivors() ? s.mass_before : total);
    const uint64_t at_least = need < 1 ? 1 : need;
    const uint64_t at_most = needed_of(r.portion, r.of_survivors() ? s.mass_after : total);
    const bool earliest = high_before < at_least && high_before + own_high >= at_least;
    const bool latest = low_before < at_most && low_before + own_low >= at_most;
    if (earliest || latest) {
      uint64_t before = count_before, low = low_before, high = high_before;
      each_bin(s, [&](int place, unsigned count, int bin) {
        const uint64_t after = before + count;
        const uint64_t next_low = low + count * mass_of(bin_floor(bin));
        const uint64_t next_high = high + count * greatest_mass<T>(bin);
        if (high < at_least && next_high >= at_least) s.earliest = {place, before, after};
        if (low < at_most && next_low >= at_most) s.latest = {place, before, after};
        before = after;
        low = next_low;
        high = next_high;
      });
    }
    __syncthreads();
  }
  const Mark from = s.earliest.place < s.by_count.place || !r.has_k() ? s.earliest : s.by_count;
  const Mark to = r.of_survivors() || s.by_count.place < s.latest.place ? s.by_count : s.latest;
  __syncthreads();  // before s.bins makes room for the list

  if (kBins - 1 - bin_of(least) < from.place) return known;
  const unsigned high = from.place == 0 ? kInfinity : bin_floor(kBins - from.place);
  return {bin_floor(kBins - 1 - to.place), high, least,
          static_cast<unsigned>(to.after - from.before), from.before};
}

// ---- step 2: gather -------------------------------------------------------------------------

// Lists what a slice has in [plan.low, plan.high). Returns the mass of this thread's elements of at
// least plan.high; sets whether one of them is NaN or infinite.
template <class T>
__device__ __forceinline__ uint64_t gather(const Row<T>& row, const Slice& slice, const Plan& plan,
                                           Shared& s, bool* bad) {
  if (threadIdx.x == 0) s.listed = 0;
  __syncthreads();
  uint64_t above = 0;
  unsigned most = 0;  // of the magnitudes, sign shifted out
  each_element(row, slice, [&](unsigned bits, int index) {
    most = most < bits << 1 ? bits << 1 : most;
    if (bits - plan.high < kInfinity - plan.high) {
      above += mass_of(bits);
    } else if (bits - plan.low < plan.high - plan.low) {
      const unsigned at = atomicAdd(&s.listed, 1u);
      // Counted to fit; but the row may be written to meanwhile.
      if (at < kCapacity)
        s.list[at] = static_cast<uint64_t>(bits) << 32 | static_cast<unsigned>(index);
    }
  });
  *bad = most >= kInfinity << 1;
  __syncthreads();
  return above;
}

// ---- step 3: the threshold ------------------------------------------------------------------

__device__ __forceinline__ unsigned bits_of(uint64_t entry) {
  return static_cast<unsigned>(entry >> 32);
}

// Sorts s.list[0, size), size a power of two, in descending order.
__device__ __forceinline__ void sort(int size, Shared& s) {
  for (int run = 2; run <= size; run *= 2) {
    for (int apart = run / 2; apart > 0; apart /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (apart - 1)), high = low + apart;
        const uint64_t x = s.list[low], y = s.list[high];
        if ((x < y) == ((low & run) == 0)) {
          s.list[low] = y;
          s.list[high] = x;
        }
      }
      // Exchanges up to 32 apart stay within the 64 entries of a warp.
      const int next = apart > 1 ? apart / 2 : run;
      if (apart > kLanes || next > kLanes || run == size) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
}

// The least value that top-k and top-p keep, from the `listed` entries of s.list, all that can be
// it, and the masses of what is greater in s.segments. Leaves the list sorted.
__device__ __forceinline__ unsigned threshold(const Rules& r, const Plan& plan, int listed,
                                              uint64_t total, Shared& s) {
  if (in_first_warp()) {
    const uint64_t above = warp_sum(s.segments[lane()]);
    if (threadIdx.x == 0) s.mass_before = above;
  }
  int size = 2;
  while (size < listed) size *= 2;
  for (int i = listed + threadIdx.x; i < size; i += kThreads) s.list[i] = 0;
  __syncthreads();
  sort(size, s);
  const uint64_t mass_above = s.mass_before;

  unsigned kept = kLeast;
  const uint64_t rank = r.top_k - 1 - plan.above;  // in the list; too large without top-k
  if (rank < static_cast<uint64_t>(listed)) kept = bits_of(s.list[rank]);
  if (!r.has_p()) return kept;

  // A run of entries for each thread.
  const int run = size > kThreads ? size / kThreads : 1;
  const int first = static_cast<int>(threadIdx.x) * run;
  const int end = first + run < listed ? first + run : listed;
  uint64_t own = 0, own_survivors = 0;
  for (int i = first; i < end; ++i) {
    const unsigned bits = bits_of(s.list[i]);
    own += mass_of(bits);
    if (bits >= kept) own_survivors += mass_of(bits);
  }
  if (r.of_survivors()) total = mass_above + block_sum(own_survivors, s);
  const uint64_t needed = needed_of(r.portion, total);
  if (threadIdx.x == 0) s.key = kLeast;
  uint64_t all;
  uint64_t running = mass_above + sum_before(own, s, &all);
  for (int i = first; i < end; ++i) {
    const uint64_t after = running + mass_of(bits_of(s.list[i]));
    if (running < needed && after >= needed) s.key = bits_of(s.list[i]);
    running = after;
  }
  __syncthreads();
  return s.key > kept ? s.key : kept;
}

// ---- the slow way: exact histograms of the row ----------------------------------------------

struct Selected {
  unsigned bits;
  uint64_t mass;  // of all that is at least that
};

__device__ __forceinline__ uint64_t exact_mass(const Shared& s, int bin) {
  uint64_t mass = 0;
#pragma unroll
  for (int limb = 0; limb < kLimbs; ++limb)
    mass += static_cast<uint64_t>(s.exact.limbs[limb][bin]) << (limb * kLimbBits);
  return mass;
}

__device__ __forceinline__ void add_exactly(Shared& s, int bin, unsigned count, uint64_t mass) {
  atomicAdd(&s.exact.count[bin], count);
#pragma unroll
  for (int limb = 0; limb < kLimbs; ++limb) {
    const uint64_t rest = mass >> (limb * kLimbBits);
    const unsigned part = static_cast<unsigned>(limb < kLimbs - 1 ? rest & kLimbMask : rest);
    if (part > 0) atomicAdd(&s.exact.limbs[limb][bin], part);
  }
}

// The greatest value in [low, high) such that `count_limit` elements, or the mass `mass_limit`, are
// at least that; `low` where there is none. What is at least `high` must be within both limits.
template <class T>
__device__ Selected select(const Row<T>& row, unsigned low, unsigned high, uint64_t count_limit,
                           uint64_t mass_limit, Shared& s) {
  for (;;) {
    int shift = 0;
    while ((high - low - 1) >> shift >= kExactBins) ++shift;
    for (int i = threadIdx.x; i < kExactBins; i += kThreads) {
      s.exact.count[i] = 0;
#pragma unroll
      for (int limb = 0; limb < kLimbs; ++limb) s.exact.limbs[limb][i] = 0;
    }
    if (threadIdx.x == 0) s.found = false;
    __syncthreads();
    uint64_t count_above = 0, mass_above = 0;
    // Neighbours of one bin are added at once: where many tokens tie, threads would queue up.
    int bin = 0;
    unsigned count = 0;
    uint64_t mass = 0;
    each_element(row, slice_of(row, 0, 1), [&](unsigned bits, int) {
      if (bits < low || bits >= kInfinity) return;
      if (bits >= high) {
        ++count_above;
        mass_above += mass_of(bits);
        return;
      }
      const int own = static_cast<int>((bits - low) >> shift);
      if (own != bin && count > 0) {
        add_exactly(s, bin, count, mass);
        count = 0;
        mass = 0;
      }
      bin = own;
      ++count;
      mass += mass_of(bits);
    });
    if (count > 0) add_exactly(s, bin, count, mass);
    __syncthreads();
    uint64_t above[] = {count_above, mass_above}, all_above[2];
    sums_before(above, all_above, s);

    const int top = kExactBins - 1 - static_cast<int>(threadIdx.x) * kExactBinsAThread;
    uint64_t own_count = 0, own_mass = 0;
    for (int i = 0; i < kExactBinsAThread; ++i) {
      own_count += s.exact.count[top - i];
      own_mass += exact_mass(s, top - i);
    }
    uint64_t before[] = {own_count, own_mass}, all[2];
    sums_before(before, all, s);
    uint64_t counted = all_above[0] + before[0], running = all_above[1] + before[1];
    for (int i = 0; i < kExactBinsAThread; ++i) {
      const uint64_t next_counted = counted + s.exact.count[top - i];
      const uint64_t next_running = running + exact_mass(s, top - i);
      if (counted < count_limit && running < mass_limit &&
          (next_counted >= count_limit || next_running >= mass_limit)) {
        s.found = true;
        s.found_bin = static_cast<unsigned>(top - i);
        s.mass_after = next_running;
      }
      counted = next_counted;
      running = next_running;
    }
    __syncthreads();
    const bool found = s.found;
    const unsigned at = low + (s.found_bin << shift);
    const uint64_t mass_after = s.mass_after;
    __syncthreads();
    if (!found) return {low, all_above[1] + all[1]};
    if (shift == 0) return {at, mass_after};
    low = at;
    if (high - low > 1u << shift) high = low + (1u << shift);
  }
}

// Narrows a plan down to the threshold itself.
template <class T>
__device__ void narrow(const Row<T>& row, const Rules& r, uint64_t total, Plan* plan, Shared& s) {
  unsigned kept;
  if (r.of_survivors()) {
    const Selected by_count = select(row, plan->low, plan->high, r.top_k, kNoLimit, s);
    const uint64_t needed = needed_of(r.portion, by_count.mass);
    kept = select(row, by_count.bits, plan->high, kNoLimit, needed, s).bits;
  } else {
    const uint64_t needed = r.has_p() ? needed_of(r.portion, total) : kNoLimit;
    kept = select(row, plan->low, plan->high, r.top_k, needed, s).bits;
  }
  plan->low = plan->high = kept > plan->least ? kept : plan->least;
  plan->counted = 0;
}

// ---- step 4: the draw -----------------------------------------------------------------------

// Called by one thread.
__device__ __forceinline__ void answer(const Arguments& a, int64_t sample, int token, bool valid) {
  a.tokens[sample * a.token_stride] = token;
  if (a.valid != nullptr) a.valid[sample * a.valid_stride] = valid;
}

// Answers with the first element of [first, end) packs at which the running mass of what is at
// least `kept` exceeds `target`.
template <class T>
__device__ __forceinline__ void search(const Arguments& a, int64_t sample, const Row<T>& row,
                                       int first, int end, unsigned kept, uint64_t target,
                                       Shared& s) {
  constexpr int kPack = Row<T>::kPack, kAhead = Row<T>::kAhead;
  const auto kept_mass = [&](T value) -> uint64_t {
    const unsigned bits = __float_as_uint(to_float(value));
    return bits - kept < kInfinity - kept ? mass_of(bits) : 0;
  };
  for (int base = first; base < end; base += kThreads * kAhead) {
    const int own = base + static_cast<int>(threadIdx.x) * kAhead;  // neighbouring packs
    typename Row<T>::Values values[kAhead];
    uint64_t mass = 0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      values[k] = own + k < end ? row.read(own + k) : typename Row<T>::Values{};
#pragma unroll
      for (int i = 0; i < kPack; ++i) mass += kept_mass(values[k].at[i]);
    }
    uint64_t all;
    const uint64_t before = sum_before(mass, s, &all);
    if (target < all) {
      if (target < before || target - before >= mass) return;
      uint64_t left = target - before;
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          const uint64_t one = kept_mass(values[k].at[i]);
          if (one > left) {
            answer(a, sample, (own + k) * kPack - row.lead + i, true);
            return;
          }
          left -= one;
        }
      }
    }
    target -= all;
  }
}

// From the masses above the plan in s.segments and the list in s.list to the token.
template <class T>
__device__ __forceinline__ void draw(const Arguments& a, int64_t sample, const Row<T>& row,
                                     const Rules& r, const Plan& plan, int listed, uint64_t total,
                                     Shared& s) {
  unsigned kept = plan.high;
  if (listed > 0) {
    kept = threshold(r, plan, listed, total, s);
    if (kept < plan.least) kept = plan.least;
    // Each warp adds to its segment what the list has of it.
    uint64_t more = 0;
    for (int i = lane(); i < listed; i += kLanes) {
      const int index = static_cast<int>(static_cast<unsigned>(s.list[i]));
      const unsigned bits = bits_of(s.list[i]);
      if (bits < kept) break;  // the list is sorted
      if ((index + row.lead) / Row<T>::kPack / row.packs_a_segment == warp()) more += mass_of(bits);
    }
    more = warp_sum(more);
    __syncthreads();
    if (lane() == 0) s.segments[warp()] += more;
    __syncthreads();
  }
  if (in_first_warp()) {
    const uint64_t own = s.segments[lane()], through = warp_sum_through(own);
    const uint64_t support = __shfl_sync(~0u, through, kLanes - 1, kLanes);
    const uint64_t target = multiply_high(s.random, support);
    const bool passed = through <= target;
    const int segment = static_cast<int>(warp_sum(passed));
    const uint64_t left = target - warp_sum(passed ? own : 0);
    if (threadIdx.x == 0) s.aim = {support, left, segment};
  }
  __syncthreads();
  const Aim aim = s.aim;
  if (aim.support == 0) {
    if (threadIdx.x == 0) answer(a, sample, 0, false);
    return;
  }
  search(a, sample, row, aim.segment * row.packs_a_segment, segment_end(row, aim.segment), kept,
         aim.left, s);
}

// ---- kernels --------------------------------------------------------------------------------

// From a plan to the token by one block.
template <class T>
__device__ __forceinline__ void gather_and_draw(const Arguments& a, int64_t sample,
                                                const Row<T>& row, const Rules& r, Plan plan,
                                                uint64_t total, Shared& s) {
  if (plan.counted > kCapacity) narrow(row, r, total, &plan, s);
  bool bad;
  const uint64_t above = warp_sum(gather(row, slice_of(row, 0, 1), plan, s, &bad));
  if (lane() == 0) s.segments[warp()] = above;
  if (__syncthreads_or(bad)) {
    if (threadIdx.x == 0) answer(a, sample, 0, false);
    return;
  }
  const int listed = static_cast<int>(s.listed < kCapacity ? s.listed : kCapacity);
  draw(a, sample, row, r, plan, listed, total, s);
}

template <class T>
__global__ void __launch_bounds__(kThreads) sample_kernel(Arguments a) {
  KH_DYNAMIC_SHARED(Shared, shared);
  Shared& s = *shared;
  const int64_t sample = blockIdx.x;
  Rules r;
  const int64_t number = row_of(a, sample, &r);
  if (number < 0) {
    if (threadIdx.x == 0) answer(a, sample, 0, false);
    return;
  }
  const Row<T> row(a, number);
  // Before the row is read: seeds in memory take as long to arrive.
  if (threadIdx.x == 0) s.random = random_of(a, sample);
  Plan plan = {kLeast, kLeast, kLeast, 0, 0};
  uint64_t total = 0;
  if (r.any()) {
    int largest;
    count(row, slice_of(row, 0, 1), r, s, &total, &largest);
    plan = plan_of<T>(r, total, largest, s);
  }
  gather_and_draw(a, sample, row, r, plan, total, s);
}

// The same as four kernels, for kSplit blocks a row.

__global__ void __launch_bounds__(kThreads) clear_kernel(Work* work) {
  Work& w = work[blockIdx.x / kSplit];
  const int first = static_cast<int>(blockIdx.x % kSplit) * kThreads + threadIdx.x;
  for (int i = first; i < kBins; i += kThreads * kSplit) w.bins[i] = 0;
  if (first == 0) w.listed = 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads) count_kernel(Arguments a, Work* work) {
  KH_DYNAMIC_SHARED(Shared, shared);
  Shared& s = *shared;
  const int64_t sample = blockIdx.x / kSplit;
  const int block = blockIdx.x % kSplit;
  Work& w = work[sample];
  Rules r;
  const int64_t number = row_of(a, sample, &r);
  if (number < 0 || !r.any()) return;
  const Row<T> row(a, number);
  uint64_t mass;
  int largest;
  count(row, slice_of(row, block, kSplit), r, s, &mass, &largest);
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    if (s.bins[i] > 0) atomicAdd(&w.bins[i], s.bins[i]);
  if (threadIdx.x == 0) {
    w.totals[block] = mass;
    w.largest[block] = static_cast<unsigned>(largest);
  }
}

__device__ __forceinline__ uint64_t total_of(const Work& w) {
  uint64_t total = 0;
  for (int i = 0; i < kSplit; ++i) total += w.totals[i];
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(Arguments a, Work* work) {
  KH_DYNAMIC_SHARED(Shared, shared);
  Shared& s = *shared;
  const int64_t sample = blockIdx.x / kSplit;
  const int block = blockIdx.x % kSplit;
  Work& w = work[sample];
  Rules r;
  const int64_t number = row_of(a, sample, &r);
  if (number < 0) return;
  const Row<T> row(a, number);
  Plan plan = {kLeast, kLeast, kLeast, 0, 0};
  if (r.any()) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) s.bins[i] = w.bins[i];
    int largest = 0;
    for (int i = 0; i < kSplit; ++i)
      if (static_cast<int>(w.largest[i]) > largest) largest = static_cast<int>(w.largest[i]);
    __syncthreads();
    plan = plan_of<T>(r, r.needs_total() ? total_of(w) : 0, largest, s);
  }
  if (block == 0 && threadIdx.x == 0) w.plan = plan;
  if (plan.counted > kCapacity) return;  // the last kernel reads the row itself
  bool bad;
  const uint64_t above = warp_sum(gather(row, slice_of(row, block, kSplit), plan, s, &bad));
  if (lane() == 0) w.above[block * kWarps + warp()] = above;
  bad = __syncthreads_or(bad);
  const unsigned listed = s.listed < kCapacity ? s.listed : kCapacity;
  if (threadIdx.x == 0) {
    w.bad[block] = bad;
    s.key = listed > 0 ? atomicAdd(&w.listed, listed) : 0;
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < listed && s.key + i < kCapacity; i += kThreads)
    w.list[s.key + i] = s.list[i];
}

template <class T>
__global__ void __launch_bounds__(kThreads) draw_kernel(Arguments a, const Work* work) {
  KH_DYNAMIC_SHARED(Shared, shared);
  Shared& s = *shared;
  const int64_t sample = blockIdx.x;
  const Work& w = work[sample];
  Rules r;
  const int64_t number = row_of(a, sample, &r);
  if (number < 0) {
    if (threadIdx.x == 0) answer(a, sample, 0, false);
    return;
  }
  if (threadIdx.x == 0) s.random = random_of(a, sample);
  const Row<T> row(a, number);
  const Plan plan = w.plan;
  const uint64_t total = r.needs_total() ? total_of(w) : 0;
  if (plan.counted > kCapacity) {
    gather_and_draw(a, sample, row, r, plan, total, s);
    return;
  }
  bool bad = false;
  for (int i = 0; i < kSplit; ++i) bad = bad || w.bad[i] != 0;
  if (bad) {
    if (threadIdx.x == 0) answer(a, sample, 0, false);
    return;
  }
  // A segment is kSplit warps, which wrote side by side.
  const uint64_t above = lane() < kSplit ? w.above[warp() * kSplit + lane()] : 0;
  const uint64_t segment = warp_sum(above);
  if (lane() == 0) s.segments[warp()] = segment;
  const unsigned counted = plan.counted > 0 ? w.listed : 0;  // not cleared without filters
  const int listed = static_cast<int>(counted < kCapacity ? counted : kCapacity);
  for (int i = threadIdx.x; i < listed; i += kThreads) s.list[i] = w.list[i];
  __syncthreads();
  draw(a, sample, row, r, plan, listed, total, s);
}

// ---- launcher -------------------------------------------------------------------------------

constexpr int64_t kVocabLimit = 1 << 19;
constexpr int kSharedBytes = sizeof(Shared);
static_assert(kSharedBytes <= 48 << 10, "what every platform has");
static_assert(kSplit <= kLanes, "a lane takes each block's part of a segment");

// Whether some row may have a filter: else nothing is counted.
bool filtered(const Arguments& a) {
  return a.top_k.data != nullptr || a.top_p.data != nullptr || a.min_p.data != nullptr ||
         (a.top_k_value > 0 && a.top_k_value < a.vocab_size) || a.top_p_value < 1.f ||
         a.min_p_value > 0.f;
}

template <class T>
int run(const Arguments& a, int64_t blocks_a_row, Work* work, stream_t stream) {
  const dim3 samples(static_cast<unsigned>(a.batch_size)), threads(kThreads);
  if (blocks_a_row == 1) return launch(sample_kernel<T>, samples, threads, kSharedBytes, stream, a);
  const dim3 blocks(static_cast<unsigned>(a.batch_size * kSplit));
  int status = 0;
  if (filtered(a)) {
    status = launch(clear_kernel, blocks, threads, 0, stream, work);
    if (status == 0)
      status = launch(count_kernel<T>, blocks, threads, kSharedBytes, stream, a, work);
  }
  if (status == 0)
    status = launch(gather_kernel<T>, blocks, threads, kSharedBytes, stream, a, work);
  if (status == 0) status = launch(draw_kernel<T>, samples, threads, kSharedBytes, stream, a, work);
  return status;
}

// One number for each row or sample.
bool vector_of(const kh_tensor& t, int64_t size) {
  return well_formed(t) && t.ndim == 1 && t.shape[0] == size;
}
bool integers_of(const kh_tensor& t, int64_t size) {
  return !present(t) || (vector_of(t, size) && (t.dtype == KH_INT32 || t.dtype == KH_INT64));
}
bool shares_of(const kh_tensor& t, int64_t size) {
  return !present(t) || (vector_of(t, size) && t.dtype == KH_FLOAT32);
}
bool random_words_of(const kh_tensor& t, int64_t size) {
  return !present(t) || ((vector_of(t, size) || vector_of(t, 1)) && t.dtype == KH_INT64);
}

Numbers numbers_of(const kh_tensor& t) {
  if (!present(t)) return {nullptr, 0, false};
  return {t.data, t.shape[0] == 1 ? 0 : t.stride[0], t.dtype == KH_INT64};
}

int32_t sampling_launch(const kh_top_k_top_p_sampling_from_probs_args& a, stream_t stream) {
  KH_REQUIRE(present(a.probs) && well_formed(a.probs) && a.probs.ndim == 2, "probs must be [R, V]");
  KH_REQUIRE(present(a.tokens) && a.tokens.ndim == 1 && a.tokens.dtype == KH_INT32 &&
                 well_formed(a.tokens),
             "tokens must be int32 [B]");
  const int64_t num_rows = a.probs.shape[0], vocab_size = a.probs.shape[1];
  const int64_t batch_size = a.tokens.shape[0];
  KH_REQUIRE(!present(a.valid) || (a.valid.dtype == KH_BOOL && vector_of(a.valid, batch_size)),
             "valid must be bool [B]");
  KH_REQUIRE(integers_of(a.indices, batch_size) && (present(a.indices) || batch_size == num_rows),
             "indices must be int32 or int64 [B], and are needed where B is not R");
  KH_REQUIRE(integers_of(a.top_k, num_rows) && shares_of(a.top_p, num_rows) &&
                 shares_of(a.min_p, num_rows),
             "top_k must be int32 or int64 [R], top_p and min_p fp32 [R]");
  KH_REQUIRE(random_words_of(a.seed, batch_size) && random_words_of(a.offset, batch_size),
             "seed and offset must be int64 [B] or [1]");
  if (batch_size == 0) return 0;
  KH_REQUIRE(vocab_size > 0 && vocab_size < kVocabLimit, "V must lie in [1, 2^19)");
  KH_REQUIRE(batch_size <= kMaxGridX / kSplit, "more samples than a grid has blocks");
  KH_REQUIRE(a.blocks_a_row == 1 || a.blocks_a_row == kSplit, "blocks_a_row must be 1 or %d",
             kSplit);
  KH_REQUIRE(a.blocks_a_row == 1 ||
                 (present(a.workspace) && a.workspace.dtype == KH_UINT8 && a.workspace.ndim == 1 &&
                  well_formed(a.workspace) && a.workspace.stride[0] == 1 &&
                  aligned(a.workspace.data, alignof(Work)) &&
                  a.workspace.shape[0] / batch_size >= static_cast<int64_t>(sizeof(Work))),
             "workspace must have %d bytes a sample", static_cast<int>(sizeof(Work)));

  Arguments args = {};
  args.probs = a.probs.data;
  args.row_stride = a.probs.stride[0];
  args.column_stride = a.probs.stride[1];
  args.num_rows = num_rows;
  args.batch_size = batch_size;
  args.vocab_size = static_cast<int>(vocab_size);
  args.joint = a.joint != 0;
  args.one_stream = present(a.seed) && a.seed.shape[0] == batch_size;
  args.top_k = numbers_of(a.top_k);
  args.top_p = numbers_of(a.top_p);
  args.min_p = numbers_of(a.min_p);
  args.top_k_value = a.top_k_value;
  args.top_p_value = static_cast<float>(a.top_p_value);
  args.min_p_value = static_cast<float>(a.min_p_value);
  args.indices = numbers_of(a.indices);
  args.seed = numbers_of(a.seed);
  args.offset = numbers_of(a.offset);
  args.seed_value = a.seed_value;
  args.offset_value = a.offset_value;
  args.tokens = static_cast<int32_t*>(a.tokens.data);
  args.token_stride = a.tokens.stride[0];
  args.valid = present(a.valid) ? static_cast<uint8_t*>(a.valid.data) : nullptr;
  args.valid_stride = present(a.valid) ? a.valid.stride[0] : 0;
  Work* work = static_cast<Work*>(a.workspace.data);
  return for_float_type(a.probs.dtype, "probs", [&](auto type) {
    using T = typename decltype(type)::type;
    return launched(run<T>(args, a.blocks_a_row, work, stream));
  });
}

}  // namespace
}  // namespace kh

KH_EXPORT int32_t kh_top_k_top_p_sampling_from_probs(
    const kh_top_k_top_p_sampling_from_probs_args* args, void* stream) {
  kh::DeviceGuard guard(static_cast<int>(args->device));
  if (guard.status() != 0) return kh::launched(guard.status());
  return kh::sampling_launch(*args, static_cast<kh::stream_t>(stream));
}
