// SPDX-License-Identifier: Apache-2.0
// fused_moe_gemv: each token's row times the weights of the experts chosen for it. The product,
// weighting and activation are the kernel of gemv.mu. The sum over a token's slots takes results
// of several blocks: they go to a workspace in fp32 and a second kernel adds them, in slot order.
#include "gemv.muh"

namespace kh {
namespace {

constexpr int kThreads = 256;

struct Slots {
  const float* results;           // [M, k, n]
  void* out;                      // [M, n]
  int64_t slots, columns, count;  // k, n, M * n
  int64_t out_row_stride, out_stride;
};

template <class T>
__global__ void __launch_bounds__(kThreads) sum_slots_kernel(Slots s) {
  await_last();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < s.count;
       i += step) {
    const int64_t token = i / s.columns, column = i - token * s.columns;
    const float* results = s.results + token * s.slots * s.columns + column;
    float sum = 0.f;
    for (int64_t slot = 0; slot < s.slots; ++slot) sum += results[slot * s.columns];
    static_cast<T*>(s.out)[token * s.out_row_stride + column * s.out_stride] = from_float<T>(sum);
  }
}

int32_t fused_moe_gemv_launch(const kh_fused_moe_gemv_args& a, stream_t stream) {
  KH_REQUIRE(a.activation >= gemv::kNone && a.activation <= gemv::kGeluTanh,
             "'activation' is not known");
  gemv::Problem p = {};
  p.activation = static_cast<int32_t>(a.activation);
  const gemv::Weights weights = {a.x,           a.weight,    a.x_scale, a.weight_scale,
                                 a.weight_zero, a.group_size};
  const int32_t wrong = gemv::fill(p, weights, 1);
  if (wrong != 0) return wrong;
  const kh_tensor &ids = a.topk_ids, &by = a.topk_weights;
  KH_REQUIRE(present(ids) && well_formed(ids) && ids.ndim == 2 &&
                 (ids.dtype == KH_INT32 || ids.dtype == KH_INT64),
             "'topk_ids' must be int32 or int64 [M, k]");
  const int64_t tokens = ids.shape[0], slots = ids.shape[1];
  KH_REQUIRE(!present(by) || (gemv::is_float(by) && gemv::has_shape(by, 0, 0, tokens, slots)),
             "'topk_weights' must be [M, k]");
  KH_REQUIRE(a.x.shape[0] == (a.x_per_slot ? tokens * slots : tokens),
             "x must have a row for each token or each of its slots");
  const kh_tensor& results = a.reduce ? a.workspace : a.out;
  KH_REQUIRE(present(a.out) && well_formed(a.out) && gemv::is_float(a.out) &&
                 (a.reduce ? gemv::has_shape(a.out, 0, 0, tokens, p.outputs)
                           : gemv::has_shape(a.out, 1, tokens, slots, p.outputs)),
             "'out' must be [M, k, n], or [M, n] where slots are summed");
  KH_REQUIRE(
      !a.reduce ||
          (results.dtype == KH_FLOAT32 && gemv::has_shape(results, 1, tokens, slots, p.outputs) &&
           (numel(results) == 0 || (results.stride[2] == 1 && results.stride[1] == p.outputs &&
                                    results.stride[0] == slots * p.outputs))),
      "'workspace' must be fp32 [M, k, n] where slots are summed");
  if (numel(a.out) == 0) return 0;

  p.topk_ids = gemv::table_of(ids, 0);
  if (present(by)) p.topk_weights = gemv::table_of(by, 0);
  p.columns = tokens * slots;
  p.slots = slots;
  p.x_rows_a_token = a.x_per_slot ? static_cast<int32_t>(slots) : 1;
  p.out = results.data;
  p.out_dtype = results.dtype;
  p.out_token_stride = results.stride[0];
  p.out_slot_stride = results.stride[1];
  p.out_stride = results.stride[2];
  if (p.columns > 0) {
    const int32_t status = gemv::run(p, a.weight.dtype, a.tile, stream);
    if (status != 0 || !a.reduce) return status;
  }
  Slots s = {static_cast<const float*>(results.data),
             a.out.data,
             slots,
             p.outputs,
             tokens * p.outputs,
             a.out.stride[0],
             a.out.stride[1]};
  return for_float_type(a.out.dtype, "out", [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t blocks = ceil_div(s.count, kThreads);
    const dim3 grid(static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX));
    return launched(launch_early(sum_slots_kernel<T>, grid, dim3(kThreads), 0, stream, s));
  });
}

}  // namespace
}  // namespace kh

KH_EXPORT int32_t kh_fused_moe_gemv(const kh_fused_moe_gemv_args* args, void* stream) {
  kh::DeviceGuard guard(static_cast<int>(args->device));
  if (guard.status() != 0) return kh::launched(guard.status());
  return kh::fused_moe_gemv_launch(*args, static_cast<kh::stream_t>(stream));
}
