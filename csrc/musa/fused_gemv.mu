// SPDX-License-Identifier: Apache-2.0
// fused_gemv: out = epilogue(x @ dequant(weight).T). The product, bias and activation are the
// kernel of gemv.mu. RMSNorm needs whole rows, which no block has: the sums go to a workspace in
// fp32 and a second kernel, one block a row, makes the result of them.
#include "gemv.muh"

namespace kh {
namespace {

constexpr int kThreads = 256;

struct Norm {
  const float* sums;   // [M, N]
  const void* weight;  // [N]
  int32_t weight_dtype, out_dtype;
  int64_t weight_stride;
  void* out;  // [M, N]
  int64_t out_row_stride, out_stride;
  int64_t columns;  // N
  float eps;
};

template <class T>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(Norm n) {
  __shared__ float squares[kThreads];
  const float* row = n.sums + static_cast<int64_t>(blockIdx.x) * n.columns;
  float sum = 0.f;
  for (int64_t i = threadIdx.x; i < n.columns; i += kThreads) sum = fmaf(row[i], row[i], sum);
  squares[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) squares[threadIdx.x] += squares[threadIdx.x + half];
    __syncthreads();
  }
  const float mean = __fdiv_rn(squares[0], static_cast<float>(n.columns));
  const float scale = __fdiv_rn(1.f, sqrtf(mean + n.eps));
  T* out = static_cast<T*>(n.out) + static_cast<int64_t>(blockIdx.x) * n.out_row_stride;
  for (int64_t i = threadIdx.x; i < n.columns; i += kThreads) {
    const float weight = read_float(n.weight, n.weight_dtype, i * n.weight_stride);
    out[i * n.out_stride] = from_float<T>(row[i] * scale * weight);
  }
}

int32_t fused_gemv_launch(const kh_fused_gemv_args& a, stream_t stream) {
  KH_REQUIRE(a.activation >= gemv::kNone && a.activation <= gemv::kGeluTanh,
             "'activation' is not known");
  gemv::Problem p = {};
  p.activation = static_cast<int32_t>(a.activation);
  const gemv::Weights weights = {a.x,           a.weight,    a.x_scale, a.weight_scale,
                                 a.weight_zero, a.group_size};
  const int32_t wrong = gemv::fill(p, weights, 0);
  if (wrong != 0) return wrong;
  const bool norm = present(a.norm_weight);
  const kh_tensor* vectors[] = {&a.bias, &a.norm_weight};
  for (const kh_tensor* t : vectors)
    KH_REQUIRE(!present(*t) ||
                   (well_formed(*t) && t->ndim == 1 && t->shape[0] == p.rows && gemv::is_float(*t)),
               "'bias' and 'norm_weight' must be [N]");
  p.columns = a.x.shape[0];
  KH_REQUIRE(
      present(a.out) && gemv::is_float(a.out) && gemv::has_shape(a.out, 0, 0, p.columns, p.outputs),
      "'out' must be [M, n]");
  KH_REQUIRE(!norm || (p.activation == gemv::kNone && a.workspace.dtype == KH_FLOAT32 &&
                       gemv::has_shape(a.workspace, 0, 0, p.columns, p.rows) &&
                       a.workspace.stride[1] == 1 && a.workspace.stride[0] == p.rows),
             "'workspace' must be fp32 [M, N], and 'activation' none, beside 'norm_weight'");
  if (numel(a.out) == 0) return 0;
  if (present(a.bias)) p.bias = gemv::table_of(a.bias, 0);
  p.x_rows_a_token = 1;
  p.slots = 1;
  const kh_tensor& sums = norm ? a.workspace : a.out;
  p.out = sums.data;
  p.out_dtype = sums.dtype;
  p.out_token_stride = sums.stride[0];
  p.out_stride = sums.stride[1];
  const int32_t status = gemv::run(p, a.weight.dtype, a.tile, stream);
  if (status != 0 || !norm) return status;

  KH_REQUIRE(p.columns <= kMaxGridX, "M must be below 2^31");
  const Norm n = {static_cast<const float*>(a.workspace.data),
                  a.norm_weight.data,
                  a.norm_weight.dtype,
                  a.out.dtype,
                  a.norm_weight.stride[0],
                  a.out.data,
                  a.out.stride[0],
                  a.out.stride[1],
                  p.rows,
                  static_cast<float>(a.eps)};
  return for_float_type(a.out.dtype, "out", [&](auto type) {
    using T = typename decltype(type)::type;
    return launched(launch(rms_norm_kernel<T>, dim3(static_cast<unsigned>(p.columns)),
                           dim3(kThreads), 0, stream, n));
  });
}

}  // namespace
}  // namespace kh

KH_EXPORT int32_t kh_fused_gemv(const kh_fused_gemv_args* args, void* stream) {
  kh::DeviceGuard guard(static_cast<int>(args->device));
  if (guard.status() != 0) return kh::launched(guard.status());
  return kh::fused_gemv_launch(*args, static_cast<kh::stream_t>(stream));
}
