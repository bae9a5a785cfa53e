// SPDX-License-Identifier: Apache-2.0
// rotary_embedding: rotates the first rot_dim lanes of query and key heads in place, by the row of
// the table of cosines and sines that belongs to the token.
//
// Bound by memory: 3 operations for a lane that is read and written once. A block's dimensions are
// packs of pairs in a head and heads, of query and of key: one launch covers both, and nothing is
// divided. Neox pairs lanes i and i + rot_dim/2: a thread takes one pack from either half. GPT-J
// pairs neighbours: a thread takes one pack of lanes. A pack is 16 bytes where strides and
// addresses allow it, one pair otherwise. A thread asks for its lanes before it knows the table's
// row, whose number must come from memory first. The row stays in the L1 cache, which every head
// rereads.
//
// Where tokens are few the time is that of instructions which each run once: so the usual call, of
// one dimension of tokens and packs, has a kernel without loops and with 32-bit strides. Its blocks
// follow each other in memory. Tuned on an H200; four heads to a thread take twice as long.
#include "launcher.muh"

namespace kh {
namespace {

// ---- layout ---------------------------------------------------------------------------------

constexpr int kThreads = 128;
constexpr int kBlocks = 12;  // to a multiprocessor, so that the usual kernel has 40 registers

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

// What a row of the table says of kPack pairs; it is packed from `row` on.
template <class C, int kPack>
__device__ __forceinline__ Turns<kPack> turns_at(const C* row, int64_t half) {
  const Pack<C, kPack> cosines = load<kPack>(row);
  const Pack<C, kPack> sines = load<kPack>(row + half);
  Turns<kPack> turns;
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    turns.cosines[i] = to_float(cosines.at[i]);
    turns.sines[i] = to_float(sines.at[i]);
  }
  return turns;
}

// The same of row `number`; kPack > 1 asks for a column stride of 1 and aligned packs.
template <class C, int kPack>
__device__ __forceinline__ Turns<kPack> turns_of(const Rotation& r, int64_t number, int64_t first) {
  const C* row = static_cast<const C*>(r.table) + number * r.row_stride;
  if constexpr (kPack > 1) return turns_at<C, kPack>(row + first, r.half);
  return {{to_float(row[first * r.column_stride])},
          {to_float(row[(r.half + first) * r.column_stride])}};
}

// The lanes of kPack pairs; kPack > 1 asks for a lane stride of 1 and aligned packs.
template <class T, bool kNeox, int kPack>
struct Lanes {
  Pack<T, kPack> xs, ys;

  __device__ __forceinline__ void read(const T* head, int64_t stride, int64_t half, int64_t first) {
    if constexpr (kPack == 1) {
      const T* x = head + (kNeox ? first : 2 * first) * stride;
      xs.at[0] = *x;
      ys.at[0] = x[(kNeox ? half : 1) * stride];
    } else if constexpr (kNeox) {
      xs = load<kPack>(head + first);
      ys = load<kPack>(head + half + first);
    } else {
      const Pack<T, 2 * kPack> pairs = load<2 * kPack>(head + 2 * first);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        xs.at[i] = pairs.at[2 * i];
        ys.at[i] = pairs.at[2 * i + 1];
      }
    }
  }

  __device__ __forceinline__ void write(T* head, int64_t stride, int64_t half,
                                        int64_t first) const {
    if constexpr (kPack == 1) {
      T* x = head + (kNeox ? first : 2 * first) * stride;
      *x = xs.at[0];
      x[(kNeox ? half : 1) * stride] = ys.at[0];
    } else if constexpr (kNeox) {
      store<kPack>(head + first, xs);
      store<kPack>(head + half + first, ys);
    } else {
      Pack<T, 2 * kPack> pairs;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        pairs.at[2 * i] = xs.at[i];
        pairs.at[2 * i + 1] = ys.at[i];
      }
      store<2 * kPack>(head + 2 * first, pairs);
    }
  }

  __device__ __forceinline__ void rotate_by(const Turns<kPack>& turns) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const Pair turned =
          rotate(to_float(xs.at[i]), to_float(ys.at[i]), turns.cosines[i], turns.sines[i]);
      xs.at[i] = from_float<T>(turned.x);
      ys.at[i] = from_float<T>(turned.y);
    }
  }
};

// Any call.
template <class T, class C, bool kNeox, int kPack>
__global__ void __launch_bounds__(kThreads) rotary_embedding_kernel(Rotation r) {
  const int64_t packs = r.half / kPack;
  await_last();
  for (int64_t t = blockIdx.x; t < r.tokens; t += gridDim.x) {
    const int64_t batch = t / r.tokens_a_batch, token = t - batch * r.tokens_a_batch;
    const int64_t number = row_of(r, batch, token);
    // Heads of query, then those of key.
    for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; i < r.heads;
         i += static_cast<int64_t>(gridDim.y) * blockDim.y) {
      const bool in_query = i < r.query_heads;
      const Heads& h = in_query ? r.query : r.key;
      T* head = static_cast<T*>(h.data) + batch * h.batch_stride + token * h.token_stride +
                (in_query ? i : i - r.query_heads) * h.head_stride;
      for (int64_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
        Lanes<T, kNeox, kPack> lanes;
        lanes.read(head, h.lane_stride, r.half, pack * kPack);
        if (number < 0) continue;
        lanes.rotate_by(turns_of<C, kPack>(r, number, pack * kPack));
        lanes.write(head, h.lane_stride, r.half, pack * kPack);
      }
    }
  }
}

// A call of packs, of positions [T] without offsets, that a grid covers at once.
struct Plain {
  void *query, *key;
  const void *positions, *table;
  int query_token, query_head, key_token, key_head, position, row;  // strides
  int tokens, query_heads, heads, half, num_rows;
  bool wide;
};

template <class T, class C, bool kNeox, int kPack>
__global__ void __launch_bounds__(kThreads, kBlocks) plain_kernel(Plain p) {
  const int token = static_cast<int>(blockIdx.z * gridDim.y + blockIdx.y);
  const int i = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y);
  const int first = static_cast<int>(threadIdx.x) * kPack;
  if (i >= p.heads || token >= p.tokens) return;
  const bool in_query = i < p.query_heads;
  const int64_t offset = static_cast<int64_t>(token) * (in_query ? p.query_token : p.key_token) +
                         static_cast<int64_t>(in_query ? i : i - p.query_heads) *
                             (in_query ? p.query_head : p.key_head);
  T* head = static_cast<T*>(in_query ? p.query : p.key) + offset;
  await_last();
  Lanes<T, kNeox, kPack> lanes;
  lanes.read(head, 1, p.half, first);
  const int64_t number =
      read_integer(p.positions, p.wide, static_cast<int64_t>(token) * p.position);
  if (static_cast<uint64_t>(number) >= static_cast<uint64_t>(p.num_rows)) return;
  const C* row = static_cast<const C*>(p.table) +
                 static_cast<int64_t>(static_cast<int>(number)) * p.row + first;
  lanes.rotate_by(turns_at<C, kPack>(row, p.half));
  lanes.write(head, 1, p.half, first);
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

// A head's lanes, or some of them, by as many heads as there is room for.
dim3 block_of(int64_t a_head, int64_t heads) {
  const int64_t width = a_head < kThreads ? a_head : kThreads;
  const int64_t height = heads < kThreads / width ? heads : kThreads / width;
  return dim3(static_cast<unsigned>(width), static_cast<unsigned>(height));
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
  bool fits = true;
  const auto narrow = [&](int64_t v) {
    fits = fits && v == static_cast<int32_t>(v);
    return static_cast<int>(v);
  };
  Plain p = {};
  p.query = r.query.data;
  p.key = r.key.data;
  p.positions = r.positions.data;
  p.table = r.table;
  p.wide = r.positions.wide;
  p.query_token = narrow(r.query.token_stride);
  p.query_head = narrow(r.query.head_stride);
  p.key_token = narrow(r.key.token_stride);
  p.key_head = narrow(r.key.head_stride);
  p.position = narrow(r.positions.token_stride);
  p.row = narrow(r.row_stride);
  p.tokens = narrow(r.tokens);
  p.query_heads = narrow(r.query_heads);
  p.heads = narrow(r.heads);
  p.half = narrow(r.half);
  p.num_rows = narrow(r.num_rows);
  const int64_t columns = r.tokens < kMaxGridY ? r.tokens : kMaxGridY;
  const int64_t layers = ceil_div(r.tokens, columns);
  const bool plain = fits && packs && layers <= kMaxGridY && r.tokens == r.tokens_a_batch &&
                     r.offsets.data == nullptr;
  const auto queue_plain = [&](auto kernel, int64_t a_head) {
    const dim3 block = block_of(a_head, r.heads);
    const dim3 all(static_cast<unsigned>(ceil_div(r.heads, static_cast<int64_t>(block.y))),
                   static_cast<unsigned>(columns), static_cast<unsigned>(layers));
    return launch_early(kernel, all, block, 0, stream, p);
  };
  // While all threads run at once, half as much to each is faster.
  constexpr int kSmall = kPack > 1 ? kPack / 2 : 1;
  const int64_t a_head = r.half / kPack, small = r.half / kSmall;
  if (plain && small <= kThreads && r.tokens * r.heads * small <= kThreadsAtOnce)
    return queue_plain(plain_kernel<T, C, kNeox, kSmall>, small);
  if (plain && a_head <= kThreads) return queue_plain(plain_kernel<T, C, kNeox, kPack>, a_head);
  const dim3 block = block_of(packs ? a_head : r.half, r.heads);
  const int64_t rows = ceil_div(r.heads, static_cast<int64_t>(block.y));
  const dim3 grid(static_cast<unsigned>(r.tokens < kMaxGridX ? r.tokens : kMaxGridX),
                  static_cast<unsigned>(rows < kMaxGridY ? rows : kMaxGridY));
  const auto queue = [&](auto kernel) { return launch_early(kernel, grid, block, 0, stream, r); };
  if (packs) return queue(rotary_embedding_kernel<T, C, kNeox, kPack>);
  return queue(rotary_embedding_kernel<T, C, kNeox, 1>);
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
