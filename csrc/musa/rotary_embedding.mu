// SPDX-License-Identifier: Apache-2.0
// rotary_embedding: rotates the first rot_dim lanes of query and key heads in place, by the row of
// the table of cosines and sines that belongs to the token.
//
// Bound by memory: 3 operations for a lane that is read and written once. blockIdx.x is a token,
// threadIdx.y a head, of query or of key: one launch covers both; threadIdx.x a pack of pairs in
// it, so that nothing is divided. Neox pairs lanes i and i + rot_dim/2: a thread takes one pack
// from either half. GPT-J pairs neighbours: a thread takes one pack. A pack is 16 bytes where
// strides and addresses allow it, one pair otherwise. A thread asks for its lanes before it knows
// the table's row, whose number must come from memory first. The row stays in the L1 cache, which
// every head rereads.
#include "launcher.muh"

namespace kh {
namespace {

// ---- layout ---------------------------------------------------------------------------------

#ifndef KH_ROTARY_THREADS
#define KH_ROTARY_THREADS 512
#endif
constexpr int kThreads = KH_ROTARY_THREADS;

// Strides count elements. Tokens are [batches, tokens_a_batch]; batches is 1 for positions [T].
struct Heads {
  void* data;  // [tokens, heads, D]
  int64_t batch_stride, token_stride, head_stride, lane_stride;
};

struct Indices {
  const void* data;  // [tokens] int32 or int64; null: absent
  int64_t batch_stride, token_stride;
  bool wide;  // int64
};

struct Rotation {
  Heads query, key;
  Indices positions, offsets;
  const void* table;  // [num_rows, rot_dim]
  int64_t num_rows, row_stride, column_stride;
  int64_t tokens, tokens_a_batch;
  int64_t query_heads, heads;  // heads: of query and key together
  int64_t half;                // rot_dim / 2
};

// ---- kernel ---------------------------------------------------------------------------------

__device__ __forceinline__ int64_t index_at(const Indices& i, int64_t batch, int64_t token) {
  return read_integer(i.data, i.wide, batch * i.batch_stride + token * i.token_stride);
}

// The table's row of a token, or -1 where there is none.
__device__ __forceinline__ int64_t row_of(const Rotation& r, int64_t batch, int64_t token) {
  int64_t row = index_at(r.positions, batch, token);
  if (r.offsets.data != nullptr) {
    const int64_t offset = index_at(r.offsets, batch, token);
    // Of the sums that int64 cannot hold, only those of two negatives come out as row numbers.
    if (row < 0 && offset < 0) return -1;
    row = static_cast<int64_t>(static_cast<uint64_t>(row) + static_cast<uint64_t>(offset));
  }
  return row >= 0 && row < r.num_rows ? row : -1;
}

struct Pair {
  float x, y;
};

// One product is rounded, the other is not: the same on every platform, whatever its compiler
// fuses.
__device__ __forceinline__ Pair rotate(float x, float y, float c, float s) {
  return {fmaf(x, c, -__fmul_rn(y, s)), fmaf(y, c, __fmul_rn(x, s))};
}

template <int kPack>
struct Turns {
  float cosines[kPack], sines[kPack];
};

// What row `number` of the table says of kPack pairs; kPack > 1 asks for a column stride of 1 and
// aligned packs.
template <class C, int kPack>
__device__ __forceinline__ Turns<kPack> turns_of(const Rotation& r, int64_t number, int64_t first) {
  const C* row = static_cast<const C*>(r.table) + number * r.row_stride;
  Turns<kPack> turns;
  if constexpr (kPack == 1) {
    turns.cosines[0] = to_float(row[first * r.column_stride]);
    turns.sines[0] = to_float(row[(r.half + first) * r.column_stride]);
  } else {
    const Pack<C, kPack> cosines = load<kPack>(row + first);
    const Pack<C, kPack> sines = load<kPack>(row + r.half + first);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      turns.cosines[i] = to_float(cosines.at[i]);
      turns.sines[i] = to_float(sines.at[i]);
    }
  }
  return turns;
}

// kPack pairs of one head, by row `number` of the table, or not at all where that is negative.
// kPack > 1 asks for a lane stride of 1 and aligned packs.
template <class T, class C, bool kNeox, int kPack>
__device__ __forceinline__ void rotate_pack(T* head, int64_t lane_stride, const Rotation& r,
                                            int64_t number, int64_t first) {
  if constexpr (kPack == 1) {
    T* x = head + (kNeox ? first : 2 * first) * lane_stride;
    T* y = x + (kNeox ? r.half : 1) * lane_stride;
    const float old_x = to_float(*x), old_y = to_float(*y);
    if (number < 0) return;
    const Turns<1> turns = turns_of<C, 1>(r, number, first);
    const Pair turned = rotate(old_x, old_y, turns.cosines[0], turns.sines[0]);
    *x = from_float<T>(turned.x);
    *y = from_float<T>(turned.y);
  } else if constexpr (kNeox) {
    Pack<T, kPack> xs = load<kPack>(head + first);
    Pack<T, kPack> ys = load<kPack>(head + r.half + first);
    if (number < 0) return;
    const Turns<kPack> turns = turns_of<C, kPack>(r, number, first);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const Pair turned =
          rotate(to_float(xs.at[i]), to_float(ys.at[i]), turns.cosines[i], turns.sines[i]);
      xs.at[i] = from_float<T>(turned.x);
      ys.at[i] = from_float<T>(turned.y);
    }
    store<kPack>(head + first, xs);
    store<kPack>(head + r.half + first, ys);
  } else {
    Pack<T, 2 * kPack> pairs = load<2 * kPack>(head + 2 * first);
    if (number < 0) return;
    const Turns<kPack> turns = turns_of<C, kPack>(r, number, first);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const Pair turned = rotate(to_float(pairs.at[2 * i]), to_float(pairs.at[2 * i + 1]),
                                 turns.cosines[i], turns.sines[i]);
      pairs.at[2 * i] = from_float<T>(turned.x);
      pairs.at[2 * i + 1] = from_float<T>(turned.y);
    }
    store<2 * kPack>(head + 2 * first, pairs);
  }
}

template <class T, class C, bool kNeox, int kPack>
__global__ void __launch_bounds__(kThreads) rotary_embedding_kernel(Rotation r) {
  const int64_t packs = r.half / kPack;
  for (int64_t t = blockIdx.x; t < r.tokens; t += gridDim.x) {
    const int64_t batch = r.tokens == r.tokens_a_batch ? 0 : t / r.tokens_a_batch;
    const int64_t token = t - batch * r.tokens_a_batch;
    const int64_t number = row_of(r, batch, token);
    // Heads of query, then those of key.
    for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; i < r.heads;
         i += static_cast<int64_t>(gridDim.y) * blockDim.y) {
      const bool in_query = i < r.query_heads;
      const Heads& h = in_query ? r.query : r.key;
      T* head = static_cast<T*>(h.data) + batch * h.batch_stride + token * h.token_stride +
                (in_query ? i : i - r.query_heads) * h.head_stride;
      for (int64_t pack = threadIdx.x; pack < packs; pack += blockDim.x)
        rotate_pack<T, C, kNeox, kPack>(head, h.lane_stride, r, number, pack * kPack);
    }
  }
}

// ---- launcher -------------------------------------------------------------------------------

Indices indices_of(const kh_tensor& t) {
  if (!present(t)) return {nullptr, 0, 0, false};
  return {t.data, t.ndim == 2 ? t.stride[0] : 0, t.stride[t.ndim - 1], t.dtype == KH_INT64};
}

// `token_dims` dimensions of tokens, then [H, D] or [H*D].
Heads heads_of(const kh_tensor& t, int token_dims, int64_t head_size) {
  const int64_t lane = t.stride[t.ndim - 1];
  const bool flat = t.ndim == token_dims + 1;
  return {t.data, token_dims == 2 ? t.stride[0] : 0, t.stride[token_dims - 1],
          flat ? head_size * lane : t.stride[token_dims], lane};
}

int64_t num_heads(const kh_tensor& t, int token_dims, int64_t head_size) {
  return t.ndim == token_dims + 1 ? t.shape[token_dims] / head_size : t.shape[token_dims];
}

bool packable(const Heads& h, int64_t bytes, int64_t size) {
  return h.lane_stride == 1 && aligned(h.data, bytes) && h.batch_stride * size % bytes == 0 &&
         h.token_stride * size % bytes == 0 && h.head_stride * size % bytes == 0;
}

template <class T, class C, bool kNeox>
int run(const Rotation& r, stream_t stream) {
  // Pairs in a pack: GPT-J's pack of lanes holds half as many pairs.
  constexpr int kPack = kVectorBytes / sizeof(T) / (kNeox ? 1 : 2);
  constexpr int64_t kBytes = kVectorBytes;
  constexpr int64_t kTableBytes = alignof(Pack<C, kPack>);
  const bool packs = r.half % kPack == 0 && packable(r.query, kBytes, sizeof(T)) &&
                     (r.heads == r.query_heads || packable(r.key, kBytes, sizeof(T))) &&
                     r.column_stride == 1 && aligned(r.table, kTableBytes) &&
                     r.row_stride * sizeof(C) % kTableBytes == 0 &&
                     r.half * sizeof(C) % kTableBytes == 0;
  // As many heads to a block as it has threads for, and as many to each block of a token.
  const int64_t a_head = packs ? r.half / kPack : r.half;
  const int64_t width = a_head < kThreads ? a_head : kThreads;
  const int64_t rows = ceil_div(r.heads, kThreads / width);
  const dim3 block(static_cast<unsigned>(width), static_cast<unsigned>(ceil_div(r.heads, rows)));
  const dim3 grid(static_cast<unsigned>(r.tokens < kMaxGridX ? r.tokens : kMaxGridX),
                  static_cast<unsigned>(rows < kMaxGridY ? rows : kMaxGridY));
  if (packs) return launch(rotary_embedding_kernel<T, C, kNeox, kPack>, grid, block, 0, stream, r);
  return launch(rotary_embedding_kernel<T, C, kNeox, 1>, grid, block, 0, stream, r);
}

int32_t check(const kh_rotary_embedding_args& a, int token_dims, int64_t head_size) {
  const kh_tensor* indices[] = {&a.positions, &a.cos_sin_cache_offsets};
  for (const kh_tensor* t : indices) {
    if (t != &a.positions && !present(*t)) continue;
    KH_REQUIRE(well_formed(*t) && t->ndim == token_dims &&
                   same_shape(*t, a.positions, token_dims) &&
                   (t->dtype == KH_INT32 || t->dtype == KH_INT64),
               "positions and offsets must be int32 or int64 of one shape");
  }
  const kh_tensor* heads[] = {&a.query, &a.key};
  for (const kh_tensor* t : heads) {
    if (t != &a.query && !present(*t)) continue;
    const int last = t->ndim - 1;
    KH_REQUIRE(well_formed(*t) && t->ndim == a.query.ndim && t->dtype == a.query.dtype &&
                   same_shape(*t, a.positions, token_dims) && head_size > 0 &&
                   t->shape[last] % head_size == 0 &&
                   (last == token_dims || t->shape[last] == head_size),
               "query and key must be [T, H, D] or [T, H*D] for positions [T]");
  }
  const kh_tensor& table = a.cos_sin_cache;
  KH_REQUIRE(present(table) && well_formed(table) && table.ndim == 2 && table.shape[1] % 2 == 0 &&
                 table.shape[1] > 0 && table.shape[1] <= head_size &&
                 (table.dtype == KH_FLOAT32 || table.dtype == a.query.dtype),
             "cos_sin_cache must be [P, rot_dim], rot_dim even and at most D, fp32 or as query");
  return 0;
}

int32_t rotary_embedding_launch(const kh_rotary_embedding_args& a, stream_t stream) {
  const int token_dims = a.positions.ndim;
  KH_REQUIRE((token_dims == 1 || token_dims == 2) &&
                 (a.query.ndim == token_dims + 1 || a.query.ndim == token_dims + 2),
             "positions must be [T] or [batch, seq], query one or two dimensions more");
  const bool flat = a.query.ndim == token_dims + 1;
  const int64_t head_size = flat ? a.head_size : a.query.shape[token_dims + 1];
  const kh_tensor& table = a.cos_sin_cache;
  const int64_t tokens = numel(a.positions);
  // A head of no lanes, which a tensor without elements may have, has no table to fit.
  if (tokens == 0 || (numel(a.query) == 0 && (!present(a.key) || numel(a.key) == 0))) return 0;
  const int32_t wrong = check(a, token_dims, head_size);
  if (wrong != 0) return wrong;
  if (table.shape[0] == 0) return 0;  // every position is out of range

  Rotation r = {};
  r.query = heads_of(a.query, token_dims, head_size);
  r.query_heads = r.heads = num_heads(a.query, token_dims, head_size);
  if (present(a.key)) {
    r.key = heads_of(a.key, token_dims, head_size);
    r.heads += num_heads(a.key, token_dims, head_size);
  }
  r.positions = indices_of(a.positions);
  r.offsets = indices_of(a.cos_sin_cache_offsets);
  r.table = table.data;
  r.num_rows = table.shape[0];
  r.row_stride = table.stride[0];
  r.column_stride = table.stride[1];
  r.tokens = tokens;
  r.tokens_a_batch = a.positions.shape[token_dims - 1];
  r.half = table.shape[1] / 2;

  return for_float_type(a.query.dtype, "query", [&](auto type) {
    using T = typename decltype(type)::type;
    if (table.dtype == KH_FLOAT32)
      return launched(a.is_neox ? run<T, float, true>(r, stream) : run<T, float, false>(r, stream));
    return launched(a.is_neox ? run<T, T, true>(r, stream) : run<T, T, false>(r, stream));
  });
}

}  // namespace
}  // namespace kh

KH_EXPORT int32_t kh_rotary_embedding(const kh_rotary_embedding_args* args, void* stream) {
  kh::DeviceGuard guard(static_cast<int>(args->device));
  if (guard.status() != 0) return kh::launched(guard.status());
  return kh::rotary_embedding_launch(*args, static_cast<kh::stream_t>(stream));
}
