// SPDX-License-Identifier: Apache-2.0
// The kernel behind fused_gemv and fused_moe_gemv: out = epilogue(weight @ columns) for up to 16
// columns at a time, each a row of x.
//
// Bound by memory: every code of the weight is read once for up to 16 columns, in accesses of 16
// bytes. A block (blockIdx.x) makes a tile of 16, 32 or 64 rows of the weight; its warps share out
// K in units of 128 bytes of a row. A warp keeps a unit's loads in flight while it works on the
// one before: it decodes 128 bytes' worth of operands at a time ("slice") into shared memory of
// its own, beside the same slice of the columns, and multiplies both as matrices. Codes of int4 and
// fp8 are exact in fp16 and bf16; scales multiply the fp32 sum of a group. The warps' sums are then
// added in the order of warps. Nothing in this depends on the number of columns or their places, so
// a row's result does not either.
//
// With experts, a block (blockIdx.y) serves one place of topk_ids: the first that names its expert
// among 256 places works for all of them, the others end at once.
#include "gemv.muh"
#include "matrix.muh"

namespace kh::gemv {
namespace {

// ---- tile shape -------------------------------------------------------------------------------

constexpr int kPadBytes = 16;  // rows of a tile begin on different banks
constexpr int kLanes = 32;
constexpr int kPlaces = 256;   // of topk_ids that blocks search for their expert

// kLineBytes of operands in shared memory, 128 or 256, make a row's part of a slice.
template <class T, int kSchemeOf, bool kFp8X, int kLineBytes>
struct FormatOf {
  using Operand = T;
  static constexpr int kScheme = kSchemeOf;
  static constexpr bool kXIsFp8 = kFp8X;
  static constexpr int kSlice = kLineBytes / sizeof(T);  // elements of K
  static constexpr int kStride = kSlice + kPadBytes / sizeof(T);
  static constexpr int kShare = kScheme == kDense ? 1 : kScheme == kFp8 ? 2 : 4;  // codes' bytes
  static constexpr int kRowVectors = kLineBytes / kVectorBytes / kShare;  // of codes, in a slice
  // A load of 32 lanes takes as many vectors of a row as leave the banks free when they are stored
  // decoded, from 4, 8 or 16 rows.
  static constexpr int kRowLanes = 8 / kShare;
  static constexpr int kRowsALoad = kLanes / kRowLanes;
  static constexpr int kRowLoads = kTile / kRowsALoad;
  static constexpr int kParts = kRowVectors / kRowLanes;
  static constexpr int kDepth = kShare;  // slices in flight
  static constexpr int kXRowVectors = kRowVectors * kShare / (kXIsFp8 ? 2 : 1);
  static constexpr int kXVectors = kTile * kXRowVectors / kLanes;
};

constexpr int kSegment = 32;  // elements of K; the least size of a group
constexpr int kMaxSegments = 4;

template <class F, int kRowTiles>
struct alignas(32) WarpTiles {
  typename F::Operand rows[kRowTiles * kTile * F::kStride];
  typename F::Operand columns[kTile * F::kStride];
  float row_scale[kMaxSegments][kRowTiles * kTile];  // at the end of a segment of a slice
  float column_scale[kMaxSegments][kTile];
};

// ---- loads ------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t read(const uint8_t* p, int bytes) {
  if (bytes == 4) return *reinterpret_cast<const uint32_t*>(p);
  if (bytes == 2) return *reinterpret_cast<const uint16_t*>(p);
  return *p;
}

// Vector `index` of a row whose accesses are narrow. Apart, for it would be all over the kernel.
__device__ __noinline__ uint4 gather_vector(const uint8_t* row, int64_t stride, int bytes,
                                            int accesses_a_row, int index) {
  uint32_t word[4];
  const int accesses = 4 / bytes;  // for a word
  int64_t access = static_cast<int64_t>(index) * 4 * accesses;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    word[w] = 0;
#pragma unroll 1
    for (int i = 0; i < accesses; ++i, ++access)
      if (access < accesses_a_row) word[w] |= read(row + access * stride, bytes) << (8 * bytes * i);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Vector `index` of a row; zeros past its end.
__device__ __forceinline__ uint4 load_vector(const Codes& c, const uint8_t* row, int index) {
  if (c.access_bytes != kVectorBytes)
    return gather_vector(row, c.access_stride, c.access_bytes, c.accesses_a_row, index);
  if (index >= c.accesses_a_row) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(row + static_cast<int64_t>(index) * kVectorBytes);
}

__device__ __forceinline__ float entry(const Table& t, int64_t at) {
  if (t.dtype == KH_FLOAT32) return static_cast<const float*>(t.data)[at];
  if (t.dtype == KH_FLOAT16) return to_float(static_cast<const half_t*>(t.data)[at]);
  return to_float(static_cast<const bf16_t*>(t.data)[at]);
}

// An infinite scale is NaN: what it makes of single codes is lost in the sum of a group.
template <bool kFloat>
__device__ __forceinline__ float scale_at(const Table& t, int64_t at) {
  const float scale = kFloat ? static_cast<const float*>(t.data)[at] : entry(t, at);
  return scale + (scale - scale);
}

__device__ __forceinline__ int64_t id_at(const Table& t, int64_t at) {
  return t.dtype == KH_INT64 ? static_cast<const int64_t*>(t.data)[at]
                             : static_cast<const int32_t*>(t.data)[at];
}

// ---- decode: codes to operands ----------------------------------------------------------------
//
// Both tricks leave pairs that were apart side by side. K may stand in any order that rows and
// columns share, so the columns are shuffled likewise: see `in_order_of`.

template <class T>
struct Pairs;
template <>
struct Pairs<half_t> {
  static constexpr uint32_t kBase = 0x64006400u;  // 1024: its last bit is worth 1
  static constexpr uint32_t kBaseAndEight = 0x64086408u;
  static constexpr uint32_t kFp8Scale = 0x5c005c00u;  // 2^8, the distance of the exponents' biases
  static constexpr int kFp8Shift = 1;                 // of a code in the high byte
  static constexpr uint16_t kNan = 0x7fff;
  static __device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
    return subtract_half_pairs(a, b);
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    return multiply_half_pairs(a, b);
  }
};
template <>
struct Pairs<bf16_t> {
  static constexpr uint32_t kBase = 0x43004300u;  // 128
  static constexpr uint32_t kBaseAndEight = 0x43084308u;
  static constexpr uint32_t kFp8Scale = 0x7b807b80u;  // 2^120
  static constexpr int kFp8Shift = 4;
  static constexpr uint16_t kNan = 0x7fff;
  static __device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
    return subtract_bf16_pairs(a, b);
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    return multiply_bf16_pairs(a, b);
  }
};

// The integer `v`, up to 256, as both of a pair.
template <class T>
__device__ __forceinline__ uint32_t pair_of(int v) {
  const uint32_t bits = from_float<T>(static_cast<float>(v)).bits;
  return bits | bits << 16;
}

// 8 nibbles to pairs (0, 4) (1, 5) (2, 6) (3, 7) of nibble + base - offset - zero, which is exact.
// The base is the operand of that name, from memory: the compiler joins two steps where it cannot
// know both constants.
template <class T, bool kZeros>
__device__ __forceinline__ uint4 decode_int4(uint32_t q, uint32_t base, uint32_t offset,
                                             uint32_t zero) {
  const auto pair = [&](int i) {
    const uint32_t v = Pairs<T>::subtract((q >> (4 * i) & 0x000f000fu) | base, offset);
    return kZeros ? Pairs<T>::subtract(v, zero) : v;
  };
  return make_uint4(pair(0), pair(1), pair(2), pair(3));
}

// 32 nibbles; the zero is 8 where there is no table of them.
template <class T>
__device__ __forceinline__ void store_int4(T* to, const uint4& v, uint32_t base, bool zeros,
                                           int zero) {
  const uint32_t q[4] = {v.x, v.y, v.z, v.w};
  uint4* vectors = reinterpret_cast<uint4*>(to);
  if (zeros) {
    const uint32_t subtrahend = pair_of<T>(zero);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      vectors[i] = decode_int4<T, true>(q[i], base, Pairs<T>::kBase, subtrahend);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      vectors[i] = decode_int4<T, false>(q[i], base, Pairs<T>::kBaseAndEight, 0);
  }
}

// 4 codes to pairs (0, 2) (1, 3). The code's exponent lands at the bottom of the operand's, whose
// subnormals stand for the code's; the multiplication, exact, moves it to its place.
template <class T>
__device__ __forceinline__ uint2 decode_fp8(uint32_t q) {
  constexpr uint32_t kMagnitude = 0x7f007f00u, kSign = 0x80008000u;
  const auto pair = [](uint32_t high) {
    return Pairs<T>::multiply((high & kSign) | (high & kMagnitude) >> Pairs<T>::kFp8Shift,
                              Pairs<T>::kFp8Scale);
  };
  return make_uint2(pair(q << 8), pair(q));
}

// Whether one of 4 codes is a NaN, 0x7f or 0xff, which the multiplication takes for 480.
__device__ __forceinline__ uint32_t nans(uint32_t q) {
  return ((q & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
}

template <class T>
__device__ __forceinline__ void store_fp8(T* to, const uint4& v) {
  const uint32_t q[4] = {v.x, v.y, v.z, v.w};
  Pack<uint32_t, 4> operands[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint2 pairs = decode_fp8<T>(q[i]);
    operands[i / 2].at[2 * (i % 2)] = pairs.x;
    operands[i / 2].at[2 * (i % 2) + 1] = pairs.y;
  }
  uint32_t* words = reinterpret_cast<uint32_t*>(to);
  store<4>(words, operands[0]);
  store<4>(words + 4, operands[1]);
  if (nans(q[0]) | nans(q[1]) | nans(q[2]) | nans(q[3])) {
    for (int i = 0; i < 4; ++i)
      for (int byte = 0; byte < 4; ++byte)
        if ((q[i] >> (8 * byte) & 0x7fu) == 0x7fu)
          to[4 * i + 2 * (byte % 2) + byte / 2].bits = Pairs<T>::kNan;
  }
}

// 8 elements of x, in pairs as they lie in memory, in the order that decoding leaves.
template <int kScheme>
__device__ __forceinline__ uint4 in_order_of(const uint4& v) {
  const auto low = [](uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; };
  const auto high = [](uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); };
  if constexpr (kScheme == kInt4)
    return make_uint4(low(v.x, v.z), high(v.x, v.z), low(v.y, v.w), high(v.y, v.w));
  if constexpr (kScheme == kFp8)
    return make_uint4(low(v.x, v.y), high(v.x, v.y), low(v.z, v.w), high(v.z, v.w));
  return v;
}

// ---- columns ----------------------------------------------------------------------------------

struct Column {
  const uint8_t* x;
  int64_t x_row;  // for its scales
  int64_t out;    // offset of its first result
  float weight;   // of its place in topk_weights
};

// The columns that a block works for: places in topk_ids of one expert, or rows in order.
struct Columns {
  int64_t expert;
  int count;
  int64_t first;  // place of list[0], or the first row
  uint8_t list[kPlaces];  // places of the expert, after `first`
};

__device__ __forceinline__ int64_t place_of(const Problem& p, const Columns& c, int i) {
  return p.topk_ids.data == nullptr ? c.first + i : c.first + c.list[i];
}

__device__ __forceinline__ int64_t id_of_place(const Problem& p, int64_t place) {
  const int64_t token = place / p.slots;
  return id_at(p.topk_ids, token * p.topk_ids.row_stride +
                               (place - token * p.slots) * p.topk_ids.group_stride);
}

// Finds what block `item` works for, in shared memory; `count` is 0 where it is nothing.
__device__ __forceinline__ void find_columns(const Problem& p, int64_t item, Columns& c) {
  if (p.topk_ids.data == nullptr) {
    if (threadIdx.x == 0) {
      const int64_t left = p.columns - item * kTile;
      c.expert = 0;
      c.first = item * kTile;
      c.count = left < kTile ? static_cast<int>(left) : kTile;
    }
    __syncthreads();
    return;
  }
  const int64_t first = item / kPlaces * kPlaces, left = p.columns - first;
  const int places = left < kPlaces ? static_cast<int>(left) : kPlaces;
  const int own = static_cast<int>(item - first);
  const int64_t expert = id_of_place(p, item);
  if (threadIdx.x == 0) {
    c.expert = expert;
    c.first = first;
    c.count = 0;
  }
  __syncthreads();
  const bool outside = expert < 0 || expert >= p.num_experts;
  bool taken = false;  // by a block before this one
  for (int i = threadIdx.x; i < places; i += blockDim.x)
    if (outside ? i == own : id_of_place(p, first + i) == expert) {
      taken = taken || i < own;
      c.list[atomicAdd(&c.count, 1)] = static_cast<uint8_t>(i);  // in any order: columns do not meet
    }
  if (__syncthreads_or(taken) && threadIdx.x == 0) c.count = 0;
  __syncthreads();
}

__device__ __forceinline__ void describe_column(const Problem& p, int64_t place, Column& column) {
  const int64_t token = place / p.slots, slot = place - token * p.slots;
  column.x_row = p.x_rows_a_token == 1 ? token : place;
  column.x = p.x.data + column.x_row * p.x.row_stride;
  column.out = token * p.out_token_stride + slot * p.out_slot_stride;
  column.weight =
      p.topk_weights.data == nullptr
          ? 1.f
          : entry(p.topk_weights,
                  token * p.topk_weights.row_stride + slot * p.topk_weights.group_stride);
}

// ---- rows -------------------------------------------------------------------------------------

// The weight's row behind row `r` of a tile. SwiGLU's tile is half gate, half the same rows of up.
// Rows past the end stand for the last one; their results are dropped.
template <int kRows>
__device__ __forceinline__ int64_t weight_row(const Problem& p, int64_t tile, int r) {
  const bool halves = p.activation == kSwiGlu;
  const int outputs = halves ? kRows / 2 : kRows;
  const bool up = r >= outputs;
  int64_t row = tile * outputs + (up ? r - outputs : r);
  if (row >= p.outputs) row = p.outputs - 1;
  return up ? p.outputs + row : row;
}

// ---- epilogue ---------------------------------------------------------------------------------

__device__ __forceinline__ float silu(float v) { return __fdiv_rn(v, 1.f + expf(-v)); }

__device__ __forceinline__ float gelu_tanh(float v) {
  constexpr float kSqrt2OverPi = 0.7978845608028654f;
  return 0.5f * v * (1.f + tanhf(kSqrt2OverPi * fmaf(0.044715f * v * v, v, v)));
}

__device__ __forceinline__ void write(const Problem& p, int64_t at, float v) {
  if (p.out_dtype == KH_FLOAT32)
    static_cast<float*>(p.out)[at] = v;
  else if (p.out_dtype == KH_FLOAT16)
    static_cast<half_t*>(p.out)[at] = from_float<half_t>(v);
  else
    static_cast<bf16_t*>(p.out)[at] = from_float<bf16_t>(v);
}

// Rows of zeros for a place whose expert is elsewhere.
template <int kRows>
__device__ void write_zeros(const Problem& p, int64_t tile, const Column& column) {
  const int outputs = p.activation == kSwiGlu ? kRows / 2 : kRows;
  for (int r = threadIdx.x; r < outputs; r += blockDim.x)
    if (tile * outputs + r < p.outputs)
      write(p, column.out + (tile * outputs + r) * p.out_stride, 0.f);
}

// Adds up the warps' sums, in order, and finishes each output of the tile. `sums` is
// [kWarps, kTile columns, kRows] with lines of kLine.
template <int kRows, int kWarps, int kLine>
__device__ __forceinline__ void finish(const Problem& p, int64_t tile, const float* sums,
                                       const Column* columns, int count) {
  const bool halves = p.activation == kSwiGlu;
  const int outputs = halves ? kRows / 2 : kRows;
  const auto sum_of = [&](int r, int column, int64_t row) {
    float sum = sums[column * kLine + r];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[(w * kTile + column) * kLine + r];
    if (p.bias.data != nullptr) sum += entry(p.bias, row * p.bias.row_stride);
    return p.topk_weights.data == nullptr ? sum : sum * columns[column].weight;
  };
  for (int i = threadIdx.x; i < outputs * count; i += kWarps * kLanes) {
    const int column = i / outputs, r = i - column * outputs;
    const int64_t row = tile * outputs + r;
    if (row >= p.outputs) continue;
    float v = sum_of(r, column, row);
    if (halves)
      v = silu(v) * sum_of(outputs + r, column, p.outputs + row);
    else if (p.activation == kSilu)
      v = silu(v);
    else if (p.activation == kGeluTanh)
      v = gelu_tanh(v);
    write(p, columns[column].out + row * p.out_stride, v);
  }
}

// ---- kernel -----------------------------------------------------------------------------------

// One warp's way through its slices of K, every kWarps-th. In the even case rows are whole slices
// and everything moves in vectors: no loads are guarded.
template <class F, int kRowTiles, int kWarps, bool kEven>
class Warp {
 public:
  using T = typename F::Operand;
  using Tiles = WarpTiles<F, kRowTiles>;

  // Sets out for the first loads of the weight.
  __device__ __forceinline__ Warp(const Problem& p, Tiles& tiles, int64_t tile, int64_t expert,
                                  int warp)
      : p_(p),
        tiles_(tiles),
        lane_(threadIdx.x % kLanes),
        first_(warp),
        slices_(expert < p.num_experts ? (p.k + F::kSlice - 1) / F::kSlice : 0) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int i = 0; i < F::kRowLoads; ++i) {
        row_[r][i] = p.weight.data + expert * p.weight.expert_stride +
                     weight_row<kRowTiles * kTile>(p, tile, local_row(r, i)) * p.weight.row_stride;
        if constexpr (kEven) row_[r][i] += vector_of(first_, 0) * kVectorBytes;
      }
#pragma unroll
    for (int d = 0; d < F::kDepth; ++d) load_rows(first_ + d * kWarps, d);
    if constexpr (F::kScheme != kDense) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const int64_t row = weight_row<kRowTiles * kTile>(p, tile, r * kTile + lane_ % kTile);
        scale_[r] = expert * p.weight_scale.expert_stride +
                    row / p.weight_scale.rows_an_entry * p.weight_scale.row_stride;
      }
    }
    if constexpr (F::kScheme == kInt4) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
        zero_[r] = expert * p.weight_zero.expert_stride +
                   weight_row<kRowTiles * kTile>(p, tile, local_row(r, 0)) *
                       p.weight_zero.row_stride;
    }
  }

  // The sums of all the warp's slices, scaled.
  __device__ __forceinline__ void run(const Column* columns, int count,
                                      Products<T> (&total)[kRowTiles]) {
    columns_ = columns;
    count_ = count;
    Products<T>::places(places_, reinterpret_cast<float*>(tiles_.rows));
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) total[r].clear();
    // All warps go round equally often: __syncwarp is for more than 32 lanes where warps are wide.
    for (int round = 0; round < slices_; round += kWarps * F::kDepth) {
#pragma unroll
      for (int d = 0; d < F::kDepth; ++d) {
        const int slice = first_ + round + d * kWarps;
        const bool active = slice < slices_;
        if (active) {
          stage(slice, d);
          load_rows(slice + kWarps * F::kDepth, d);
        }
        __syncwarp();
        if (active) multiply(total);
        __syncwarp();
      }
    }
  }

 private:
  // The row, within the tile, of a lane's vectors.
  __device__ __forceinline__ int local_row(int r, int i) const {
    return r * kTile + i * F::kRowsALoad + lane_ / F::kRowLanes;
  }

  // The number, within the row of a slice, of a lane's vector.
  __device__ __forceinline__ int local_vector(int part) const {
    return part * F::kRowLanes + lane_ % F::kRowLanes;
  }

  __device__ __forceinline__ int64_t vector_of(int slice, int part) const {
    return slice * F::kRowVectors + local_vector(part);
  }

  // The last segments of the last slice may lie past the last group.
  __device__ __forceinline__ int group_of(int slice, int segment) const {
    const int k = slice * F::kSlice + segment * kSegment;
    return (k < p_.k ? k : p_.k - 1) >> p_.group_shift;
  }

  // In the even case rows stand at the slice that is loaded next.
  __device__ __forceinline__ void load_rows(int slice, int d) {
    if (slice >= slices_) return;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int i = 0; i < F::kRowLoads; ++i) {
#pragma unroll
        for (int part = 0; part < F::kParts; ++part)
          if constexpr (kEven)
            codes_[d][r][i][part] = *reinterpret_cast<const uint4*>(
                row_[r][i] + part * F::kRowLanes * kVectorBytes);
          else
            codes_[d][r][i][part] =
                load_vector(p_.weight, row_[r][i], static_cast<int>(vector_of(slice, part)));
        if constexpr (kEven) row_[r][i] += kWarps * F::kRowVectors * kVectorBytes;
      }
  }

  // From registers and, for the columns, memory to shared memory, decoded. What comes from memory
  // is asked for first and stored last.
  __device__ __forceinline__ void stage(int slice, int d) {
    constexpr int kAtOnce = F::kXVectors < 4 ? F::kXVectors : 4;
    uint4 x[kAtOnce];
    load_columns<kAtOnce>(x, slice, 0);
    Scales scales;
    if constexpr (F::kScheme != kDense) load_scales(scales, slice, kBetween - 1);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int i = 0; i < F::kRowLoads; ++i)
#pragma unroll
        for (int part = 0; part < F::kParts; ++part) {
          T* to = tiles_.rows + local_row(r, i) * F::kStride +
                  local_vector(part) * (F::kSlice / F::kRowVectors);
          const uint4& v = codes_[d][r][i][part];
          if constexpr (F::kScheme == kDense)
            *reinterpret_cast<uint4*>(to) = v;
          else if constexpr (F::kScheme == kFp8)
            store_fp8(to, v);
          else
            store_int4(to, v, p_.int4_base, p_.weight_zero.data != nullptr,
                       zero_at(slice, r, part));
        }
    store_columns<kAtOnce>(x, 0);
    if constexpr (F::kScheme != kDense) {
      store_scales(scales, kBetween - 1);
      for (int s = 0; p_.group_shift == 5 && s + 1 < kBetween; ++s) {
        load_scales(scales, slice, s);
        store_scales(scales, s);
      }
    }
#pragma unroll
    for (int first = kAtOnce; first < F::kXVectors; first += kAtOnce)
      if (first * kLanes / F::kXRowVectors < count_) {
        load_columns<kAtOnce>(x, slice, first);
        store_columns<kAtOnce>(x, first);
      }
  }

  // Vectors `first` and following of the columns' slice. Those of columns that are not there repeat
  // the last column: none sees another.
  template <int kCount>
  __device__ __forceinline__ void load_columns(uint4 (&x)[kCount], int slice, int first) const {
    const int index = slice * F::kXRowVectors + lane_ % F::kXRowVectors;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int least = (first + i) * kLanes / F::kXRowVectors;
      if (least >= count_) break;
      const int column = least + lane_ / F::kXRowVectors;
      const uint8_t* row = columns_[column < count_ ? column : count_ - 1].x;
      if constexpr (kEven)
        x[i] = *reinterpret_cast<const uint4*>(row + index * int64_t{kVectorBytes});
      else
        x[i] = load_vector(p_.x, row, index);
    }
  }

  template <int kCount>
  __device__ __forceinline__ void store_columns(const uint4 (&x)[kCount], int first) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int least = (first + i) * kLanes / F::kXRowVectors;
      if (least >= count_) break;
      T* to = tiles_.columns + (least + lane_ / F::kXRowVectors) * F::kStride +
              lane_ % F::kXRowVectors * (F::kSlice / F::kXRowVectors);
      if constexpr (F::kXIsFp8)
        store_fp8(to, x[i]);
      else
        *reinterpret_cast<uint4*>(to) = in_order_of<F::kScheme>(x[i]);
    }
  }

  // Half of the lanes has the rows' and columns' scales at the end of either half of a slice.
  // Groups of 32 end between as well.
  static constexpr int kBetween = F::kSlice / kSegment / 2;
  struct Scales {
    float row[kRowTiles], column;
  };

  __device__ __forceinline__ void load_scales(Scales& to, int slice, int s) const {
    const int group = group_of(slice, lane_ / kTile * kBetween + s);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
      to.row[r] = scale_at<F::kScheme == kFp8>(
          p_.weight_scale, scale_[r] + int64_t{group} * p_.weight_scale.group_stride);
    if constexpr (F::kXIsFp8) {
      const int column = lane_ % kTile < count_ ? lane_ % kTile : count_ - 1;
      to.column = scale_at<true>(p_.x_scale, columns_[column].x_row * p_.x_scale.row_stride +
                                                 int64_t{group} * p_.x_scale.group_stride);
    }
  }

  __device__ __forceinline__ void store_scales(const Scales& from, int s) {
    const int segment = lane_ / kTile * kBetween + s;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
      tiles_.row_scale[segment][r * kTile + lane_ % kTile] = from.row[r];
    if constexpr (F::kXIsFp8) tiles_.column_scale[segment][lane_ % kTile] = from.column;
  }

  // A vector of int4 codes is a segment.
  __device__ __forceinline__ int zero_at(int slice, int r, int part) const {
    if (p_.weight_zero.data == nullptr) return 0;
    return static_cast<const uint8_t*>(
        p_.weight_zero.data)[zero_[r] + int64_t{group_of(slice, local_vector(part))} *
                                            p_.weight_zero.group_stride];
  }

  __device__ __forceinline__ void multiply(Products<T> (&total)[kRowTiles]) const {
    constexpr int kSteps = F::kSlice / kTile;
    if constexpr (F::kScheme == kDense) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) add(step, total);
    } else {
      Products<T> group[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) group[r].clear();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        add(step, group);
        // A slice ends whatever its group does: the scale of both its parts is the same.
        const bool ends = step + 1 == kSteps ||
                          (step % 2 == 1 && p_.group_shift == 5) ||
                          (step % 4 == 3 && p_.group_shift == 6);
        if (step % 2 == 1 && ends) scale_group(step / 2, group, total);
      }
    }
  }

  __device__ __forceinline__ void add(int step, Products<T> (&sums)[kRowTiles]) const {
    Products<T>::add(sums, tiles_.rows + step * kTile, tiles_.columns + step * kTile, F::kStride,
                     count_);
  }

  __device__ __forceinline__ void scale_group(int segment, Products<T> (&group)[kRowTiles],
                                              Products<T> (&total)[kRowTiles]) const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        float scale = tiles_.row_scale[segment][r * kTile + places_.row[i]];
        if constexpr (F::kXIsFp8) scale *= tiles_.column_scale[segment][places_.column[i]];
        total[r].at(i) = fmaf(scale, group[r].at(i), total[r].at(i));
      }
      group[r].clear();
    }
  }

  const Problem& p_;
  Tiles& tiles_;
  const int lane_, first_, slices_;
  const Column* columns_;
  int count_;
  Places places_;
  const uint8_t* row_[kRowTiles][F::kRowLoads];
  int64_t scale_[kRowTiles], zero_[kRowTiles];
  uint4 codes_[F::kDepth][kRowTiles][F::kRowLoads][F::kParts];
};

// Blocks of a multiprocessor that registers must do for.
template <int kRowTiles, int kWarps>
constexpr int kBlocks = (kRowTiles == 1 ? 20 : 12) / kWarps;

template <class F, int kRowTiles, int kWarps, bool kEven>
__global__ void __launch_bounds__(kWarps* kLanes, kBlocks<kRowTiles, kWarps>) gemv_kernel(Problem p) {
  using T = typename F::Operand;
  using Tiles = WarpTiles<F, kRowTiles>;
  constexpr int kRows = kRowTiles * kTile;
  constexpr int kLine = kRows + 4;
  static_assert(sizeof(Tiles) >= kTile * kLine * sizeof(float), "the sums lie where the tiles lay");
  KH_DYNAMIC_SHARED(Tiles, tiles);  // [kWarps]
  __shared__ Columns found;
  __shared__ Column columns[kTile];
  const int warp = threadIdx.x / kLanes;
  const int64_t tile = blockIdx.x;
  const int64_t items = p.topk_ids.data == nullptr ? (p.columns + kTile - 1) / kTile : p.columns;

  for (int64_t item = blockIdx.y; item < items; item += gridDim.y) {
    find_columns(p, item, found);
    const bool inside = found.expert >= 0 && found.expert < p.num_experts;
    for (int first = 0; first < found.count; first += kTile) {
      const int count = found.count - first < kTile ? found.count - first : kTile;
      Warp<F, kRowTiles, kWarps, kEven> work(p, tiles[warp], tile,
                                                inside ? found.expert : p.num_experts, warp);
      if (static_cast<int>(threadIdx.x) < count)
        describe_column(p, place_of(p, found, first + threadIdx.x), columns[threadIdx.x]);
      __syncthreads();
      if (inside) {
        Products<T> total[kRowTiles];
        work.run(columns, count, total);
        Places places;
        Products<T>::places(places, reinterpret_cast<float*>(tiles[warp].rows));
        __syncthreads();
        float* sums = reinterpret_cast<float*>(tiles);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
          for (int i = 0; i < kSums; ++i)
            sums[(warp * kTile + places.column[i]) * kLine + r * kTile + places.row[i]] =
                total[r].at(i);
        __syncthreads();
        finish<kRows, kWarps, kLine>(p, tile, sums, columns, count);
      } else {
        write_zeros<kRows>(p, tile, columns[0]);
      }
      __syncthreads();
    }
    __syncthreads();
  }
}

// ---- launcher ---------------------------------------------------------------------------------

template <class F, int kRowTiles, int kWarps, bool kEven>
int launch_tile(const Problem& p, stream_t stream) {
  constexpr int kRows = kRowTiles * kTile;
  constexpr size_t kBytes = kWarps * sizeof(WarpTiles<F, kRowTiles>);
  static_assert(kBytes <= 48 * 1024, "what every platform grants a block unasked");
  const int outputs = p.activation == kSwiGlu ? kRows / 2 : kRows;
  const int64_t items = p.topk_ids.data == nullptr ? ceil_div(p.columns, kTile) : p.columns;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.outputs, outputs)),
                  static_cast<unsigned>(items < kMaxGridY ? items : kMaxGridY));
  return launch(gemv_kernel<F, kRowTiles, kWarps, kEven>, grid, dim3(kWarps * kLanes), kBytes, stream, p);
}

// Uneven rows get the tile of fewest rows; what a sum's order depends on is the same.
template <class F, int kRowTiles, int kWarps>
int32_t choose_loads(const Problem& p, stream_t stream) {
  const bool even = p.weight.access_bytes == kVectorBytes && p.x.access_bytes == kVectorBytes &&
                    p.k % F::kSlice == 0;
  return launched(even ? launch_tile<F, kRowTiles, kWarps, true>(p, stream)
                       : launch_tile<F, 1, kWarps, false>(p, stream));
}

// In the order of `GEMV_TILES` in kernelhub/backends/native/tiles.py.
template <class T, int kScheme, bool kFp8X = false>
int32_t choose_tile(Problem& p, int64_t tile, stream_t stream) {
  if constexpr (kScheme == kInt4) p.int4_base = Pairs<T>::kBase;
  switch (tile) {
    case 0:
      return choose_loads<FormatOf<T, kScheme, kFp8X, 256>, 1, 4>(p, stream);
    case 1:
      return choose_loads<FormatOf<T, kScheme, kFp8X, 128>, 1, 8>(p, stream);
    case 2:
      return choose_loads<FormatOf<T, kScheme, kFp8X, 256>, 2, 2>(p, stream);
    case 3:
      return choose_loads<FormatOf<T, kScheme, kFp8X, 128>, 2, 4>(p, stream);
    default:
      return fail(kBadArgument, "'tile': there is no tile %lld", static_cast<long long>(tile));
  }
}

}  // namespace

int32_t run(Problem p, Format format, int64_t tile, stream_t stream) {
  switch (format) {
    case kF32:
      return choose_tile<float, kDense>(p, tile, stream);
    case kF16:
      return choose_tile<half_t, kDense>(p, tile, stream);
    case kBf16:
      return choose_tile<bf16_t, kDense>(p, tile, stream);
    case kF16Fp8:
      return choose_tile<half_t, kFp8>(p, tile, stream);
    case kBf16Fp8:
      return choose_tile<bf16_t, kFp8>(p, tile, stream);
    case kFp8Fp8:
      return choose_tile<bf16_t, kFp8, true>(p, tile, stream);
    case kF16Int4:
      return choose_tile<half_t, kInt4>(p, tile, stream);
    case kBf16Int4:
      return choose_tile<bf16_t, kInt4>(p, tile, stream);
  }
  return fail(kBadArgument, "there is no kernel for these dtypes");
}

}  // namespace kh::gemv
