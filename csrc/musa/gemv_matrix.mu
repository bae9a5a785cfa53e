// SPDX-License-Identifier: Apache-2.0
// GEMV for dense fp16 and bf16 on the matrix unit: out = epilogue(weight @ columns), 16 columns
// whether they are there or not, so that one or 16 take the same time and the same arithmetic.
//
// Bound by memory. A block (blockIdx.x) makes a tile of 16 or 32 rows of the weight; its warps take
// turns along K. A warp keeps its next loads in flight while it works: it puts a part of its rows
// ("slice") into shared memory of its own, beside the same part of the columns, and multiplies
// both as matrices of 16x16. The warps' sums are then added in the order of warps.
#include "gemv_block.muh"
#include "matrix.muh"

namespace kh::gemv {
namespace {

// ---- tile shape -------------------------------------------------------------------------------

constexpr int kPadBytes = 16;  // rows of a tile begin on different banks

// kLineBytes, 128 or 256, are a row's part of a slice. A load of 32 lanes takes 8 vectors of 16
// bytes of a row: 128 bytes, from 4 rows.
template <class T, int kLineBytes>
struct SliceOf {
  using Operand = T;
  static constexpr int kElements = kLineBytes / sizeof(T);  // of K
  static constexpr int kStride = kElements + kPadBytes / sizeof(T);
  static constexpr int kVectors = kLineBytes / kVectorBytes;
  static constexpr int kRowLanes = 8;
  static constexpr int kRowsALoad = kLanes / kRowLanes;
  static constexpr int kRowLoads = kTile / kRowsALoad;
  static constexpr int kParts = kVectors / kRowLanes;
  static constexpr int kColumnLoads = kTile * kVectors / kLanes;
};

template <class S, int kRowTiles>
struct alignas(32) WarpTiles {
  typename S::Operand rows[kRowTiles * kTile * S::kStride];
  typename S::Operand columns[kTile * S::kStride];
};

// ---- kernel -----------------------------------------------------------------------------------

// One warp's way through its slices of K, every kWarps-th. In the even case rows are whole slices
// and everything moves in vectors: no loads are guarded.
template <class S, int kRowTiles, int kWarps, bool kEven>
class Warp {
 public:
  using T = typename S::Operand;
  using Tiles = WarpTiles<S, kRowTiles>;

  // Sets out for the first loads of the weight.
  __device__ __forceinline__ Warp(const Problem& p, Tiles& tiles, int64_t tile, int64_t expert)
      : p_(p),
        tiles_(tiles),
        lane_(threadIdx.x % kLanes),
        first_(threadIdx.x / kLanes),
        slices_((p.k + S::kElements - 1) / S::kElements) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int i = 0; i < S::kRowLoads; ++i) {
        row_[r][i] = p.weight.data + expert * p.weight.expert_stride +
                     weight_row<kRowTiles * kTile>(p, tile, local_row(r, i)) * p.weight.row_stride;
        if constexpr (kEven) row_[r][i] += vector_of(first_, 0) * kVectorBytes;
      }
    load_rows(first_);
  }

  // The sums of all the warp's slices.
  __device__ __forceinline__ void run(const Column* columns, int count,
                                      Products<T> (&total)[kRowTiles]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) total[r].clear();
    // All warps go round equally often: __syncwarp is for more than 32 lanes where warps are wide.
    for (int round = 0; round < slices_; round += kWarps) {
      const int slice = first_ + round;
      const bool active = slice < slices_;
      if (active) {
        stage(slice, columns, count);
        load_rows(slice + kWarps);
      }
      __syncwarp();
      if (active) {
#pragma unroll
        for (int step = 0; step < S::kElements / kTile; ++step)
          Products<T>::add(total, tiles_.rows + step * kTile, tiles_.columns + step * kTile,
                           S::kStride, count);
      }
      __syncwarp();
    }
  }

 private:
  // The row, within the tile, of a lane's vectors.
  __device__ __forceinline__ int local_row(int r, int i) const {
    return r * kTile + i * S::kRowsALoad + lane_ / S::kRowLanes;
  }

  // The number, within the row of a slice, of a lane's vector.
  __device__ __forceinline__ int local_vector(int part) const {
    return part * S::kRowLanes + lane_ % S::kRowLanes;
  }

  __device__ __forceinline__ int64_t vector_of(int slice, int part) const {
    return slice * S::kVectors + local_vector(part);
  }

  // In the even case rows stand at the slice that is loaded next.
  __device__ __forceinline__ void load_rows(int slice) {
    if (slice >= slices_) return;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int i = 0; i < S::kRowLoads; ++i) {
#pragma unroll
        for (int part = 0; part < S::kParts; ++part)
          if constexpr (kEven)
            codes_[r][i][part] =
                *reinterpret_cast<const uint4*>(row_[r][i] + part * S::kRowLanes * kVectorBytes);
          else
            codes_[r][i][part] =
                load_vector(p_.weight, row_[r][i], static_cast<int>(vector_of(slice, part)));
        if constexpr (kEven) row_[r][i] += kWarps * S::kVectors * kVectorBytes;
      }
  }

  // From registers and, for the columns, memory to shared memory. What comes from memory is asked
  // for first and stored last.
  __device__ __forceinline__ void stage(int slice, const Column* columns, int count) {
    constexpr int kAtOnce = 4;
    uint4 x[kAtOnce];
    load_columns<kAtOnce>(x, slice, 0, columns, count);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int i = 0; i < S::kRowLoads; ++i)
#pragma unroll
        for (int part = 0; part < S::kParts; ++part)
          put(tiles_.rows + local_row(r, i) * S::kStride, local_vector(part), codes_[r][i][part]);
    store_columns<kAtOnce>(x, 0, count);
#pragma unroll
    for (int first = kAtOnce; first < S::kColumnLoads; first += kAtOnce)
      if (first * kLanes / S::kVectors < count) {
        load_columns<kAtOnce>(x, slice, first, columns, count);
        store_columns<kAtOnce>(x, first, count);
      }
  }

  static __device__ __forceinline__ void put(T* row, int vector, const uint4& v) {
    *reinterpret_cast<uint4*>(row + vector * (kVectorBytes / sizeof(T))) = v;
  }

  // Loads `first` and following of the columns' slice. Those of columns that are not there repeat
  // the last column: none sees another.
  template <int kCount>
  __device__ __forceinline__ void load_columns(uint4 (&x)[kCount], int slice, int first,
                                               const Column* columns, int count) const {
    const int index = slice * S::kVectors + lane_ % S::kVectors;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int least = (first + i) * kLanes / S::kVectors;
      if (least >= count) break;
      const int column = least + lane_ / S::kVectors;
      const uint8_t* row = columns[column < count ? column : count - 1].x;
      if constexpr (kEven)
        x[i] = *reinterpret_cast<const uint4*>(row + index * int64_t{kVectorBytes});
      else
        x[i] = load_vector(p_.x, row, index);
    }
  }

  template <int kCount>
  __device__ __forceinline__ void store_columns(const uint4 (&x)[kCount], int first, int count) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int least = (first + i) * kLanes / S::kVectors;
      if (least >= count) break;
      put(tiles_.columns + (least + lane_ / S::kVectors) * S::kStride, lane_ % S::kVectors, x[i]);
    }
  }

  const Problem& p_;
  Tiles& tiles_;
  const int lane_, first_, slices_;
  const uint8_t* row_[kRowTiles][S::kRowLoads];
  uint4 codes_[kRowTiles][S::kRowLoads][S::kParts];
};

// Warps of a multiprocessor that registers must do for.
template <int kRowTiles>
constexpr int kResidentWarps = kRowTiles == 1 ? 20 : 12;

template <class S, int kRowTiles, int kWarps, bool kEven>
__global__ void __launch_bounds__(kWarps* kLanes, kResidentWarps<kRowTiles> / kWarps)
    gemv_matrix_kernel(Problem p) {
  using T = typename S::Operand;
  using Tiles = WarpTiles<S, kRowTiles>;
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
        Warp<S, kRowTiles, kWarps, kEven> work(p, tiles[warp], tile, found.expert);
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

template <class S, int kRowTiles, int kWarps, bool kEven>
int32_t launch_tile(const Problem& p, stream_t stream) {
  constexpr size_t kBytes = kWarps * sizeof(WarpTiles<S, kRowTiles>);
  static_assert(kBytes <= 46 * 1024, "what every platform grants a block unasked");
  const dim3 grid = grid_of(p, kRowTiles * kTile, kTile);
  return launched(launch(gemv_matrix_kernel<S, kRowTiles, kWarps, kEven>, grid,
                         dim3(kWarps * kLanes), kBytes, stream, p));
}

// Uneven rows get the tile of fewest rows; what a sum's order depends on is the same.
template <class S, int kRowTiles, int kWarps>
int32_t choose_loads(const Problem& p, stream_t stream) {
  const bool even = p.weight.access_bytes == kVectorBytes && p.x.access_bytes == kVectorBytes &&
                    p.k % S::kElements == 0;
  return even ? launch_tile<S, kRowTiles, kWarps, true>(p, stream)
              : launch_tile<S, 1, kWarps, false>(p, stream);
}

template <class T>
int32_t choose_tile(const Problem& p, int64_t tile, stream_t stream) {
  switch (tile) {
    case kMatrix16x4:
      return choose_loads<SliceOf<T, 256>, 1, 4>(p, stream);
    case kMatrix16x8:
      return choose_loads<SliceOf<T, 128>, 1, 8>(p, stream);
    case kMatrix32x2:
      return choose_loads<SliceOf<T, 256>, 2, 2>(p, stream);
    case kMatrix32x4:
      return choose_loads<SliceOf<T, 128>, 2, 4>(p, stream);
    default:
      return fail(kBadArgument, "'tile': there is no tile %lld", static_cast<long long>(tile));
  }
}

}  // namespace

int32_t run_matrix(const Problem& p, int32_t weight_dtype, int64_t tile, stream_t stream) {
  if (weight_dtype == KH_FLOAT16) return choose_tile<half_t>(p, tile, stream);
  if (weight_dtype == KH_BFLOAT16) return choose_tile<bf16_t>(p, tile, stream);
  return fail(kBadArgument, "'tile': %lld is for dense fp16 and bf16",
              static_cast<long long>(tile));
}

}  // namespace kh::gemv
