// SPDX-License-Identifier: Apache-2.0
// GEMV with fp16 and bf16 columns on the matrix unit: out = epilogue(weight @ columns), 16 columns
// whether they are there or not, so that one or 16 take about the same time and the same
// arithmetic.
//
// Dense weights are bound by memory, fp8 and int4 by the instructions that decode them. A block
// (blockIdx.x) makes a tile of 16 or 32 rows of the weight; its warps take turns along K. A warp
// keeps its next loads in flight while it works: it decodes a part of its rows ("slice") into
// shared memory of its own, beside the same part of the columns, and multiplies both as matrices of
// 16x16. Codes of int4 and fp8 are exact in fp16 and bf16; scales multiply the fp32 sum of a group.
// The warps' sums are then added in the order of warps.
#include "gemv_block.muh"
#include "matrix.muh"

namespace kh::gemv {
namespace {

enum Scheme { kDense, kFp8, kInt4 };

// ---- tile shape -------------------------------------------------------------------------------

constexpr int kPadBytes = 16;  // rows of a tile begin on different banks

constexpr int kSegment = 32;     // elements of K; the least size of a group
constexpr int kMaxSegments = 4;  // of a slice

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

template <class F>
constexpr int kBetween = F::kSlice / kSegment / 2;  // segments of half a slice

template <class F, int kRowTiles>
struct alignas(32) WarpTiles {
  typename F::Operand rows[kRowTiles * kTile * F::kStride];
  typename F::Operand columns[kTile * F::kStride];
  float row_scale[kMaxSegments][kRowTiles * kTile];  // at the end of a segment of a slice
  float column_scale[kMaxSegments][kTile];
};

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

template <bool kFloat>
__device__ __forceinline__ float scale_at(const Table& t, int64_t at) {
  return infinite_is_nan(kFloat ? static_cast<const float*>(t.data)[at] : entry(t, at));
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
  __device__ __forceinline__ Warp(const Problem& p, Tiles& tiles, int64_t tile, int64_t expert)
      : p_(p),
        tiles_(tiles),
        lane_(threadIdx.x % kLanes),
        first_(threadIdx.x / kLanes),
        slices_((p.k + F::kSlice - 1) / F::kSlice) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int i = 0; i < F::kRowLoads; ++i) {
        row_[r][i] = p.weight.data + expert * p.weight.expert_stride +
                     weight_row<kRowTiles * kTile>(p, tile, local_row(r, i)) * p.weight.row_stride;
        if constexpr (kEven) row_[r][i] += vector_of(first_, 0) * kVectorBytes;
      }
#pragma unroll
    for (int d = 0; d < (kAhead > 0 ? kAhead : 1); ++d) load_rows(first_ + d * kWarps, d);
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
        zero_[r] =
            expert * p.weight_zero.expert_stride +
            weight_row<kRowTiles * kTile>(p, tile, local_row(r, 0)) * p.weight_zero.row_stride;
    }
  }

  // The sums of all the warp's slices, scaled. Groups below 128 end within a slice of 128.
  __device__ __forceinline__ void run(const Column* columns, int count,
                                      Products<T> (&total)[kRowTiles]) {
    columns_ = columns;
    count_ = count;
    Products<T>::places(places_, reinterpret_cast<float*>(tiles_.rows));
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) total[r].clear();
    if (F::kScheme != kDense && p_.group_shift < 7)
      go_round<true>(total);
    else
      go_round<false>(total);
  }

 private:
  static constexpr int kAhead = F::kDepth - 1;  // slices whose loads start before their turn

  // All warps go round equally often: __syncwarp is for more than 32 lanes where warps are wide.
  template <bool kShortGroups>
  __device__ __forceinline__ void go_round(Products<T> (&total)[kRowTiles]) {
    for (int round = 0; round < slices_; round += kWarps * F::kDepth) {
#pragma unroll
      for (int d = 0; d < F::kDepth; ++d) {
        const int slice = first_ + round + d * kWarps;
        const bool active = slice < slices_;
        // Where several slices are in flight, the loads that replace what the last round staged
        // start before the work of this one, that none waits for their addresses.
        if (F::kDepth > 1) load_rows(slice + kAhead * kWarps, (d + kAhead) % F::kDepth);
        if (active) stage(slice, d, kShortGroups);
        __syncwarp();
        if (F::kDepth == 1) load_rows(slice + kWarps, 0);
        if (active) multiply<kShortGroups>(total);
        __syncwarp();
      }
    }
  }

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
            codes_[d][r][i][part] =
                *reinterpret_cast<const uint4*>(row_[r][i] + part * F::kRowLanes * kVectorBytes);
          else
            codes_[d][r][i][part] =
                load_vector(p_.weight, row_[r][i], static_cast<int>(vector_of(slice, part)));
        if constexpr (kEven) row_[r][i] += kWarps * F::kRowVectors * kVectorBytes;
      }
  }

  // From registers and, for the columns, memory to shared memory, decoded. What comes from memory
  // is asked for first and stored last.
  __device__ __forceinline__ void stage(int slice, int d, bool short_groups) {
    constexpr int kAtOnce = F::kXVectors < 4 ? F::kXVectors : 4;
    uint4 x[kAtOnce];
    load_columns<kAtOnce>(x, slice, 0);
    Scales scales;
    if constexpr (F::kScheme != kDense) load_scales(scales, slice, kBetween<F> - 1);
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
      store_scales(scales, kBetween<F> - 1);
      for (int s = 0; short_groups && s + 1 < kBetween<F>; ++s) {
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
  struct Scales {
    float row[kRowTiles], column;
  };

  __device__ __forceinline__ void load_scales(Scales& to, int slice, int s) const {
    const int group = group_of(slice, lane_ / kTile * kBetween<F> + s);
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
    const int segment = lane_ / kTile * kBetween<F> + s;
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

  template <bool kShortGroups>
  __device__ __forceinline__ void multiply(Products<T> (&total)[kRowTiles]) const {
    // Steps whose operands are loaded together: two fit the registers where rows are many.
    constexpr int kTogether = F::kScheme == kDense || kRowTiles > 1 ? 2 : 4;
    // A slice ends whatever its group does: the scale of both its parts is the same. So may all
    // segments be taken for groups.
    constexpr int kSteps = F::kSlice / kTile;
    constexpr int kGroup = kShortGroups ? kSegment / kTile : kSteps;
    constexpr int kAtOnce = kTogether < kGroup ? kTogether : kGroup;
    Products<T> group[kRowTiles];
#pragma unroll
    for (int step = 0; step < kSteps; step += kAtOnce) {
      const T* rows = tiles_.rows + step * kTile;
      const T* columns = tiles_.columns + step * kTile;
      if constexpr (F::kScheme == kDense) {
        Products<T>::template add<kAtOnce>(total, rows, columns, F::kStride, count_);
      } else {
        if (step % kGroup == 0) {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) group[r].clear();
        }
        Products<T>::template add<kAtOnce>(group, rows, columns, F::kStride, count_);
        const int end = step + kAtOnce;
        if (end % kGroup == 0) scale_group((end - 1) * kTile / kSegment, group, total);
      }
    }
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

// Warps of a multiprocessor that registers must do for.
template <class F, int kRowTiles>
constexpr int kResidentWarps = kRowTiles > 1          ? 12
                               : F::kScheme == kDense ? 20
                                                      : 16;

template <class F, int kRowTiles, int kWarps, bool kEven>
__global__ void __launch_bounds__(kWarps* kLanes, kResidentWarps<F, kRowTiles> / kWarps)
    gemv_matrix_kernel(Problem p) {
  using T = typename F::Operand;
  using Tiles = WarpTiles<F, kRowTiles>;
  constexpr int kRows = kRowTiles * kTile;
  constexpr int kLine = kRows + 4;
  static_assert(sizeof(Tiles) >= kTile * kLine * sizeof(float), "the sums lie where the tiles lay");
  KH_DYNAMIC_SHARED(Tiles, tiles);  // [kWarps]
  __shared__ Columns found;
  __shared__ Column columns[kTile];
  const int warp = threadIdx.x / kLanes;
  const int64_t tile = blockIdx.x, items = items_of(p, kTile);

  for (int64_t item = blockIdx.y; item < items; item += gridDim.y) {
    find_columns(p, item, kTile, found);
    const bool inside = found.expert >= 0 && found.expert < p.num_experts;
    for (int first = 0; first < found.count; first += kTile) {
      const int count = found.count - first < kTile ? found.count - first : kTile;
      if (inside) {
        Warp<F, kRowTiles, kWarps, kEven> work(p, tiles[warp], tile, found.expert);
        describe_columns(p, found, first, count, columns);
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
        describe_columns(p, found, first, count, columns);
        write_zeros<kRows>(p, tile, columns[0]);
      }
      __syncthreads();
    }
    __syncthreads();
  }
}

// ---- launcher ---------------------------------------------------------------------------------

template <class F, int kRowTiles, int kWarps, bool kEven>
int32_t launch_tile(const Problem& p, stream_t stream) {
  constexpr size_t kBytes = kWarps * sizeof(WarpTiles<F, kRowTiles>);
  static_assert(kBytes <= 47 * 1024, "what every platform grants a block unasked");
  const dim3 grid = grid_of(p, kRowTiles * kTile, kTile);
  return launched(launch(gemv_matrix_kernel<F, kRowTiles, kWarps, kEven>, grid,
                         dim3(kWarps * kLanes), kBytes, stream, p));
}

// Uneven rows get the tile of fewest rows; what a sum's order depends on is the same.
template <class F, int kRowTiles, int kWarps>
int32_t choose_loads(const Problem& p, stream_t stream) {
  const bool even = p.weight.access_bytes == kVectorBytes && p.x.access_bytes == kVectorBytes &&
                    p.k % F::kSlice == 0;
  return even ? launch_tile<F, kRowTiles, kWarps, true>(p, stream)
              : launch_tile<F, 1, kWarps, false>(p, stream);
}

template <class T, int kScheme, bool kFp8X = false>
int32_t choose_tile(Problem& p, int64_t tile, stream_t stream) {
  if constexpr (kScheme == kInt4) p.int4_base = Pairs<T>::kBase;
  switch (tile) {
    case kMatrix16x4:
      return choose_loads<FormatOf<T, kScheme, kFp8X, 256>, 1, 4>(p, stream);
    case kMatrix16x8:
      return choose_loads<FormatOf<T, kScheme, kFp8X, 128>, 1, 8>(p, stream);
    case kMatrix32x2:
      return choose_loads<FormatOf<T, kScheme, kFp8X, 256>, 2, 2>(p, stream);
    case kMatrix32x4:
      return choose_loads<FormatOf<T, kScheme, kFp8X, 128>, 2, 4>(p, stream);
    default:
      return fail(kBadArgument, "'tile': there is no tile %lld", static_cast<long long>(tile));
  }
}

}  // namespace

int32_t run_matrix(Problem p, int32_t weight_dtype, int64_t tile, stream_t stream) {
  const bool half = p.x_dtype == KH_FLOAT16;
  switch (weight_dtype) {
    case KH_FLOAT32:
      return fail(kBadArgument, "'tile': %lld is not for fp32", static_cast<long long>(tile));
    case KH_FLOAT16:
      return choose_tile<half_t, kDense>(p, tile, stream);
    case KH_BFLOAT16:
      return choose_tile<bf16_t, kDense>(p, tile, stream);
    case KH_FLOAT8_E4M3FN:
      if (p.x_dtype == weight_dtype) return choose_tile<bf16_t, kFp8, true>(p, tile, stream);
      return half ? choose_tile<half_t, kFp8>(p, tile, stream)
                  : choose_tile<bf16_t, kFp8>(p, tile, stream);
    default:
      return half ? choose_tile<half_t, kInt4>(p, tile, stream)
                  : choose_tile<bf16_t, kInt4>(p, tile, stream);
  }
}

}  // namespace kh::gemv
