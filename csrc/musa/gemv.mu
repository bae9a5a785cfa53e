// SPDX-License-Identifier: Apache-2.0
// The kernel behind fused_gemv and fused_moe_gemv: out = epilogue(weight @ columns) for up to 16
// columns at a time, each a row of x, by multiply-add in fp32. All but fp32 weights go to
// gemv_matrix.mu where the tile says so.
//
// Bound by memory for few columns, by multiply-adds for many: every code of the weight is read and
// decoded once for up to 16 columns. A block (blockIdx.x) makes a tile of 8 or 16 rows of the
// weight with four warps, which share out K. Of a warp, four lanes stand along a row and load 16
// bytes each, so that a load takes 64 bytes of 8 rows; several are in flight. The columns' part of
// K lies in shared memory as fp32, staged by all warps, as much at a time as fits. Scales multiply
// the sum over a vector of 16 bytes, which is in one group. The sums of lanes and warps are added
// in a fixed order. Nothing in this depends on the number of columns or their places, so a row's
// result does not either.
//
// With experts, a block (blockIdx.y) serves one place of topk_ids: the first that names its expert
// among 256 places works for all of them, the others end at once.
#include "gemv_block.muh"

namespace kh::gemv {
namespace {

// ---- tile shape -------------------------------------------------------------------------------

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kRowLanes = 4;                    // of a warp, along K
constexpr int kRowsALoad = kLanes / kRowLanes;  // rows of a tile are multiples of it
constexpr int kLine = 32;        // elements of a column after which shared memory skips four: lanes
constexpr int kPaddedLine = 36;  // along K then read different banks
constexpr int kStagedElements = 8192;  // of all columns
constexpr size_t kStagedBytes = kStagedElements / kLine * kPaddedLine * sizeof(float);

// ---- decode -----------------------------------------------------------------------------------
//
// A format decodes the elements of a vector of 16 bytes, kAtOnce of them at a time, in order.

struct Float32 {
  static constexpr int kElements = 4, kAtOnce = 4;
  static constexpr bool kScaled = false, kZeros = false;
  static __device__ __forceinline__ void decode(const uint32_t (&v)[4], int, uint32_t, int,
                                                float (&to)[kAtOnce]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(v[i]);
  }
};

template <class T>
struct Dense16 {
  static constexpr int kElements = 8, kAtOnce = 4;
  static constexpr bool kScaled = false, kZeros = false;
  static __device__ __forceinline__ void decode(const uint32_t (&v)[4], int part, uint32_t, int,
                                                float (&to)[kAtOnce]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[i] = to_float(T{static_cast<uint16_t>(v[2 * part + i / 2] >> (i % 2 * 16))});
  }
};

// Pairs of codes as bf16: the code's exponent lands at the bottom of bf16's, whose subnormals stand
// for the code's; the multiplication by 2^120, exact, moves it to its place. NaN, 0x7f and 0xff,
// would come out as 480.
struct Fp8 {
  static constexpr int kElements = 16, kAtOnce = 4;
  static constexpr bool kScaled = true, kZeros = false;
  static __device__ __forceinline__ uint32_t pair(uint32_t high) {
    constexpr uint32_t kTwoTo120 = 0x7b807b80u;
    return multiply_bf16_pairs((high & 0x80008000u) | (high & 0x7f007f00u) >> 4, kTwoTo120);
  }
  static __device__ __forceinline__ void decode(const uint32_t (&v)[4], int part, uint32_t, int,
                                                float (&to)[kAtOnce]) {
    const uint32_t q = v[part], even = pair(q << 8), odd = pair(q);
    to[0] = __uint_as_float(even << 16);
    to[1] = __uint_as_float(odd << 16);
    to[2] = __uint_as_float(even & 0xffff0000u);
    to[3] = __uint_as_float(odd & 0xffff0000u);
    if ((((q & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) != 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if ((q >> (8 * i) & 0x7fu) == 0x7fu) to[i] = __uint_as_float(0x7fffffffu);
    }
  }
};

// A nibble at bit 4 i of the fraction of 2^(23 - 4 i) is worth itself; 2^(23 - 4 i) and the zero
// are then subtracted, which is exact. `base` is 2^23, from memory: where the compiler cannot know
// it, it joins two steps.
struct Int4 {
  static constexpr int kElements = 32, kAtOnce = 8;
  static constexpr bool kScaled = true, kZeros = true;
  static __device__ __forceinline__ void decode(const uint32_t (&v)[4], int part, uint32_t base,
                                                int zero, float (&to)[kAtOnce]) {
    const uint32_t q = v[part], high = q >> 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int bit = i < 5 ? 4 * i : 4 * i - 16;
      const uint32_t bits = ((i < 5 ? q : high) & (0xfu << bit)) | (base - (bit << 23));
      to[i] = __uint_as_float(bits) - (__uint_as_float((150u - bit) << 23) + 8.f);
    }
    if (zero != 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] += static_cast<float>(8 - zero);
    }
  }
};

// ---- columns in shared memory -----------------------------------------------------------------

__device__ __forceinline__ int padded(int k) { return k + k / kLine * (kPaddedLine - kLine); }

// e4m3, one code: its value if it is NaN or not.
__device__ __forceinline__ float fp8_to_float(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu;
  if (magnitude == 0x7f) return __uint_as_float(0x7fffffffu);
  const float v = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f
                                : __uint_as_float((magnitude << 20) + (120u << 23));
  return code & 0x80u ? -v : v;
}

__device__ __forceinline__ float x_at(const Problem& p, const Column& column, int k) {
  const uint8_t* at = column.x + k * p.x_element_stride;
  if (p.x_dtype == KH_FLOAT32) return *reinterpret_cast<const float*>(at);
  if (p.x_dtype == KH_FLOAT16) return to_float(*reinterpret_cast<const half_t*>(at));
  if (p.x_dtype == KH_BFLOAT16) return to_float(*reinterpret_cast<const bf16_t*>(at));
  const float scale =
      static_cast<const float*>(p.x_scale.data)[column.x_row * p.x_scale.row_stride +
                                                (k >> p.group_shift) * p.x_scale.group_stride];
  return fp8_to_float(*at) * infinite_is_nan(scale);
}

// Elements [first, first + count) of the columns, zeros past their end; a column's stand `line`
// floats after the last one's.
__device__ __forceinline__ void stage_columns(const Problem& p, const Column* columns, int count,
                                              int first, int elements, float* to, int line) {
  constexpr int kPack = 8;
  const int packs = elements / kPack;
  const bool vectors =
      p.x.access_bytes == kVectorBytes && (p.x_dtype == KH_FLOAT16 || p.x_dtype == KH_BFLOAT16);
  for (int i = threadIdx.x; i < packs * count; i += kThreads) {
    const int column = i / packs, k = (i - column * packs) * kPack;
    float v[kPack];
    if (vectors && first + k < p.k) {
      const uint4 codes = *reinterpret_cast<const uint4*>(columns[column].x + (first + k) * 2);
      const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const uint16_t bits = static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16));
        v[j] = p.x_dtype == KH_FLOAT16 ? to_float(half_t{bits}) : to_float(bf16_t{bits});
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPack; ++j)
        v[j] = first + k + j < p.k ? x_at(p, columns[column], first + k + j) : 0.f;
    }
    float4* at = reinterpret_cast<float4*>(to + column * line + padded(k));
    at[0] = {v[0], v[1], v[2], v[3]};
    at[1] = {v[4], v[5], v[6], v[7]};
  }
}

// ---- kernel -----------------------------------------------------------------------------------

// kRows rows to each lane's place in a load, up to kColumns columns. In the even case rows are
// whole steps and move in vectors: no loads are guarded.
template <class F, int kRows, int kColumns, bool kEven>
class Block {
 public:
  static constexpr int kStep = kRowLanes * F::kElements;  // elements of K that a warp takes
  static constexpr int kDepth = kRows == 1 ? 4 : 3;       // steps in flight
  static constexpr int kTileRows = kRows * kRowsALoad;
  static constexpr int kSumsLine = kTileRows + 4;
  static_assert(kStagedElements / kMostColumns % (kStep * kWarps) == 0,
                "all warps finish what is staged with the same step");

  // Sets out for the first loads of the weight.
  __device__ __forceinline__ Block(const Problem& p, float* staged, int64_t tile, int64_t expert)
      : p_(p),
        staged_(staged),
        lane_(threadIdx.x % kLanes),
        warp_(threadIdx.x / kLanes),
        steps_((p.k + kStep - 1) / kStep) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t row = weight_row<kTileRows>(p, tile, r * kRowsALoad + lane_ / kRowLanes);
      row_[r] = p.weight.data + expert * p.weight.expert_stride + row * p.weight.row_stride;
      if constexpr (kEven) row_[r] += (warp_ * kRowLanes + lane_ % kRowLanes) * kVectorBytes;
      if constexpr (F::kScaled)
        scale_at_[r] = expert * p.weight_scale.expert_stride +
                       row / p.weight_scale.rows_an_entry * p.weight_scale.row_stride;
      if constexpr (F::kZeros)
        zero_at_[r] = expert * p.weight_zero.expert_stride + row * p.weight_zero.row_stride;
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) load(warp_ + d * kWarps, d);
  }

  // Leaves the sums in shared memory: [kWarps, kMostColumns, kTileRows] in lines of kSumsLine.
  __device__ __forceinline__ void run(const Column* columns, int count) {
    int room = kStagedElements;  // of a column
    for (int c = 1; c < count; c *= 2) room /= 2;
    const int line = padded(room);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) total_[r][c] = 0.f;

    for (int first = 0; first < steps_; first += kWarps * kDepth) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int begin = first + d * kWarps;  // the same for all warps
        const int k = begin * kStep;
        if (begin < steps_ && (k & (room - 1)) == 0) {
          __syncthreads();
          stage_columns(p_, columns, count, k, room < p_.k - k ? room : whole_steps(p_.k - k),
                        staged_, line);
          __syncthreads();
        }
        const int step = begin + warp_;
        if (step < steps_) {
          multiply(staged_ + padded((step * kStep & (room - 1)) + lane_ % kRowLanes * F::kElements),
                   line, count, d);
          load(step + kWarps * kDepth, d);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (c >= count) break;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float sum = total_[r][c];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1, kRowLanes);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2, kRowLanes);
        if (lane_ % kRowLanes == 0)
          staged_[(warp_ * kMostColumns + c) * kSumsLine + r * kRowsALoad + lane_ / kRowLanes] =
              sum;
      }
    }
    __syncthreads();
  }

 private:
  static __device__ __forceinline__ int whole_steps(int k) {
    return (k + kStep * kWarps - 1) / (kStep * kWarps) * (kStep * kWarps);
  }

  // In the even case rows stand at the step that is loaded next.
  __device__ __forceinline__ void load(int step, int d) {
    if (step >= steps_) return;
    const int vector = step * kRowLanes + lane_ % kRowLanes;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kEven) {
        codes_[d][r] = *reinterpret_cast<const uint4*>(row_[r]);
        row_[r] += kWarps * kRowLanes * kVectorBytes;
      } else {
        codes_[d][r] = load_vector(p_.weight, row_[r], vector);
      }
    }
    if constexpr (F::kScaled) {
      // A vector past the end of an uneven row is zeros; any scale will do.
      const int k = vector * F::kElements;
      const int group = (k < p_.k ? k : p_.k - 1) >> p_.group_shift;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = scale_at_[r] + group * p_.weight_scale.group_stride;
        scale_[d][r] = F::kZeros ? entry(p_.weight_scale, at)
                                 : static_cast<const float*>(p_.weight_scale.data)[at];
        if constexpr (F::kZeros)
          zero_[d][r] =
              p_.weight_zero.data == nullptr
                  ? 8
                  : static_cast<const uint8_t*>(
                        p_.weight_zero.data)[zero_at_[r] + group * p_.weight_zero.group_stride];
      }
    }
  }

  // Adds up the products of the vectors in slot d. `x` is the lane's part of the first column.
  __device__ __forceinline__ void multiply(const float* x, int line, int count, int d) {
    float group[kRows][kColumns];
    if constexpr (F::kScaled) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) group[r][c] = 0.f;
    }
    auto& sums = pick<F::kScaled>(group, total_);
    constexpr int kAtOnce = F::kAtOnce;
#pragma unroll
    for (int part = 0; part < F::kElements / kAtOnce; ++part) {
      float w[kRows][kAtOnce];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint4& v = codes_[d][r];
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
        F::decode(words, part, p_.int4_base, F::kZeros ? zero_[d][r] : 8, w[r]);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c >= count) break;
        float values[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i += 4) {
          const float4 four = *reinterpret_cast<const float4*>(x + c * line + part * kAtOnce + i);
          values[i] = four.x;
          values[i + 1] = four.y;
          values[i + 2] = four.z;
          values[i + 3] = four.w;
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) sums[r][c] = fmaf(w[r][i], values[i], sums[r][c]);
      }
    }
    if constexpr (F::kScaled) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float scale = infinite_is_nan(scale_[d][r]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          if (c < count) total_[r][c] = fmaf(scale, group[r][c], total_[r][c]);
      }
    }
  }

  template <bool kFirst, class T>
  static __device__ __forceinline__ T& pick(T& a, T& b) {
    if constexpr (kFirst) return a;
    return b;
  }

  const Problem& p_;
  float* staged_;
  const int lane_, warp_, steps_;
  const uint8_t* row_[kRows];
  int64_t scale_at_[kRows], zero_at_[kRows];
  uint4 codes_[kDepth][kRows];
  float scale_[kDepth][kRows];
  int zero_[kDepth][kRows];
  float total_[kRows][kColumns];
};

template <class F, int kRows, int kColumns, bool kEven>
__global__ void __launch_bounds__(kThreads) gemv_kernel(Problem p) {
  using Work = Block<F, kRows, kColumns, kEven>;
  static_assert(kStagedBytes >= sizeof(float) * kWarps * kMostColumns * Work::kSumsLine,
                "the sums lie where the columns lay");
  KH_DYNAMIC_SHARED(float, staged);
  __shared__ Columns found;
  __shared__ Column columns[kColumns];
  const int64_t tile = blockIdx.x, items = items_of(p, kColumns);

  for (int64_t item = blockIdx.y; item < items; item += gridDim.y) {
    find_columns(p, item, kColumns, found);
    const bool inside = found.expert >= 0 && found.expert < p.num_experts;
    for (int first = 0; first < found.count; first += kColumns) {
      const int count = found.count - first < kColumns ? found.count - first : kColumns;
      if (inside) {
        Work work(p, staged, tile, found.expert);
        const RouterWeight weight = describe_columns(p, found, first, count, columns);
        work.run(columns, count);
        keep_weights(p, weight, count, columns);
        __syncthreads();
        finish<Work::kTileRows, kWarps, Work::kSumsLine>(p, tile, staged, columns, count);
      } else {
        describe_columns(p, found, first, count, columns);
        write_all<Work::kTileRows>(p, tile, columns[0], 0.f);
      }
      __syncthreads();
    }
    __syncthreads();
  }
}

// ---- launcher ---------------------------------------------------------------------------------

template <class F, int kRows, int kColumns, bool kEven>
int32_t launch_tile(const Problem& p, stream_t stream) {
  const dim3 grid = grid_of(p, kRows * kRowsALoad, kColumns);
  return launched(launch(gemv_kernel<F, kRows, kColumns, kEven>, grid, dim3(kThreads), kStagedBytes,
                         stream, p));
}

// Uneven rows get one shape, for the order of a result's sum is the same in all.
template <class F>
int32_t choose_tile(const Problem& p, int64_t tile, stream_t stream) {
  const int64_t row_bytes = static_cast<int64_t>(p.weight.accesses_a_row) * p.weight.access_bytes;
  const bool even = p.weight.access_bytes == kVectorBytes && row_bytes % 64 == 0;
  if (!even) return launch_tile<F, 1, 16, false>(p, stream);
  const int64_t most = p.topk_ids.data == nullptr ? p.columns : p.columns / p.slots;
  switch (tile) {
    case kRows8:
      if (most == 1) return launch_tile<F, 1, 1, true>(p, stream);
      if (most <= 4) return launch_tile<F, 1, 4, true>(p, stream);
      return launch_tile<F, 1, 16, true>(p, stream);
    case kRows16:
      if (most == 1) return launch_tile<F, 2, 1, true>(p, stream);
      if (most <= 4) return launch_tile<F, 2, 4, true>(p, stream);
      return launch_tile<F, 2, 16, true>(p, stream);
    default:
      return fail(kBadArgument, "'tile': %lld is not for these dtypes",
                  static_cast<long long>(tile));
  }
}

}  // namespace

int32_t run(Problem p, int32_t weight_dtype, int64_t tile, stream_t stream) {
  const int64_t portable = tile >> 8;  // for what one of the platform's own tiles does not serve
  tile &= 0xff;
  if constexpr (kStreams) {
    if (tile >= kStream) {
      const int32_t status = run_stream(p, weight_dtype, tile, stream);
      if (status != kNotServed) return status;
      tile = portable;
    }
  }
  const bool on_matrix_unit = tile < kRows8;
  p.int4_base = 150u << 23;  // 2^23
  switch (weight_dtype) {
    case KH_FLOAT32:
      return choose_tile<Float32>(p, tile, stream);
    case KH_FLOAT16:
      return on_matrix_unit ? run_matrix_dense(p, tile, stream)
                            : choose_tile<Dense16<half_t>>(p, tile, stream);
    case KH_BFLOAT16:
      return on_matrix_unit ? run_matrix_dense(p, tile, stream)
                            : choose_tile<Dense16<bf16_t>>(p, tile, stream);
    case KH_FLOAT8_E4M3FN:
      return on_matrix_unit ? run_matrix_fp8(p, tile, stream) : choose_tile<Fp8>(p, tile, stream);
    default:
      return on_matrix_unit ? run_matrix_int4(p, tile, stream) : choose_tile<Int4>(p, tile, stream);
  }
}

}  // namespace kh::gemv
