// SPDX-License-Identifier: Apache-2.0
// top_k_top_p_sampling_from_probs: one token a sample, to the bit as docs/sampling.md defines it.
//
// What is kept is everything of at least a threshold, and masses are integers, so that no order of
// summation matters. The row is read once, and little of it again:
//
//  1. Bracket: some thousands of its elements, counted by value, say between which two values the
//     threshold most likely lies. This is a guess; it decides the speed, never the result.
//  2. Stream: all elements are read. What lies above the bracket is summed, exactly, for each part
//     of the row; what lies in it is listed, part by part.
//     Where top-k is small both are done by groups: the largest value of each group of elements is
//     kept; as many groups as top-k have a bound in common, and what reaches it, in groups that are
//     read again, is the list. No guess: the list holds the threshold, if it is long enough.
//  3. Threshold: from the list, by histogram and then by comparing the last few with each other.
//     The exact sums show whether the bracket held it.
//  4. Draw: the parts' masses, with those of the list, say in which part the token lies. Only that
//     one is read again.
//
// Where the bracket missed, or the list is too short for what lies in it, the threshold comes from
// exact histograms of the row: at most ten more readings, slow and rare. The number of readings is
// bounded whatever the data.
//
// A block takes a sample, and its warps the parts of the row. Where samples are few several blocks
// share a row: each takes a part through steps 1 and 2 (with the same bracket, as all look at the
// same elements, or a bound of its own), a second launch does the rest. No block waits for another.
//
// Bound by reading the row, and by about 15 instructions an element; with few samples by latency,
// that is by barriers and loads one after the other. 512 threads of up to 64 registers: two blocks
// on an SM of sm_90, so that one can stream while the other finishes. Tuned on an H200.
#include "launcher.muh"

namespace kh {
namespace {

// ---- shapes ---------------------------------------------------------------------------------

constexpr int kThreads = 512;
constexpr int kLanes = 32;  // that shuffle with each other
constexpr int kWarps = kThreads / kLanes;
constexpr int kMaxBlocks = 32;  // that share a row
static_assert(kWarps <= kLanes && kMaxBlocks <= kLanes, "a warp sums what warps or blocks bring");

constexpr unsigned kLeast = 83u << 23;  // bits of 2^-44, the least value that has mass
constexpr unsigned kOne = 0x3f800000u;  // 1.0; from here on all have the mass of 1
constexpr unsigned kInfinity = 0x7f800000u;
constexpr uint64_t kWholeMass = uint64_t{1} << 44;

constexpr int kCapacity = 4096;  // entries of the list

// Bins of the sample: 128 for each of the 44 powers of two that have mass. The last one takes all
// larger values too.
constexpr int kBinBits = 16;
constexpr int kBins = (kOne - kLeast) >> kBinBits;
constexpr int kBinsAThread = kBins / kThreads;
static_assert(kBins % kThreads == 0, "every thread takes as many bins");

// Bins of the exact histograms, one for each thread.
constexpr int kExactBits = 9;
constexpr int kExactBins = 1 << kExactBits;
static_assert(kExactBins == kThreads, "a thread looks at one bin");
// Bins of the groups' largest values: 32 for each of those powers of two. Every thread takes three.
constexpr int kGroupBinBits = 18;
constexpr int kGroupBins = (kOne - kLeast) >> kGroupBinBits;
constexpr int kGroupBinsAThread = (kGroupBins + kThreads - 1) / kThreads;
constexpr int kGroups = 8;  // at most, of a thread
static_assert(kGroupBinsAThread * kThreads <= kBins, "there is room for them");

constexpr int kLimbs = 4, kLimbBits = 13;  // 2^19 tokens of less than 2^13 stay within 32 bits
constexpr unsigned kLimbMask = (1u << kLimbBits) - 1;

constexpr int64_t kVocabLimit = 1 << 19;
constexpr int kStepElements = 16 * kLanes;  // that a warp reads at once
constexpr int kMaxSteps = kVocabLimit / kWarps / kStepElements + 1;

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

// The same of values in [0, 1] by additions, to be summed in two words: the mass is
// (high - kHighZero) * 2^23 + low - kLowZero.
constexpr unsigned kHighZero = 0x40800000u;  // bits of 4; the last bit of [4, 8) is worth 2^-21
constexpr unsigned kLowZero = 0x35000000u;   // of 2^-21; the last bit from there on is worth 2^-44
struct SplitMass {
  unsigned high, low;
};
__device__ __forceinline__ SplitMass split_mass(float value) {
  const float four = __uint_as_float(kHighZero);
  const float shifted = add_toward_zero(four, value);
  const float rest = __fadd_rn(value, -__fadd_rn(shifted, -four));  // exact, below 2^-21
  const float low = add_toward_zero(__uint_as_float(kLowZero), rest);
  return {__float_as_uint(shifted), __float_as_uint(low)};
}
// Of a sum of up to 256 of them.
__device__ __forceinline__ uint64_t joined(const SplitMass& sum, unsigned count) {
  const unsigned high = sum.high - count * kHighZero, low = sum.low - count * kLowZero;
  return (static_cast<uint64_t>(high) << 23) + low;
}

// The least mass that is not below the share of `total`: ceil(portion * total / 2^24).
__device__ __forceinline__ uint64_t needed_of(unsigned portion, uint64_t total) {
  const uint64_t low = total & 0xffffffu;
  return portion * (total >> 24) + ((portion * low + 0xffffffu) >> 24);
}

__device__ __forceinline__ int group_bin_of(unsigned bits) {
  const unsigned bin = (bits - kLeast) >> kGroupBinBits;
  return bin < kGroupBins ? static_cast<int>(bin) : kGroupBins - 1;
}
__device__ __forceinline__ int bin_of(unsigned bits) {
  const unsigned bin = (bits - kLeast) >> kBinBits;
  return bin < kBins ? static_cast<int>(bin) : kBins - 1;
}
__device__ __forceinline__ unsigned bin_floor(int bin) {
  return kLeast + (static_cast<unsigned>(bin) << kBinBits);
}

// The middle of a bin's values above its floor, by the type that they are stored in.
template <class T>
constexpr unsigned kBinMiddle = 0;  // bf16 has 7 bits of mantissa, so that a bin is one value
template <>
constexpr unsigned kBinMiddle<float> = 1u << (kBinBits - 1);
template <>
constexpr unsigned kBinMiddle<half_t> = 7u << 12;  // fp16 has 10 bits

// ---- shared state ---------------------------------------------------------------------------

// Where to look for the threshold: in [low, high). Exact where it is known to be low == high.
struct Plan {
  unsigned low, high;
  bool exact;
};

// What reading a row, or a part of it, brings beside the list.
struct Found {
  uint64_t total;        // mass, where the rules need it
  uint64_t above;        // mass of what is at least plan.high
  unsigned count_above;  // elements
  unsigned largest;      // bits of the largest value; kInfinity where one is NaN or infinite
  unsigned listed;       // elements in [plan.low, plan.high), also where the list is shorter
};

struct Entry {
  unsigned bits;
  int index;
};

// A bin in which a running sum, from the greatest value down, reaches its limit.
struct Mark {
  unsigned bin, count;
  uint64_t count_before, mass_before, mass_after;
};

// Which part the token lies in.
struct Aim {
  uint64_t support;  // mass of all that is kept
  uint64_t left;     // of the target, when the parts before are passed
  int part;
};

constexpr int kSums = 3;  // that a block makes at once

constexpr int kFew = 256;   // entries that are compared all with all
constexpr int kShares = 2;  // of such a comparison, where a warp takes 32 entries
static_assert(kFew * kShares == kThreads, "a thread has an entry and a share");

constexpr int kMarks = 3;  // of the bracket: its lower end, the upper ones for top-k and top-p

// A bin, and how many of the elements looked at are below it.
struct Edge {
  int bin;
  float below;
};

// Entries, and what comparing them brings, share by share.
struct alignas(16) Few {
  unsigned bits[kFew];
  int index[kFew];
  uint64_t mass[kFew];
  unsigned count[kShares][kFew];  // of entries that are not less
  uint64_t sum[kShares][kFew];    // of their masses; then of those that come before in the row
};

// A histogram of values with their masses.
struct Exact {
  unsigned count[kExactBins];
  unsigned limbs[kLimbs][kExactBins];
};

struct Shared {
  union {  // one after the other
    unsigned bins[kBins];
    Entry list[kCapacity];
  };
  union {  // one after the other
    Exact exact;
    Few group;
    uint16_t groups[kWarps][kGroups * kLanes];  // upper halves of the largest values; then hits
    float below[kSums][kThreads];               // each thread's bins
  };
  union {
    uint64_t words[kSums][kWarps];
    float floats[kSums][kWarps];
  } scratch;
  Found founds[kWarps];
  Found found;
  uint64_t parts[kLanes];             // masses of what is at least plan.high
  unsigned runs[kMaxSteps * kWarps];  // of the list: those of a step side by side
  uint64_t random;
  Aim aim;
  Mark mark;
  int turn[kMarks];  // the threads in whose bins the marks lie
  Edge edge[kMarks];
  int by_count, by_mass;  // thresholds, as bits
  unsigned listed, few_listed, told;
  unsigned low;  // of the list that blocks have made together
  int rounds;    // in which a warp filled the list: runs of each
  bool marked;
};

// A run of list entries that lie in one part of the row.
constexpr int kRunBits = 13;
static_assert(kCapacity < 1 << kRunBits && kVocabLimit << kRunBits <= int64_t{1} << 32,
              "a run's length and its place fit a word");
__device__ __forceinline__ unsigned run_of(unsigned first, unsigned length) {
  return first << kRunBits | length;
}

// What the blocks that share a row hand on, each its own.
struct Part {
  Plan plan;
  Found found;
  Entry list[kCapacity];
};

// ---- sums over a block ----------------------------------------------------------------------

__device__ __forceinline__ int lane() { return threadIdx.x % kLanes; }
__device__ __forceinline__ int warp() { return threadIdx.x / kLanes; }

// Whether this thread is in the warp that does what one warp is enough for. All lanes of a wider
// warp must come along, though 32 would do.
__device__ __forceinline__ bool in_first_warp() { return threadIdx.x < KH_WARP_SIZE; }

template <class V>
__device__ __forceinline__ V warp_sum(V v) {
#pragma unroll
  for (int by = kLanes / 2; by > 0; by /= 2) v += __shfl_xor_sync(~0u, v, by, kLanes);
  return v;
}

// The sum of what the lanes through this one bring.
template <class V>
__device__ __forceinline__ V warp_sum_through(V v) {
#pragma unroll
  for (int by = 1; by < kLanes; by *= 2) {
    const V other = __shfl_up_sync(~0u, v, by, kLanes);
    if (lane() >= by) v += other;
  }
  return v;
}

__device__ __forceinline__ int warp_max(int v) {
#pragma unroll
  for (int by = kLanes / 2; by > 0; by /= 2) {
    const int other = __shfl_xor_sync(~0u, v, by, kLanes);
    v = v < other ? other : v;
  }
  return v;
}

// Of N values at once: v becomes the sum of what the threads before this one bring, `all` the sum
// of what all bring. A barrier must come before the next sums.
template <class V, int N>
__device__ __forceinline__ void sums_before(V (&v)[N], V (&all)[N], V (&scratch)[kSums][kWarps]) {
  static_assert(N <= kSums, "there is room in the scratch");
  V own[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    own[n] = v[n];
    v[n] = warp_sum_through(v[n]);
    if (lane() == kLanes - 1) scratch[n][warp()] = v[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const V through = warp_sum_through(lane() < kWarps ? scratch[n][lane()] : V{});
    all[n] = __shfl_sync(~0u, through, kWarps - 1, kLanes);
    const V before = __shfl_sync(~0u, through, warp() > 0 ? warp() - 1 : 0, kLanes);
    v[n] += (warp() > 0 ? before : V{}) - own[n];
  }
}

// ---- loads ----------------------------------------------------------------------------------

// A row in packs that start on 16-byte boundaries: the first and the last reach past its ends.
template <class T>
struct Row {
  static constexpr int kPack = kVectorBytes / sizeof(T);
  static constexpr int kAhead =
      kStepElements / kLanes / kPack;  // packs that a thread loads at once
  using Values = Pack<T, kPack>;
  struct Step {
    Values at[kAhead];
  };

  const T* data;
  int64_t stride;
  int size;
  int lead;  // elements of the first pack that lie before the row
  int packs;

  __device__ Row(const Arguments& a, int64_t row)
      : data(static_cast<const T*>(a.probs) + row * a.row_stride),
        stride(a.column_stride),
        size(a.vocab_size),
        lead(stride == 1 ? reinterpret_cast<uintptr_t>(data) / sizeof(T) % kPack : 0),
        packs((size + lead + kPack - 1) / kPack) {}

  // Whether packs [first, end) lie in the row, and each in one piece.
  __device__ __forceinline__ bool holds(int first, int end) const {
    return stride == 1 && first * kPack >= lead && end * kPack - lead <= size;
  }
  // Elements outside of the row are zero.
  __device__ __forceinline__ T element(int at) const {
    return at >= 0 && at < size ? data[at * stride] : T{};
  }
  __device__ __forceinline__ Values read(int pack) const {
    const int first = pack * kPack - lead;
    if (holds(pack, pack + 1)) return load<kPack>(data + first);
    Values v;
#pragma unroll
    for (int i = 0; i < kPack; ++i) v.at[i] = element(first + i);
    return v;
  }
};

template <class T>
__device__ __forceinline__ unsigned bits_of(T value) {
  return __float_as_uint(to_float(value));
}

// The part of a row that one warp reads, packs [first, end), in steps as many for all warps.
struct Slice {
  int first, end, steps;
};

__device__ __forceinline__ int packs_a_warp(int packs, int blocks) {
  return (packs + kWarps * blocks - 1) / (kWarps * blocks);
}

template <class T>
__device__ __forceinline__ Slice slice_of(const Row<T>& row, int block, int blocks) {
  constexpr int kStepPacks = Row<T>::kAhead * kLanes;
  const int size = packs_a_warp(row.packs, blocks);
  const int first = (block * kWarps + warp()) * size, end = first + size;
  return {first, end < row.packs ? end : row.packs, (size + kStepPacks - 1) / kStepPacks};
}

// This lane's packs of a step, kLanes apart; zero past the slice's end.
template <class T>
__device__ __forceinline__ typename Row<T>::Step read_step(const Row<T>& row, const Slice& slice,
                                                           int step) {
  constexpr int kPack = Row<T>::kPack, kAhead = Row<T>::kAhead;
  typename Row<T>::Step values;
  const int first = slice.first + step * kAhead * kLanes, end = first + kAhead * kLanes;
  if (end <= slice.end && row.holds(first, end)) {
    const T* own = row.data + ((first + lane()) * kPack - row.lead);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) values.at[k] = load<kPack>(own + k * kLanes * kPack);
    return values;
  }
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    const int pack = first + k * kLanes + lane();
    values.at[k] = pack < slice.end ? row.read(pack) : typename Row<T>::Values{};
  }
  return values;
}

// ---- step 1: the bracket --------------------------------------------------------------------

// How many elements to look at: so many that flat rows too have a list that is short enough.
__device__ __forceinline__ int sample_size(const Rules& r, int vocab_size) {
  if (r.has_k() && r.top_k <= 1024) return 4096;
  if (r.has_k() && r.top_k > 8192) return 32768;
  const int share = vocab_size / (vocab_size > 1 << 17 ? 4 : 8);
  return share < 4096 ? 4096 : share;
}

constexpr int kWholeSupport = 600;  // up to so many elements the list has all that is kept
constexpr int kListable = kCapacity - kCapacity / 16;  // the guess of a length can be short

// A bin's part of the sums of counts, of values and of their squares.
template <class T>
__device__ __forceinline__ void add_bin(float (&sums)[kSums], int bin, unsigned count) {
  const float value = __uint_as_float(bin_floor(bin) + kBinMiddle<T>);
  const float all = static_cast<float>(count) * value;
  sums[0] += static_cast<float>(count);
  sums[1] += all;
  sums[2] += all * value;
}

// Where the threshold most likely lies, from evenly spaced elements of the row. `mass` is what the
// row's probabilities are thought to sum to.
template <class T>
__device__ __forceinline__ Plan bracket(const Row<T>& row, const Rules& r, float mass, Shared& s) {
  constexpr int kPack = Row<T>::kPack, kTogether = 8;  // packs: a cache line
  constexpr int kAhead = 4;
  const Plan unknown = {kInfinity, kInfinity, false};
  if (!r.has_k() && !r.has_p()) return r.min_p > 0.f ? unknown : Plan{kLeast, kLeast, true};
  if (row.size <= kCapacity) return {kLeast, kInfinity, false};

  const int groups = row.packs / kTogether;
  const int wanted = sample_size(r, row.size) / (kTogether * kPack);
  const int apart = (groups + wanted - 1) / wanted;
  const int taken = groups / apart * kTogether;
  typename Row<T>::Values values[kAhead];
  const auto read = [&](int first) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = first + k * kThreads;
      values[k] = at < taken ? row.read(at / kTogether * apart * kTogether + at % kTogether)
                             : typename Row<T>::Values{};
    }
  };
  read(threadIdx.x);
  for (int i = threadIdx.x; i < kBins; i += kThreads) s.bins[i] = 0;
  if (threadIdx.x < kMarks) {
    const int m = static_cast<int>(threadIdx.x);
    const bool counts = m == 1 ? r.has_k() : m == 2 && r.needs_total();
    s.turn[m] = m == 0 ? -1 : kThreads;
    s.edge[m] = {counts ? kBins : 0, static_cast<float>(taken * kPack)};
  }
  __syncthreads();
  for (int first = threadIdx.x; first < taken; first += kThreads * kAhead) {
    if (first >= kThreads * kAhead) read(first);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const unsigned bits = bits_of(values[k].at[i]);
        if (has_mass(bits)) atomicAdd(&s.bins[bin_of(bits)], 1u);
      }
    }
  }
  __syncthreads();

  // Running sums from the least value up: of counts, of values and of their squares.
  const int first_bin = static_cast<int>(threadIdx.x) * kBinsAThread;
  float below[kSums] = {}, all[kSums], own[kSums] = {};
#pragma unroll
  for (int i = 0; i < kBinsAThread; ++i) add_bin<T>(own, first_bin + i, s.bins[first_bin + i]);
#pragma unroll
  for (int n = 0; n < kSums; ++n) below[n] = own[n];
  sums_before(below, all, s.scratch.floats);
  const float size = static_cast<float>(taken * kPack);
  const float scale = static_cast<float>(row.size) / size;  // elements for each looked at
  const float massless = size - all[0];
  below[0] += massless;
  // A mark is taken as passed where the estimate is so many standard deviations beyond it, and a
  // little, for the values of a bin differ.
  const float deviations = 3.5f, slack = 0.003f, others = scale > 1.f ? 1.f - 1.f / scale : 0.f;
  const float spread = deviations * deviations * scale * scale * others, a_share = 1.f / size;
  const float rank = r.has_k() ? static_cast<float>(r.top_k) / scale : size;
  const float rank_error = deviations * sqrtf(rank * others) + 4.f;
  const float tail = static_cast<float>(kWholePortion - r.portion) / kWholePortion * mass;
  // Whether a bin, of what lies below it, is still before the thresholds; past that of top-k; past
  // that of top-p.
  const auto judge = [&](const float(&under)[kSums], int bin, bool(&is)[kMarks]) {
    const float floor = __uint_as_float(bin_floor(bin));
    const float above = size - under[0], mass_below = scale * under[1];
    const float error =  // its square
        spread * (under[2] - under[1] * under[1] * a_share + 4.f * floor * floor);
    const float short_of = tail - (1.f + slack) * mass_below;
    const float beyond = (1.f - slack) * mass_below - tail;
    is[0] = (r.has_k() && above >= rank + rank_error) ||
            (r.needs_total() && short_of >= 0.f && short_of * short_of >= error);
    is[1] = above <= rank - rank_error;
    is[2] = beyond >= 0.f && beyond * beyond >= error;
  };
  // The bins of the one thread where that changes, and the next, are looked at, each by a lane.
  bool at_first[kMarks], at_end[kMarks];
  judge(below, first_bin, at_first);
#pragma unroll
  for (int n = 0; n < kSums; ++n) {
    s.below[n][threadIdx.x] = below[n];
    own[n] += below[n];
  }
  judge(own, first_bin + kBinsAThread, at_end);
  const int thread = static_cast<int>(threadIdx.x);
  if (at_first[0] && !at_end[0]) atomicMax(&s.turn[0], thread);
  if (!at_first[1] && at_end[1]) atomicMin(&s.turn[1], thread);
  if (!at_first[2] && at_end[2]) atomicMin(&s.turn[2], thread);
  __syncthreads();
  if (threadIdx.x < 4 * kLanes) {  // warps of more lanes than 32 must stay together
    const int m = warp() < kMarks ? warp() : 0, turn = s.turn[m];
    const bool found_one = turn >= 0 && turn < kThreads;
    const bool there = found_one && lane() <= kBinsAThread;
    const int bin = (found_one ? turn * kBinsAThread : 0) + lane();
    float own_bin[kSums] = {}, under[kSums];
    if (there && bin < kBins) add_bin<T>(own_bin, bin, s.bins[bin]);
#pragma unroll
    for (int n = 0; n < kSums; ++n)
      under[n] = s.below[n][found_one ? turn : 0] + warp_sum_through(own_bin[n]) - own_bin[n];
    bool is[kMarks];
    judge(under, there ? bin : 0, is);
    const int hit = m == 0 ? is[0] : m == 1 ? is[1] : is[2];
    const int furthest = warp_max(!there ? -kBins : m == 0 ? (hit ? bin : 0) : hit ? -bin : -kBins);
    const int found = m == 0 ? furthest : -furthest;
    if (there && warp() < kMarks && bin == found) s.edge[m] = {found, under[0]};
  }
  __syncthreads();
  const Edge low = s.edge[0].bin == 0 ? Edge{0, massless} : s.edge[0];
  Edge high = s.edge[1].bin > s.edge[2].bin ? s.edge[1] : s.edge[2];
  if (high.bin <= low.bin) high = {kBins, size};
  const float not_below = size - low.below, not_between = size - high.below;
  const float most = r.of_survivors() ? kListable : kWholeSupport;
  if (scale * not_below <= most) return {bin_floor(low.bin), kInfinity, false};
  if (r.of_survivors() || scale * (not_below - not_between) > kListable) return unknown;
  return {bin_floor(low.bin), high.bin < kBins ? bin_floor(high.bin) : kInfinity, false};
}

// ---- step 2: stream -------------------------------------------------------------------------

// Of a pack in which a value is negative, above 1, infinite or NaN: calls `use` with the bits of
// those that have mass. Sets *largest where one is infinite or NaN.
template <class T, class Use>
__device__ __forceinline__ void each_of_odd(const Row<T>& row, int pack, unsigned* largest,
                                            Use use) {
#pragma unroll 1
  for (int i = 0; i < Row<T>::kPack; ++i) {
    const unsigned bits = bits_of(row.element(pack * Row<T>::kPack - row.lead + i));
    if (bits << 1 >= kInfinity << 1) *largest = kInfinity;
    if (has_mass(bits)) use(bits);
  }
}

template <class T>
__device__ __forceinline__ unsigned largest_of(const typename Row<T>::Values& values) {
  unsigned most = 0;
#pragma unroll
  for (int i = 0; i < Row<T>::kPack; ++i) {
    const unsigned bits = bits_of(values.at[i]);
    most = most < bits ? bits : most;
  }
  return most;
}

// Reads a slice, of which `values` is the first step: fills the list from the slices of the block
// and sets s.founds, and s.parts to the warps' masses of what is at least plan.high.
template <class T>
__device__ __forceinline__ void stream(const Row<T>& row, const Slice& slice, const Rules& r,
                                       const Plan& plan, typename Row<T>::Step values, Shared& s) {
  constexpr int kPack = Row<T>::kPack, kAhead = Row<T>::kAhead;
  const bool with_total = r.needs_total();
  if (threadIdx.x == 0) {
    s.listed = 0;
    s.rounds = slice.steps;
  }
  __syncthreads();
  uint64_t total = 0, above = 0;
  unsigned count_above = 0, largest = 0;
  for (int step = 0; step < slice.steps; ++step) {
    if (step > 0) values = read_step(row, slice, step);
    unsigned hits[kAhead] = {}, num_hits = 0;  // elements to list, by pack
    SplitMass all = {0, 0}, high = {0, 0};
    unsigned num_all = 0, num_high = 0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const unsigned most = largest_of<T>(values.at[k]);
      if (most >= plan.low) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          const unsigned bits = bits_of(values.at[k].at[i]);
          if (bits - plan.low < plan.high - plan.low) ++hits[k];
        }
        num_hits += hits[k];
      }
      if (most > kOne) {  // also where one is negative
        const int pack = slice.first + (step * kAhead + k) * kLanes + lane();
        each_of_odd(row, pack, &largest, [&](unsigned bits) {
          largest = largest < bits ? bits : largest;
          total += mass_of(bits);
          if (bits >= plan.high) {
            above += mass_of(bits);
            ++count_above;
          }
        });
        continue;
      }
      largest = largest < most ? most : largest;
      if (!with_total && most < plan.high) continue;
      SplitMass mass[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        mass[i] = split_mass(to_float(values.at[k].at[i]));
        all.high += mass[i].high;
        all.low += mass[i].low;
      }
      num_all += kPack;
      if (most < plan.high) continue;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        if (bits_of(values.at[k].at[i]) < plan.high) continue;
        high.high += mass[i].high;
        high.low += mass[i].low;
        ++num_high;
      }
    }
    total += joined(all, num_all);
    above += joined(high, num_high);
    count_above += num_high;

    // The warp's entries of a step lie together, so that it finds them again.
    const unsigned through = warp_sum_through(num_hits);
    unsigned first = 0;
    if (lane() == kLanes - 1) {
      if (through > 0) first = atomicAdd(&s.listed, through);
      s.runs[step * kWarps + warp()] = run_of(first, through);
    }
    unsigned at = __shfl_sync(~0u, first, kLanes - 1, kLanes) + through - num_hits;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (hits[k] == 0) continue;
      const int pack = slice.first + (step * kAhead + k) * kLanes + lane();
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const unsigned bits = bits_of(values.at[k].at[i]);
        if (bits - plan.low >= plan.high - plan.low) continue;
        if (at < kCapacity) s.list[at] = {bits, pack * kPack - row.lead + i};
        ++at;
      }
    }
  }
  if (with_total) total = warp_sum(total);
  if (plan.high < kInfinity) {
    above = warp_sum(above);
    count_above = warp_sum(count_above);
  }
  largest = static_cast<unsigned>(warp_max(static_cast<int>(largest)));
  if (lane() == 0) {
    s.founds[warp()] = {total, above, count_above, largest, 0};
    s.parts[warp()] = above;
  }
  __syncthreads();
}

// ---- steps 1 and 2 where top-k is small -----------------------------------------------------

// Steps of a slice to a group: a power of two.
__device__ __forceinline__ int group_shift(int steps) {
  int shift = 0;
  while (steps > kGroups << shift) ++shift;
  return shift;
}

// Whether a block has groups enough to tell top-k's threshold from their largest values.
__device__ __forceinline__ bool by_groups(const Rules& r, const Slice& slice, int vocab_size,
                                          int blocks) {
  if (!r.has_k() || vocab_size <= kCapacity) return false;
  const int shift = group_shift(slice.steps);
  const uint64_t groups =
      static_cast<uint64_t>((slice.steps + (1 << shift) - 1) >> shift) * kThreads;
  return r.top_k <= kFew && 2 * r.top_k <= groups && r.top_k * blocks <= kCapacity / 2;
}

// Reads a slice, of which `values` is the first step, and lists, from the slices of the block, all
// that is at least a value which `top_k` elements of the block reach. No guess: that many groups of
// a thread's elements have one that does. Of the groups those alone are read again. Sets s.founds
// and s.parts as `stream` does, for a bracket without an upper end.
template <class T>
__device__ __forceinline__ Plan stream_groups(const Row<T>& row, const Slice& slice, const Rules& r,
                                              typename Row<T>::Step values, Shared& s) {
  constexpr int kPack = Row<T>::kPack, kAhead = Row<T>::kAhead;
  const bool with_total = r.needs_total();
  const int shift = group_shift(slice.steps), thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kGroupBinsAThread; ++i) s.bins[thread + i * kThreads] = 0;
  if (threadIdx.x == 0) {
    s.listed = 0;
    s.rounds = 0;
    s.marked = false;
  }
  __syncthreads();
  uint64_t total = 0;
  unsigned largest = 0;
  int num_groups = 0;
  for (int step = 0; step < slice.steps; ++num_groups) {
    unsigned group = 0;
    for (const int end = step + (1 << shift); step < end && step < slice.steps; ++step) {
      if (step > 0) values = read_step(row, slice, step);
      SplitMass all = {0, 0};
      unsigned num_all = 0;
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const unsigned most = largest_of<T>(values.at[k]);
        if (most > kOne) {  // also where one is negative
          const int pack = slice.first + (step * kAhead + k) * kLanes + lane();
          each_of_odd(row, pack, &largest, [&](unsigned bits) {
            group = group < bits ? bits : group;
            total += mass_of(bits);
          });
          continue;
        }
        group = group < most ? most : group;
        if (!with_total) continue;
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          const SplitMass mass = split_mass(to_float(values.at[k].at[i]));
          all.high += mass.high;
          all.low += mass.low;
        }
        num_all += kPack;
      }
      total += joined(all, num_all);
    }
    s.groups[warp()][num_groups * kLanes + lane()] = static_cast<uint16_t>(group >> 16);
    if (has_mass(group)) atomicAdd(&s.bins[group_bin_of(group)], 1u);
    largest = largest < group ? group : largest;
  }
  if (with_total) total = warp_sum(total);
  largest = static_cast<unsigned>(warp_max(static_cast<int>(largest)));
  if (lane() == 0) {
    s.founds[warp()] = {total, 0, 0, largest, 0};
    s.parts[warp()] = 0;
  }
  __syncthreads();

  // The bin, from the greatest value down, with which there are `top_k` groups.
  const int last = (kThreads - 1 - thread) * kGroupBinsAThread;
  unsigned own[kGroupBinsAThread];
  float before[1] = {}, all[1];
#pragma unroll
  for (int i = 0; i < kGroupBinsAThread; ++i) {
    own[i] = s.bins[last + i];
    before[0] += static_cast<float>(own[i]);
  }
  const float whole = before[0], wanted = static_cast<float>(r.top_k);
  sums_before(before, all, s.scratch.floats);
  if (before[0] < wanted && before[0] + whole >= wanted) {
    int bin = kGroupBinsAThread;
    for (float count = before[0]; count < wanted;) count += static_cast<float>(own[--bin]);
    s.marked = true;
    s.mark.bin = static_cast<unsigned>(last + bin);
  }
  __syncthreads();
  const unsigned low = s.marked ? kLeast + (s.mark.bin << kGroupBinBits) : kLeast;

  // The groups to read again, warp by warp; then, by all lanes alike, their packs.
  unsigned hits = 0, num_hits = 0;
  for (int group = 0; group < num_groups; ++group) {
    if (s.groups[warp()][group * kLanes + lane()] < low >> 16) continue;
    hits |= 1u << group;
    ++num_hits;
  }
  const unsigned through = warp_sum_through(num_hits);
  static_assert(kAhead == 2 || kAhead == 4, "a power of two");
  const int pack_shift = shift + kAhead / 2, packs_a_group = 1 << pack_shift;
  const int packs = static_cast<int>(__shfl_sync(~0u, through, kLanes - 1, kLanes)) * packs_a_group;
  if (lane() == 0) atomicMax(&s.rounds, (packs + kAhead * kLanes - 1) / (kAhead * kLanes));
  __syncthreads();
  for (unsigned at = through - num_hits; hits != 0; hits &= hits - 1)
    s.groups[warp()][at++] =
        static_cast<uint16_t>((__ffs(static_cast<int>(hits)) - 1) * kLanes + lane());
  __syncthreads();
  const bool too_many = s.rounds > kMaxSteps;  // and too many to list
  const int rounds = too_many ? 0 : s.rounds;
  if (too_many && thread == 0) s.listed = kCapacity + 1;
  for (int round = 0; round < rounds; ++round) {
    int pack_of[kAhead];
    unsigned listed = 0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = (round * kAhead + k) * kLanes + lane();
      pack_of[k] = row.packs;
      if (at < packs) {
        const int hit = s.groups[warp()][at >> pack_shift];
        const int in_slice = (hit / kLanes << pack_shift) + (at & (packs_a_group - 1));
        pack_of[k] = slice.first + in_slice * kLanes + hit % kLanes;
      }
      values.at[k] = pack_of[k] < slice.end ? row.read(pack_of[k]) : typename Row<T>::Values{};
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
#pragma unroll
      for (int i = 0; i < kPack; ++i) listed += bits_of(values.at[k].at[i]) - low < kInfinity - low;
    const unsigned all_listed = warp_sum_through(listed);
    unsigned first = 0;
    if (lane() == kLanes - 1) {
      if (all_listed > 0) first = atomicAdd(&s.listed, all_listed);
      s.runs[round * kWarps + warp()] = run_of(first, all_listed);
    }
    unsigned at = __shfl_sync(~0u, first, kLanes - 1, kLanes) + all_listed - listed;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const unsigned bits = bits_of(values.at[k].at[i]);
        if (bits - low >= kInfinity - low) continue;
        if (at < kCapacity) s.list[at] = {bits, pack_of[k] * kPack - row.lead + i};
        ++at;
      }
    }
  }
  __syncthreads();
  return {low, kInfinity, false};
}

// The sum of what up to 32 parts brought. Called by the lanes of the first warp, each with a part.
__device__ __forceinline__ Found sum_of(const Found& part) {
  return {warp_sum(part.total), warp_sum(part.above), warp_sum(part.count_above),
          static_cast<unsigned>(warp_max(static_cast<int>(part.largest))), warp_sum(part.listed)};
}

// Sets s.found to the sum of what the warps of this block brought.
__device__ __forceinline__ void sum_warps(Shared& s) {
  if (in_first_warp()) {
    Found found = sum_of(lane() < kWarps ? s.founds[lane()] : Found{});
    found.listed = s.listed;
    if (threadIdx.x == 0) s.found = found;
  }
  __syncthreads();
}

// ---- step 3: the threshold ------------------------------------------------------------------

struct Selected {
  unsigned bits;
  uint64_t mass;  // of all that is at least that
  bool found;
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

// ---- few entries, compared all with all

// Copies the list's entries in [low, high) into s.group. Returns how many there are.
__device__ __forceinline__ unsigned copy_few(unsigned listed, unsigned low, unsigned high,
                                             Shared& s) {
  if (threadIdx.x < kFew) s.group.bits[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    s.few_listed = s.told = 0;
    s.by_count = s.by_mass = 0;
  }
  __syncthreads();
  for (unsigned base = 0; base < listed; base += kThreads) {
    const unsigned i = base + threadIdx.x;
    const Entry entry = i < listed ? s.list[i] : Entry{0, 0};
    const bool counts = entry.bits - low < high - low;
    // One addition a warp.
    const unsigned through = warp_sum_through<unsigned>(counts);
    unsigned first = 0;
    if (lane() == kLanes - 1 && through > 0) first = atomicAdd(&s.few_listed, through);
    const unsigned at = __shfl_sync(~0u, first, kLanes - 1, kLanes) + through - 1;
    if (!counts || at >= kFew) continue;
    s.group.bits[at] = entry.bits;
    s.group.index[at] = entry.index;
    s.group.mass[at] = mass_of(entry.bits);
  }
  __syncthreads();
  return s.few_listed;
}

// A thread's entry of s.group, and the part of the others that it is compared with.
struct Pairs {
  int at, first, end;
  bool there;
  unsigned bits;

  __device__ __forceinline__ Pairs(unsigned entries, const Shared& s) {
    const int share = static_cast<int>(threadIdx.x) / kFew;
    const int part = static_cast<int>(entries + 7) / 8 * 4;  // of those past the end bits are 0
    at = static_cast<int>(threadIdx.x) % kFew;
    there = at < static_cast<int>(entries);
    bits = there ? s.group.bits[at] : 0;
    first = share * part;
    end = at / kLanes * kLanes < static_cast<int>(entries) ? first + part : first;
  }
};

// Sets s.group.count and sum of every entry: how many are not less, and their masses.
__device__ __forceinline__ void rank_few(const Pairs& own, Shared& s) {
  unsigned count = 0;
  uint64_t mass = 0;
#pragma unroll 2
  for (int i = own.first; i < own.end; i += 4) {
    const auto bits = load<4>(&s.group.bits[i]);
    const auto low = load<2>(&s.group.mass[i]), high = load<2>(&s.group.mass[i + 2]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool counts = bits.at[j] >= own.bits;
      count += counts;
      mass += counts ? (j < 2 ? low.at[j % 2] : high.at[j % 2]) : 0;
    }
  }
  const int share = static_cast<int>(threadIdx.x) / kFew;
  s.group.count[share][own.at] = count;
  s.group.sum[share][own.at] = mass;
  __syncthreads();
}

// Sets s.mark.mass_after to the mass of what is at least `bits`. Ties know it too: one tells.
__device__ __forceinline__ void tell_mass(const Pairs& own, unsigned bits, uint64_t mass,
                                          Shared& s) {
  if (own.there && own.bits == bits && atomicAdd(&s.told, 1u) == 0) s.mark.mass_after = mass;
}

// The greatest of up to kFew values of s.group such that, with `count` and `mass` of what is
// greater, a limit is reached.
__device__ __forceinline__ Selected select_of_few(unsigned entries, uint64_t count, uint64_t mass,
                                                  uint64_t count_limit, uint64_t mass_limit,
                                                  Shared& s) {
  const Pairs own(entries, s);
  rank_few(own, s);
  count += s.group.count[0][own.at] + s.group.count[1][own.at];
  mass += s.group.sum[0][own.at] + s.group.sum[1][own.at];
  const bool reached = own.there && (count >= count_limit || mass >= mass_limit);
  const int most = warp_max(reached ? static_cast<int>(own.bits) : 0);
  if (lane() == 0 && most > 0) atomicMax(&s.by_count, most);
  __syncthreads();
  const unsigned selected = static_cast<unsigned>(s.by_count);
  tell_mass(own, selected, mass, s);
  __syncthreads();
  return {selected, s.mark.mass_after, true};
}

// ---- histograms

// The greatest value in [low, high) such that `count_limit` elements, or the mass `mass_limit`, are
// at least that. `each` calls its argument with the bits of elements, this thread's share of all
// in that range and of any others; `count` and `mass` are of what is at least `high`. Without
// kMasses there is no limit of mass, and the result has none. Where the elements are the list's,
// `listed` is how many it has; else 0.
template <bool kMasses, class Each>
__device__ Selected select(Each each, unsigned listed, unsigned low, unsigned high, uint64_t count,
                           uint64_t mass, uint64_t count_limit, uint64_t mass_limit, Shared& s) {
  const int own = kExactBins - 1 - static_cast<int>(threadIdx.x);  // from the greatest value down
  for (;;) {
    const int shift = 32 - __clz(static_cast<int>((high - low - 1) >> kExactBits));
    s.exact.count[own] = 0;
#pragma unroll
    for (int limb = 0; kMasses && limb < kLimbs; ++limb) s.exact.limbs[limb][own] = 0;
    if (threadIdx.x == 0) s.marked = false;
    __syncthreads();
    // Neighbours of one bin are added at once: where many tokens tie, threads would queue up.
    int bin = 0;
    unsigned neighbours = 0;
    uint64_t their_mass = 0;
    const auto add = [&] {
      if constexpr (kMasses)
        add_exactly(s, bin, neighbours, their_mass);
      else
        atomicAdd(&s.exact.count[bin], neighbours);
    };
    each([&](unsigned bits) {
      if (bits - low >= high - low) return;
      const int at = static_cast<int>((bits - low) >> shift);
      if (at != bin && neighbours > 0) {
        add();
        neighbours = 0;
        their_mass = 0;
      }
      bin = at;
      ++neighbours;
      if constexpr (kMasses) their_mass += mass_of(bits);
    });
    if (neighbours > 0) add();
    __syncthreads();

    const unsigned own_count = s.exact.count[own];
    uint64_t own_mass = 0, mass_before = 0, whole_mass = 0;
    if constexpr (kMasses) {
      own_mass = exact_mass(s, own);
      uint64_t before[] = {own_mass}, all[1];
      sums_before(before, all, s.scratch.words);
      mass_before = mass + before[0];
      whole_mass = mass + all[0];
      __syncthreads();  // the scratch was read
    }
    float before[] = {static_cast<float>(own_count)}, all[1];  // exact: counts have 19 bits
    sums_before(before, all, s.scratch.floats);
    const uint64_t count_before = count + static_cast<unsigned>(before[0]);
    if (count_before < count_limit && (!kMasses || mass_before < mass_limit) &&
        (count_before + own_count >= count_limit ||
         (kMasses && mass_before + own_mass >= mass_limit))) {
      s.marked = true;
      s.mark = {static_cast<unsigned>(own), own_count, count_before, mass_before,
                mass_before + own_mass};
    }
    __syncthreads();
    if (!s.marked) return {low, whole_mass, false};
    const Mark mark = s.mark;
    const unsigned at = low + (mark.bin << shift);
    if (shift == 0) return {at, mark.mass_after, true};
    low = at;
    if (high - low > 1u << shift) high = low + (1u << shift);
    count = mark.count_before;
    mass = mark.mass_before;
    if (listed > 0 && mark.count <= kFew)
      return select_of_few(copy_few(listed, low, high, s), count, mass, count_limit, mass_limit, s);
    __syncthreads();  // s.mark was read
  }
}

// The same of the row itself, where nothing is at least `high`.
template <class T>
__device__ Selected select_from(const Row<T>& row, unsigned low, uint64_t count_limit,
                                uint64_t mass_limit, Shared& s) {
  const Slice slice = slice_of(row, 0, 1);
  const Selected selected = select<true>(
      [&](auto use) {
        for (int step = 0; step < slice.steps; ++step) {
          const typename Row<T>::Step values = read_step(row, slice, step);
#pragma unroll
          for (int k = 0; k < Row<T>::kAhead; ++k)
#pragma unroll
            for (int i = 0; i < Row<T>::kPack; ++i) use(bits_of(values.at[k].at[i]));
        }
      },
      0, low, kInfinity, 0, 0, count_limit, mass_limit, s);
  __syncthreads();
  return selected;
}

// The threshold of top-k and top-p from the row, slowly.
template <class T>
__device__ Plan narrow(const Row<T>& row, const Rules& r, uint64_t total, Shared& s) {
  unsigned kept = kLeast;
  if (r.of_survivors()) {
    const Selected by_count = select_from(row, kLeast, r.top_k, kNoLimit, s);
    const uint64_t needed = needed_of(r.portion, by_count.mass);
    kept = select_from(row, by_count.bits, kNoLimit, needed, s).bits;
  } else if (r.has_k() || r.has_p()) {
    const uint64_t needed = r.has_p() ? needed_of(r.portion, total) : kNoLimit;
    kept = select_from(row, kLeast, r.top_k, needed, s).bits;
  }
  return {kept, kept, true};
}

// The threshold of top-k and top-p from what streaming brought, or 0 where it lies elsewhere. Where
// top-p takes its share of what top-k keeps, nothing lies above the bracket.
__device__ __forceinline__ unsigned threshold(const Rules& r, const Plan& plan, const Found& found,
                                              Shared& s) {
  if (plan.exact) return plan.high;
  if (!r.has_k() && !r.has_p()) return kLeast;
  if (plan.low == kInfinity || found.listed > kCapacity) return 0;
  const auto each_listed = [&](auto use) {
    for (unsigned i = threadIdx.x; i < found.listed; i += kThreads) use(s.list[i].bits);
  };
  uint64_t needed = r.needs_total() ? needed_of(r.portion, found.total) : kNoLimit;
  if (found.count_above >= r.top_k || found.above >= needed) return 0;
  const unsigned low = plan.low, high = plan.high <= found.largest ? plan.high : found.largest + 1;
  // Where all that has mass is listed, fewer than top-k may have some.
  const unsigned none = low > kLeast ? 0 : kLeast;
  if (found.listed == 0) return none;
  if (r.needs_total()) {
    const Selected selected = select<true>(each_listed, found.listed, low, high, found.count_above,
                                           found.above, r.top_k, needed, s);
    return selected.found ? selected.bits : none;
  }
  const Selected selected = select<false>(each_listed, found.listed, low, high, found.count_above,
                                          0, r.top_k, kNoLimit, s);
  if (!selected.found && none == 0) return 0;
  if (!r.of_survivors()) return selected.found ? selected.bits : none;
  uint64_t mass = 0;
  each_listed([&](unsigned bits) { mass += bits >= selected.bits ? mass_of(bits) : 0; });
  mass = warp_sum(mass);
  if (lane() == 0) s.scratch.words[0][warp()] = mass;
  __syncthreads();
  mass = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) mass += s.scratch.words[0][i];
  needed = needed_of(r.portion, mass);
  return select<true>(each_listed, found.listed, selected.bits, high, 0, 0, kNoLimit, needed, s)
      .bits;
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
    const unsigned bits = bits_of(value);
    return bits - kept < kInfinity - kept ? mass_of(bits) : 0;
  };
  // Every thread takes neighbouring packs, as few as do.
  const int few = (end - first + kThreads - 1) / kThreads, ahead = few < kAhead ? few : kAhead;
  for (int base = first; base < end; base += kThreads * ahead) {
    const int own = base + static_cast<int>(threadIdx.x) * ahead;
    typename Row<T>::Values values[kAhead];
    uint64_t mass = 0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const bool there = k < ahead && own + k < end;
      values[k] = there ? row.read(own + k) : typename Row<T>::Values{};
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) mass += kept_mass(values[k].at[i]);
    }
    uint64_t before[] = {mass}, all[1];
    sums_before(before, all, s.scratch.words);
    if (target < all[0]) {
      if (target < before[0] || target - before[0] >= mass) return;
      uint64_t left = target - before[0];
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
    target -= all[0];
    __syncthreads();
  }
}

// ---- steps 3 and 4 of few entries -----------------------------------------------------------

// A value of which `top_k` entries of the list and few more are at least that, or 0.
__device__ __forceinline__ unsigned low_of_few(const Rules& r, const Plan& plan, unsigned listed,
                                               unsigned largest, Shared& s) {
  const int own = kExactBins - 1 - static_cast<int>(threadIdx.x);  // from the greatest value down
  const int shift = 32 - __clz(static_cast<int>((largest - plan.low) >> kExactBits));
  s.exact.count[own] = 0;
  if (threadIdx.x == 0) s.marked = false;
  __syncthreads();
  for (unsigned i = threadIdx.x; i < listed; i += kThreads) {
    const unsigned bits = s.list[i].bits;  // of another block perhaps less than plan.low
    if (bits >= plan.low) atomicAdd(&s.exact.count[(bits - plan.low) >> shift], 1u);
  }
  __syncthreads();
  const unsigned count = s.exact.count[own];
  float before[] = {static_cast<float>(count)}, all[1];
  sums_before(before, all, s.scratch.floats);
  const unsigned above = static_cast<unsigned>(before[0]);
  if (above < r.top_k && above + count >= r.top_k && above + count <= kFew) {
    s.marked = true;
    s.mark.bin = own;
  }
  __syncthreads();
  const unsigned low = s.marked ? plan.low + (s.mark.bin << shift) : 0;
  __syncthreads();  // s.marked was read
  return low;
}

// The token of a row of which the list has all that is kept, and few entries. Returns false where
// that is not so.
__device__ __forceinline__ bool draw_of_few(const Arguments& a, int64_t sample, const Rules& r,
                                            const Plan& plan, const Found& found, Shared& s) {
  if (plan.exact || plan.low == kInfinity || plan.high != kInfinity || found.listed > kCapacity)
    return false;
  unsigned low = plan.low;
  if (found.listed > kFew) {
    if (!r.has_k() || r.top_k > kFew) return false;
    low = low_of_few(r, plan, found.listed, found.largest, s);
    if (low == 0) return false;
  }
  const unsigned entries = copy_few(found.listed, low, kInfinity, s);
  const Pairs own(entries, s);
  rank_few(own, s);
  const unsigned count = s.group.count[0][own.at] + s.group.count[1][own.at];
  const uint64_t mass = s.group.sum[0][own.at] + s.group.sum[1][own.at];
  unsigned kept = low;
  if (r.has_k()) {
    const int most = warp_max(own.there && count >= r.top_k ? static_cast<int>(own.bits) : 0);
    if (lane() == 0 && most > 0) atomicMax(&s.by_count, most);
    __syncthreads();
    if (s.by_count == 0) return false;
    kept = static_cast<unsigned>(s.by_count);
  }
  if (r.has_p()) {
    if (r.of_survivors()) {
      tell_mass(own, kept, mass, s);
      __syncthreads();
    }
    const uint64_t needed = needed_of(r.portion, r.needs_total() ? found.total : s.mark.mass_after);
    const int most = warp_max(own.there && mass >= needed ? static_cast<int>(own.bits) : 0);
    if (lane() == 0 && most > 0) atomicMax(&s.by_mass, most);
    __syncthreads();
    if (s.by_mass == 0 && !r.has_k()) return false;
    if (kept < static_cast<unsigned>(s.by_mass)) kept = static_cast<unsigned>(s.by_mass);
  }
  const unsigned least = __float_as_uint(__fmul_rn(r.min_p, __uint_as_float(found.largest)));
  if (kept < least) kept = least;

  // Masses of what is kept, and of that of it which comes before in the row.
  const int index = own.there ? s.group.index[own.at] : 0;
  uint64_t before = 0, support = 0;
#pragma unroll 2
  for (int i = own.first; i < own.end; i += 4) {
    const auto bits = load<4>(&s.group.bits[i]);
    const auto indices = load<4>(&s.group.index[i]);
    const auto low_two = load<2>(&s.group.mass[i]), high_two = load<2>(&s.group.mass[i + 2]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint64_t one = bits.at[j] < kept ? 0 : j < 2 ? low_two.at[j % 2] : high_two.at[j % 2];
      support += one;
      before += indices.at[j] < index ? one : 0;
    }
  }
  const int share = static_cast<int>(threadIdx.x) / kFew;
  s.group.sum[share][own.at] = before;
  if (own.at == 0) s.parts[share] = support;
  __syncthreads();
  if (share > 0 || !own.there || own.bits < kept) return true;
  before += s.group.sum[1][own.at];
  const uint64_t target = multiply_high(s.random, s.parts[0] + s.parts[1]);
  if (before <= target && target - before < s.group.mass[own.at]) answer(a, sample, index, true);
  return true;
}

// The parts of which a row's list was made: warps of this block, or blocks.
struct Parts {
  int count, packs;  // packs of each
};

// From s.found, s.parts and the list to the token. Returns false where the plan was of no use; then
// *next is one that is, or is as it was where that is not known.
template <class T>
__device__ __forceinline__ bool draw(const Arguments& a, int64_t sample, const Row<T>& row,
                                     const Rules& r, const Plan& plan, const Parts& parts,
                                     Plan* next, Shared& s) {
  const Found found = s.found;
  if (found.largest >= kInfinity || (r.needs_total() && found.total == 0)) {
    if (threadIdx.x == 0) answer(a, sample, 0, false);
    return true;
  }
  if (draw_of_few(a, sample, r, plan, found, s)) return true;
  unsigned kept = threshold(r, plan, found, s);
  if (kept == 0) return false;
  const unsigned least = __float_as_uint(__fmul_rn(r.min_p, __uint_as_float(found.largest)));
  if (kept < least) kept = least;
  if (kept < plan.low || kept > plan.high) {  // by min-p: other elements are to be summed
    *next = {kept, kept, true};
    return false;
  }

  if (plan.low < plan.high) {  // there is a list
    for (int base = 0; base < parts.count; base += kWarps) {
      const int part = base + warp();
      uint64_t more = 0;
      for (int i = 0; part < parts.count && i < s.rounds; ++i) {
        const unsigned run = s.runs[i * parts.count + part];
        const unsigned first = run >> kRunBits, end = first + run % (1u << kRunBits);
        for (unsigned at = first + lane(); at < end; at += kLanes)
          if (s.list[at].bits >= kept) more += mass_of(s.list[at].bits);
      }
      more = warp_sum(more);
      if (lane() == 0 && part < parts.count) s.parts[part] += more;
    }
    __syncthreads();
  }
  if (in_first_warp()) {
    const uint64_t own = lane() < parts.count ? s.parts[lane()] : 0;
    const uint64_t through = warp_sum_through(own);
    const uint64_t support = __shfl_sync(~0u, through, kLanes - 1, kLanes);
    const uint64_t target = multiply_high(s.random, support);
    const bool passed = through <= target;
    const int part = static_cast<int>(warp_sum<unsigned>(passed));
    const uint64_t left = target - warp_sum(passed ? own : 0);
    if (threadIdx.x == 0) s.aim = {support, left, part};
  }
  __syncthreads();
  const Aim aim = s.aim;
  if (aim.support == 0) {
    if (threadIdx.x == 0) answer(a, sample, 0, false);
    return true;
  }
  const int first = aim.part * parts.packs, end = first + parts.packs;
  search(a, sample, row, first, end < row.packs ? end : row.packs, kept, aim.left, s);
  return true;
}

// ---- kernels --------------------------------------------------------------------------------

// Reads the row by a better plan than one that failed. Not part of its callers, whose registers it
// would take.
template <class T>
__device__ __noinline__ Plan look_again(Row<T> row, Rules r, Plan next, bool first_time,
                                        Shared& s) {
  const uint64_t total = s.found.total;
  const uint64_t apart = total > kWholeMass ? total - kWholeMass : kWholeMass - total;
  if (!next.exact) {
    // A row whose probabilities do not sum to 1 gets a second bracket.
    if (first_time && r.needs_total() && apart > kWholeMass >> 10) {
      next = bracket(row, r, static_cast<float>(total) / kWholeMass, s);
    } else {
      next = narrow(row, r, total, s);
    }
  }
  const Slice slice = slice_of(row, 0, 1);
  stream(row, slice, r, next, read_step(row, slice, 0), s);
  sum_warps(s);
  return next;
}

// The token, from what a plan brought; as often as needed from another plan.
template <class T>
__device__ __forceinline__ void finish(const Arguments& a, int64_t sample, const Row<T>& row,
                                       const Rules& r, Plan plan, Parts parts, Shared& s) {
  Plan next = plan;
  for (bool first_time = true; !draw(a, sample, row, r, plan, parts, &next, s);
       first_time = false) {
    __syncthreads();  // s.found was read
    plan = next = look_again(row, r, next, first_time, s);
    parts = {kWarps, packs_a_warp(row.packs, 1)};
  }
}

// Steps 1 and 2 of one block of a row, of whose slice `values` is the first step.
template <class T>
__device__ __forceinline__ Plan read(const Row<T>& row, const Slice& slice, const Rules& r,
                                     int blocks, const typename Row<T>::Step& values, Shared& s) {
  Plan plan;
  if (by_groups(r, slice, row.size, blocks)) {
    plan = stream_groups(row, slice, r, values, s);
  } else {
    plan = bracket(row, r, 1.f, s);
    stream(row, slice, r, plan, values, s);
  }
  sum_warps(s);
  return plan;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) sample_kernel(Arguments a) {
  KH_DYNAMIC_SHARED(Shared, shared);
  Shared& s = *shared;
  const int64_t sample = blockIdx.x;
  await_last();
  let_next_come();
  Rules r;
  const int64_t number = row_of(a, sample, &r);
  if (number < 0) {
    if (threadIdx.x == 0) answer(a, sample, 0, false);
    return;
  }
  const Row<T> row(a, number);
  const Slice slice = slice_of(row, 0, 1);
  // These are on their way during the first step.
  const typename Row<T>::Step values = read_step(row, slice, 0);
  if (threadIdx.x == kThreads - 1) s.random = random_of(a, sample);
  const Plan plan = read(row, slice, r, 1, values, s);
  finish(a, sample, row, r, plan, {kWarps, packs_a_warp(row.packs, 1)}, s);
}

// The same by several blocks a row: first the reading, then the rest.

template <class T>
__global__ void __launch_bounds__(kThreads, 2) stream_kernel(Arguments a, int blocks, Part* parts) {
  KH_DYNAMIC_SHARED(Shared, shared);
  Shared& s = *shared;
  const int64_t sample = blockIdx.x / blocks;
  await_last();
  let_next_come();
  Rules r;
  const int64_t number = row_of(a, sample, &r);
  if (number < 0) return;
  const Row<T> row(a, number);
  const Slice slice = slice_of(row, static_cast<int>(blockIdx.x % blocks), blocks);
  const typename Row<T>::Step values = read_step(row, slice, 0);
  const Plan plan = read(row, slice, r, blocks, values, s);
  Part& part = parts[blockIdx.x];
  if (threadIdx.x == 0) {
    part.plan = plan;
    part.found = s.found;
  }
  const unsigned listed = s.listed < kCapacity ? s.listed : kCapacity;
  for (unsigned i = threadIdx.x; i < listed; i += kThreads) part.list[i] = s.list[i];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    draw_kernel(Arguments a, int blocks, const Part* all_parts) {
  KH_DYNAMIC_SHARED(Shared, shared);
  Shared& s = *shared;
  const int64_t sample = blockIdx.x;
  // Before the reading kernel has ended: it waited for all that wrote what is read here.
  Rules r;
  const int64_t number = row_of(a, sample, &r);
  if (number >= 0 && threadIdx.x == kThreads - 1) s.random = random_of(a, sample);
  await_last();
  let_next_come();
  if (number < 0) {
    if (threadIdx.x == 0) answer(a, sample, 0, false);
    return;
  }
  const Row<T> row(a, number);
  const Part* parts = all_parts + sample * blocks;
  Plan plan = parts[0].plan;
  if (in_first_warp()) {
    // Each block's list reaches down to a bound of its own; the whole list to the greatest.
    const int low = warp_max(static_cast<int>(lane() < blocks ? parts[lane()].plan.low : 0));
    const Found own = lane() < blocks ? parts[lane()].found : Found{};
    const unsigned first = warp_sum_through(own.listed) - own.listed;
    const Found found = sum_of(own);
    if (warp() == 0) {
      s.parts[lane()] = own.above;
      s.runs[lane()] = run_of(first, own.listed);
      if (lane() == 0) {
        s.found = found;
        s.low = static_cast<unsigned>(low);
        s.rounds = 1;
      }
    }
  }
  __syncthreads();
  plan.low = s.low;
  for (int part = warp(); s.found.listed <= kCapacity && part < blocks; part += kWarps) {
    const unsigned first = s.runs[part] >> kRunBits, listed = s.runs[part] % (1u << kRunBits);
    for (unsigned i = lane(); i < listed; i += kLanes) s.list[first + i] = parts[part].list[i];
  }
  __syncthreads();
  finish(a, sample, row, r, plan, {blocks, packs_a_warp(row.packs, blocks) * kWarps}, s);
}

// ---- launcher -------------------------------------------------------------------------------

constexpr int kSharedBytes = sizeof(Shared);
static_assert(kSharedBytes <= 48 << 10, "what every platform has");

template <class T>
int run(const Arguments& a, int64_t blocks_a_row, Part* parts, stream_t stream) {
  const dim3 samples(static_cast<unsigned>(a.batch_size)), threads(kThreads);
  if (blocks_a_row == 1)
    return launch_early(sample_kernel<T>, samples, threads, kSharedBytes, stream, a);
  const dim3 all(static_cast<unsigned>(a.batch_size * blocks_a_row));
  const int blocks = static_cast<int>(blocks_a_row);
  const int status =
      launch_early(stream_kernel<T>, all, threads, kSharedBytes, stream, a, blocks, parts);
  if (status != 0) return status;
  return launch_early(draw_kernel<T>, samples, threads, kSharedBytes, stream, a, blocks, parts);
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
  KH_REQUIRE(batch_size <= kMaxGridX / kMaxBlocks, "more samples than a grid has blocks");
  KH_REQUIRE(a.blocks_a_row >= 1 && a.blocks_a_row <= kMaxBlocks,
             "blocks_a_row must lie in [1, %d]", kMaxBlocks);
  KH_REQUIRE(a.blocks_a_row == 1 ||
                 (present(a.workspace) && a.workspace.dtype == KH_UINT8 && a.workspace.ndim == 1 &&
                  well_formed(a.workspace) && a.workspace.stride[0] == 1 &&
                  aligned(a.workspace.data, alignof(Part)) &&
                  a.workspace.shape[0] / (batch_size * a.blocks_a_row) >=
                      static_cast<int64_t>(sizeof(Part))),
             "workspace must have %d bytes a block", static_cast<int>(sizeof(Part)));

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
  Part* parts = static_cast<Part*>(a.workspace.data);
  return for_float_type(a.probs.dtype, "probs", [&](auto type) {
    using T = typename decltype(type)::type;
    return launched(run<T>(args, a.blocks_a_row, parts, stream));
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
