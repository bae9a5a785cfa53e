// SPDX-License-Identifier: Apache-2.0
// fused_mul_add: out = x * scale + bias, elementwise, one fused multiply-add in fp32.
//
// Bound by memory: 2 operations for 6 or more bytes. The launcher drops, sorts and merges
// dimensions until few are left, so that contiguous tensors of any shape become one long row. Each
// thread makes one pack of up to 16 bytes of the innermost dimension: whole packs as one access
// where every operand allows it, element by element otherwise and at the end of a row. An operand
// that is broadcast along a row is read once a pack.
//
// 256 threads a block: enough loads in flight on every part this runs on; not tuned further.
#include "launcher.muh"

namespace kh {
namespace {

// ---- layout ---------------------------------------------------------------------------------

constexpr int kThreads = 256;
enum Operand { kX, kBias, kScale, kOut, kOperands };

struct Dim {
  int64_t size;
  int64_t stride[kOperands];  // elements; 0 where the operand is broadcast
};

struct Layout {
  Dim dims[KH_MAX_DIMS];  // innermost first
  int ndim;
};

// ---- kernel ---------------------------------------------------------------------------------

struct Operands {
  const void* x;
  const void* bias;
  const void* scale;  // null: scale_value
  void* out;
  float scale_value;
  int32_t scale_dtype;
};

__device__ __forceinline__ float scale_at(const Operands& o, int64_t offset) {
  return o.scale == nullptr ? o.scale_value : read_float(o.scale, o.scale_dtype, offset);
}

// Elements [first, first + kPack) of one row of x or bias. Stride 0 repeats its one element.
template <class T, int kPack>
__device__ __forceinline__ Pack<T, kPack> load_row(const T* row, int64_t first, int64_t stride,
                                                   int count) {
  Pack<T, kPack> v;
  if (stride == 1 && count == kPack) return load<kPack>(row + first);
#pragma unroll
  for (int i = 0; i < kPack; ++i) v.at[i] = i < count ? row[(first + i) * stride] : T{};
  return v;
}

// kPack > 1: the innermost strides are 0 or 1 and every row starts on a boundary of packs.
template <class T, int kPack, class Index>
__global__ void __launch_bounds__(kThreads)
    fused_mul_add_kernel(Operands o, Layout layout, Index packs_a_row, Index packs) {
  const Index step = static_cast<Index>(gridDim.x) * kThreads;
  for (Index pack = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; pack < packs;
       pack += step) {
    Index row = layout.ndim > 1 ? pack / packs_a_row : 0;
    const int64_t first = static_cast<int64_t>(pack - row * packs_a_row) * kPack;
    int64_t start[kOperands] = {0, 0, 0, 0};
    for (int d = 1; d < layout.ndim; ++d) {
      const Index size = static_cast<Index>(layout.dims[d].size);
      const Index index = row % size;
      row /= size;
#pragma unroll
      for (int k = 0; k < kOperands; ++k)
        start[k] += static_cast<int64_t>(index) * layout.dims[d].stride[k];
    }
    const int64_t* stride = layout.dims[0].stride;
    const int64_t left = layout.dims[0].size - first;
    const int count = left < kPack ? static_cast<int>(left) : kPack;

    const T* x = static_cast<const T*>(o.x) + start[kX];
    const T* bias = static_cast<const T*>(o.bias) + start[kBias];
    T* out = static_cast<T*>(o.out) + start[kOut];
    const Pack<T, kPack> xs = load_row<T, kPack>(x, first, stride[kX], count);
    const Pack<T, kPack> biases = load_row<T, kPack>(bias, first, stride[kBias], count);
    float scale = scale_at(o, start[kScale] + first * stride[kScale]);
    Pack<T, kPack> result;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if (i > 0 && i < count && stride[kScale] != 0)
        scale = scale_at(o, start[kScale] + (first + i) * stride[kScale]);
      result.at[i] = from_float<T>(fmaf(to_float(xs.at[i]), scale, to_float(biases.at[i])));
    }
    if (count == kPack && stride[kOut] == 1) {
      store<kPack>(out + first, result);
    } else {
      for (int i = 0; i < count; ++i) out[(first + i) * stride[kOut]] = result.at[i];
    }
  }
}

// ---- launcher -------------------------------------------------------------------------------

// Stride of an operand along dimension `d` of out, after broadcasting; -1 where it does not fit.
int64_t broadcast_stride(const kh_tensor& t, const kh_tensor& out, int d) {
  const int own = d - (out.ndim - t.ndim);
  if (own < 0 || t.shape[own] == 1) return 0;
  return t.shape[own] == out.shape[d] ? t.stride[own] : -1;
}

bool merges(const Dim& inner, const Dim& outer) {
  for (int k = 0; k < kOperands; ++k)
    if (outer.stride[k] != inner.stride[k] * inner.size) return false;
  return true;
}

// The dimensions of out, innermost first, size 1 dropped, neighbours merged where all allow it.
Layout merged(const Dim* dims, int ndim) {
  Layout layout = {};
  for (int d = ndim - 1; d >= 0; --d) {
    Dim* last = layout.ndim > 0 ? &layout.dims[layout.ndim - 1] : nullptr;
    if (dims[d].size == 1) continue;
    if (last != nullptr && merges(*last, dims[d])) {
      last->size *= dims[d].size;
    } else {
      layout.dims[layout.ndim++] = dims[d];
    }
  }
  if (layout.ndim == 0) {
    layout.dims[0] = {1, {1, 1, 1, 1}};
    layout.ndim = 1;
  }
  return layout;
}

// Whether whole packs of every row can move as one access.
template <class T>
bool packable(const Operands& o, const Layout& layout, int pack) {
  const void* data[kOperands] = {o.x, o.bias, nullptr, o.out};
  const int streamed[] = {kX, kBias, kOut};
  for (int k : streamed) {
    const int64_t inner = layout.dims[0].stride[k];
    if (inner == 0 && k != kOut) continue;
    if (inner != 1 || !aligned(data[k], pack * sizeof(T))) return false;
    for (int d = 1; d < layout.ndim; ++d)
      if (layout.dims[d].stride[k] % pack != 0) return false;
  }
  return true;
}

template <class T, int kPack>
int run(const Operands& o, const Layout& layout, stream_t stream) {
  const int64_t packs_a_row = ceil_div(layout.dims[0].size, kPack);
  int64_t packs = packs_a_row;
  for (int d = 1; d < layout.ndim; ++d) packs *= layout.dims[d].size;
  const int64_t blocks = ceil_div(packs, kThreads);
  const dim3 grid(static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX));
  // The last step of the loop must not overflow the index.
  if (packs < (int64_t{1} << 31))
    return launch(fused_mul_add_kernel<T, kPack, uint32_t>, grid, dim3(kThreads), 0, stream, o,
                  layout, static_cast<uint32_t>(packs_a_row), static_cast<uint32_t>(packs));
  return launch(fused_mul_add_kernel<T, kPack, int64_t>, grid, dim3(kThreads), 0, stream, o, layout,
                packs_a_row, packs);
}

int32_t fused_mul_add_launch(const kh_fused_mul_add_args& a, stream_t stream) {
  const kh_tensor* streamed[] = {&a.x, &a.bias, &a.out};
  for (const kh_tensor* t : streamed)
    KH_REQUIRE(present(*t) && well_formed(*t) && t->dtype == a.out.dtype,
               "x, bias and out must be tensors of one dtype");
  const bool scalar = !present(a.scale);
  KH_REQUIRE(scalar || (well_formed(a.scale) &&
                        (a.scale.dtype == KH_FLOAT32 || a.scale.dtype == KH_FLOAT16 ||
                         a.scale.dtype == KH_BFLOAT16)),
             "'scale' must be a number or a tensor of fp32, fp16 or bf16");
  const kh_tensor none = {};
  const kh_tensor* operands[] = {&a.x, &a.bias, scalar ? &none : &a.scale};
  Dim dims[KH_MAX_DIMS];
  for (const kh_tensor* t : operands) KH_REQUIRE(t->ndim <= a.out.ndim, "out has too few dims");
  for (int d = 0; d < a.out.ndim; ++d) {
    dims[d].size = a.out.shape[d];
    dims[d].stride[kOut] = a.out.stride[d];
    for (int k = kX; k < kOut; ++k) {
      dims[d].stride[k] = broadcast_stride(*operands[k], a.out, d);
      KH_REQUIRE(dims[d].stride[k] >= 0, "x, bias and scale must broadcast to out");
    }
  }
  if (numel(a.out) == 0) return 0;
  const Layout layout = merged(dims, a.out.ndim);
  const Operands o = {a.x.data,
                      a.bias.data,
                      scalar ? nullptr : a.scale.data,
                      a.out.data,
                      static_cast<float>(a.scale_value),
                      a.scale.dtype};
  return for_float_type(a.out.dtype, "out", [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kPack = kVectorBytes / sizeof(T);
    if (packable<T>(o, layout, kPack)) return launched(run<T, kPack>(o, layout, stream));
    return launched(run<T, 1>(o, layout, stream));
  });
}

}  // namespace
}  // namespace kh

KH_EXPORT int32_t kh_fused_mul_add(const kh_fused_mul_add_args* args, void* stream) {
  kh::DeviceGuard guard(static_cast<int>(args->device));
  if (guard.status() != 0) return kh::launched(guard.status());
  return kh::fused_mul_add_launch(*args, static_cast<kh::stream_t>(stream));
}
