// SPDX-License-Identifier: Apache-2.0
//
// The torch device type PrivateUse1, emulated in host memory: two devices, whose tensors are told
// apart from those of the host by their device alone. All work is done when a call returns.
//
// An operator without a kernel below runs the host's kernel on the same memory (see `Loan`), so
// in-place writes, `out=` and views need no copies and cannot lose a write.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <utility>
#include <vector>

namespace {

using c10::Device;
using c10::DeviceIndex;

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
constexpr DeviceIndex kDeviceCount = 2;
constexpr size_t kAlignmentBytes = 256;  // as device allocators give

// ---- devices and streams ---------------------------------------------------------------------

thread_local DeviceIndex current_device = 0;
thread_local c10::StreamId current_streams[kDeviceCount] = {};  // 0 is the default stream

DeviceIndex checked(DeviceIndex index) {
  TORCH_CHECK(index < kDeviceCount, "musa: there is no device ", static_cast<int>(index), ", only ",
              static_cast<int>(kDeviceCount));
  return index < 0 ? current_device : index;
}

struct Event {
  std::chrono::steady_clock::time_point recorded;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  DeviceIndex deviceCount() const noexcept override { return kDeviceCount; }
  Device getDevice() const override { return {kType, current_device}; }
  void setDevice(Device device) const override { current_device = checked(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }

  c10::Stream getStream(Device device) const override {
    const DeviceIndex index = checked(device.index());
    return c10::Stream(c10::Stream::UNSAFE, {kType, index}, current_streams[index]);
  }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, {kType, checked(device.index())});
  }
  c10::Stream getNewStream(Device device, int /*priority*/) const override {
    static std::atomic<c10::StreamId> next{1};
    return c10::Stream(c10::Stream::UNSAFE, {kType, checked(device.index())}, next++);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool /*high_priority*/) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}

  void record(void** event, const c10::Stream&, const DeviceIndex,
              const c10::EventFlag) const override {
    if (!*event) *event = new Event;
    static_cast<Event*>(*event)->recorded = std::chrono::steady_clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* start, void* end, const DeviceIndex) const override {
    const auto time = static_cast<Event*>(end)->recorded - static_cast<Event*>(start)->recorded;
    return std::chrono::duration<double, std::milli>(time).count();
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- memory ----------------------------------------------------------------------------------

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size_bytes) override {
    void* memory = nullptr;
    if (size_bytes && posix_memalign(&memory, kAlignmentBytes, size_bytes)) throw std::bad_alloc();
    return {memory, memory, &std::free, Device(kType, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t size_bytes) const override {
    default_copy_data(to, from, size_bytes);
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(kType, &allocator);

void reallocate(const c10::Storage& storage, size_t size_bytes) {
  const c10::DeviceGuard guard(storage.device());
  c10::DataPtr memory = allocator.allocate(size_bytes);
  const size_t kept_bytes = std::min(size_bytes, storage.nbytes());
  if (kept_bytes) std::memcpy(memory.get(), storage.data(), kept_bytes);
  storage.unsafeGetStorageImpl()->set_data_ptr(std::move(memory));
  storage.unsafeGetStorageImpl()->set_nbytes(size_bytes);
}

// ---- random numbers --------------------------------------------------------------------------

// A generator of the host under a device's name; the host's kernels draw from the former.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(DeviceIndex index, at::Generator numbers = at::detail::createCPUGenerator())
      : GeneratorImpl({kType, index}, kKeys), host(std::move(numbers)) {}

  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_offset(uint64_t offset) override {
    TORCH_CHECK(offset == 0, "musa: the emulated generator has no offset");
  }
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override { return new Generator(device().index(), host.clone()); }

  at::Generator host;
};

const at::Generator& default_generator(DeviceIndex index) {
  static const at::Generator generators[kDeviceCount] = {at::make_generator<Generator>(0),
                                                         at::make_generator<Generator>(1)};
  return generators[checked(index)];
}

at::Generator host_generator(const c10::IValue& value, DeviceIndex index) {
  const at::Generator given = value.isNone() ? default_generator(index) : value.toGenerator();
  TORCH_CHECK(given.device().type() == kType,
              "Expected a 'musa' device type for generator but found '", given.device().type(),
              "'");
  return given.get<Generator>()->host;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDeviceCount; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex index) const override { current_device = checked(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return std::exchange(current_device, checked(index));
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetAllocator(c10::DeviceType::CPU);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(checked(index));
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size_bytes) const override {
    reallocate(storage, size_bytes);
  }
};
Hooks hooks;
const bool hooks_registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// ---- one memory seen from both sides ---------------------------------------------------------

c10::Storage make_storage(size_t size_bytes, c10::DataPtr memory, c10::Allocator* owner) {
  return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), size_bytes,
                                               std::move(memory), owner, /*resizable=*/true);
}

at::Tensor make_tensor(c10::Storage storage, c10::DispatchKey key, const at::Tensor& form) {
  TORCH_CHECK(form.layout() == at::kStrided, "musa: the emulated device has no ", form.layout(),
              " tensors");
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                         c10::DispatchKeySet(key), form.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(form.sizes(), form.strides(),
                                                      form.storage_offset());
  if (form.is_conj()) tensor._set_conj(true);
  if (form.is_neg()) tensor._set_neg(true);
  return tensor;
}

// A result of the host as a tensor of the device, without a copy.
at::Tensor adopt(const at::Tensor& result, Device device) {
  auto* kept = new c10::Storage(result.storage());
  const auto release = [](void* storage) { delete static_cast<c10::Storage*>(storage); };
  c10::DataPtr memory(kept->mutable_data(), kept, release, device);
  return make_tensor(make_storage(kept->nbytes(), std::move(memory), &allocator),
                     c10::DispatchKey::PrivateUse1, result);
}

// Lends tensors of the device to the host for one call, and takes results back. What shares memory
// on one side shares it on the other, so that overlaps are seen and views stay views.
class Loan {
 public:
  at::Tensor lend(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kType) return tensor;
    for (const auto& [ours, theirs] : tensors_) {
      if (ours.is_same(tensor)) return theirs;
    }
    tensors_.emplace_back(tensor,
                          make_tensor(lend(tensor.storage()), c10::DispatchKey::CPU, tensor));
    return tensors_.back().second;
  }

  // To be called once the host is done and before results are taken back: an `out=` of another
  // shape was resized on the host's side.
  void follow_resizes() {
    for (const auto& [ours, theirs] : tensors_) {
      const c10::Storage& from = theirs.storage();
      if (from.data() != ours.storage().data()) {
        reallocate(ours.storage(), from.nbytes());
        if (from.nbytes()) std::memcpy(ours.storage().mutable_data(), from.data(), from.nbytes());
      }
      if (ours.sizes() != theirs.sizes() || ours.strides() != theirs.strides()) {
        ours.unsafeGetTensorImpl()->set_sizes_and_strides(theirs.sizes(), theirs.strides(),
                                                          theirs.storage_offset());
      }
    }
  }

  at::Tensor take_back(const at::Tensor& result, Device device) const {
    if (!result.defined() || !result.is_cpu()) return result;
    for (const auto& [ours, theirs] : tensors_) {
      if (theirs.is_same(result)) return ours;
    }
    for (const auto& [ours, theirs] : storages_) {
      if (theirs.is_alias_of(result.storage())) {
        return make_tensor(ours, c10::DispatchKey::PrivateUse1, result);
      }
    }
    return adopt(result, device);
  }

 private:
  c10::Storage lend(const c10::Storage& storage) {
    for (const auto& [ours, theirs] : storages_) {
      if (ours.is_alias_of(storage)) return theirs;
    }
    const Device host(c10::DeviceType::CPU);
    storages_.emplace_back(storage, make_storage(storage.nbytes(), {storage.mutable_data(), host},
                                                 c10::GetAllocator(c10::DeviceType::CPU)));
    return storages_.back().second;
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;  // ours, theirs
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
};

// ---- operators without a kernel of their own -------------------------------------------------

// The device of a call, which all its tensors must be on. As on real devices, a scalar of the host
// may stand among the inputs, and so may the indices of `x[...]`.
class CallDevice {
 public:
  void see(const c10::IValue& value, const c10::Argument& argument) {
    if (value.isTensor()) {
      see(value.toTensor(), argument.alias_info() && argument.alias_info()->isWrite());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) see(tensor, false);
    } else if (value.isDevice() && value.toDevice().type() == kType) {
      requested_ = value.toDevice();
    }
  }

  Device get() const {
    if (found_ && found_->type() == kType) return *found_;
    return {kType, checked(requested_ ? requested_->index() : -1)};
  }

 private:
  void see(const at::Tensor& tensor, bool written) {
    if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0 && !written)) return;
    TORCH_CHECK(!found_ || *found_ == tensor.device(),
                "Expected all tensors to be on the same device, but found at least two devices, ",
                *found_, " and ", tensor.device(), "!");
    found_ = tensor.device();
  }

  std::optional<Device> found_, requested_;
};

c10::IValue to_host(const c10::IValue& value, const c10::Argument& argument, Device device,
                    Loan& loan) {
  if (value.isTensor()) return loan.lend(value.toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> tensors = value.toTensorVector();
    for (at::Tensor& tensor : tensors) tensor = loan.lend(tensor);
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> tensors = value.toOptionalTensorList().copy();
    for (size_t i = 0; i < tensors.size(); ++i) {
      const std::optional<at::Tensor> tensor = tensors.get(i);
      if (tensor) tensors.set(i, loan.lend(*tensor));
    }
    return tensors;
  }
  if (value.isDevice() && value.toDevice().type() == kType) return Device(c10::DeviceType::CPU);
  if (value.isGenerator() || (value.isNone() && argument.name() == "generator")) {
    return host_generator(value, device.index());
  }
  return value;
}

c10::IValue to_device(const c10::IValue& value, Device device, const Loan& loan) {
  if (value.isTensor()) return loan.take_back(value.toTensor(), device);
  if (value.isTensorList()) {
    std::vector<at::Tensor> tensors = value.toTensorVector();
    for (at::Tensor& tensor : tensors) tensor = loan.take_back(tensor, device);
    return tensors;
  }
  return value;
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::vector<c10::Argument>& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  CallDevice call_device;
  for (size_t i = 0; i < arguments.size(); ++i) call_device.see((*stack)[first + i], arguments[i]);
  const Device device = call_device.get();

  Loan loan;
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[first + i];
    value = to_host(value, arguments[i], device, loan);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  loan.follow_resizes();
  for (size_t i = first; i < stack->size(); ++i) {
    (*stack)[i] = to_device((*stack)[i], device, loan);
  }
}

// ---- operators with one ----------------------------------------------------------------------

at::Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(sizes, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(sizes, strides, &allocator, kKeys,
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool /*non_blocking*/) {
  Loan loan;
  loan.lend(to).copy_(loan.lend(from));
  return to;
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef sizes,
                         std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());  // new memory comes from the current device
  return at::native::resize_(self, sizes, format);
}

void record_stream(at::Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("record_stream", record_stream);
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("resize_", resize);
  library.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  library.impl("set_.source_Storage", TORCH_FN(at::native::set_));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
}

// `copy_from` minds these bits. Torch's own kernels for them resolve them with copies, which come
// here again.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY(emulated_musa, library) {
  library.def("default_generator(int index) -> Generator?",
              [](int64_t index) { return default_generator(static_cast<DeviceIndex>(index)); });
}

}  // namespace

// ---- what Python calls through ctypes; indices and streams are checked there ------------------

extern "C" {
int emulated_musa_device_count() { return kDeviceCount; }
int emulated_musa_current_device() { return current_device; }
void emulated_musa_set_device(int index) { current_device = static_cast<DeviceIndex>(index); }
int64_t emulated_musa_current_stream(int index) { return current_streams[index]; }
void emulated_musa_set_stream(int index, int64_t stream) { current_streams[index] = stream; }
}
