// The host side of the emulation of CUDA: devices, streams, copies and function attributes.
//
// The emulated machine has several devices. All tensors are on one of them, and device 0, which has none, is current
// unless a guard selects another device. Every call that CUDA makes on the current device must therefore be made under
// a guard that selects the device of the tensors, on the current stream of that device. A call that breaks this rule
// raises an error, although CUDA itself may not notice it: the handle of a default stream refers to the current device,
// whatever device it was obtained for. The functions of torch (empty, zeros, contiguous, clone, to, ...) need no guard,
// because torch selects the device of their tensors itself.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

// A function that tests call through ctypes.
#define EMULATION_CONTROL extern "C" __attribute__((used, visibility("default"))) inline

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

namespace emulation {

// The shared memory that a block may use on each device, in bytes. cuda_emulation/__init__.py names their
// architectures.
constexpr size_t kSharedLimits[] = {163 << 10, 163 << 10, 64 << 10, 99 << 10, 227 << 10};
constexpr size_t kDefaultSharedLimit = 48 << 10;  // for kernels whose attribute was not set

inline int tensor_device = 1;  // the device of all tensors
inline thread_local int current_device = 0;
inline char streams[std::size(kSharedLimits)];  // the addresses are the handles of the current streams of the devices
inline bool capturing = false;                  // whether the current streams are being captured into a graph
inline int created_guards = 0, ignored_guard = -1;

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error("emulated CUDA: " + message); }

inline void check_device(const std::string& call, int device = current_device) {
  if (device != tensor_device)
    fail(call + " on device " + std::to_string(device) + ", but the tensors are on device " +
         std::to_string(tensor_device) + "; is a DeviceGuard missing?");
}

inline void check_stream(const std::string& call, cudaStream_t stream) {
  check_device(call);
  if (stream != &streams[tensor_device]) fail(call + " on a stream that is not torch's current stream");
}

inline void check_not_capturing(const std::string& call) {
  if (capturing) fail(call + " while a graph is captured");
}

// The largest dynamic shared memory with which kernels may be launched, for each kernel and device whose attribute was
// set.
inline std::map<std::pair<void (*)(), int>, size_t> dynamic_limits;

// A block may use 48 KB, static and dynamic shared memory together, unless the attribute of the kernel was set.
template <class Kernel>
void check_shared(Kernel* kernel, size_t dynamic_bytes, size_t static_bytes = 0) {
  const auto set = dynamic_limits.find({reinterpret_cast<void (*)()>(kernel), current_device});
  const bool is_set = set != dynamic_limits.end();
  const size_t limit = is_set ? kSharedLimits[current_device] : kDefaultSharedLimit;
  if (static_bytes + dynamic_bytes > limit || (is_set && dynamic_bytes > set->second))
    fail("a launch with " + std::to_string(dynamic_bytes) + " bytes of dynamic and " + std::to_string(static_bytes) +
         " bytes of static shared memory, but the limit is " + std::to_string(limit) +
         (is_set ? ", and the attribute of the kernel is " + std::to_string(set->second) : ""));
}

// translate() puts `poisoned <<` before every call of torch that returns uninitialized memory. No kernel may rely on
// its contents: floats are NaN, and integers are large.
struct Poisoned {
} inline constexpr poisoned;

inline torch::stable::Tensor operator<<(Poisoned, const torch::stable::Tensor& tensor) {
  using torch::stable::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  const bool is_float = dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half ||
                        dtype == ScalarType::BFloat16;
  if (tensor.numel() > 0)
    std::memset(tensor.mutable_data_ptr(), is_float ? 0xff : 0x7f, tensor.numel() * tensor.element_size());
  return tensor;
}

}  // namespace emulation

// Moves all tensors to another device.
EMULATION_CONTROL void emulation_place_tensors(int device) { emulation::tensor_device = device; }

// Begins or ends the capture of a graph.
EMULATION_CONTROL void emulation_set_capturing(bool capturing) { emulation::capturing = capturing; }

// Makes the guard with this index, counted from this call, select no device. Returns the number of guards that were
// created since the previous call.
EMULATION_CONTROL int emulation_ignore_guard(int index) {
  emulation::ignored_guard = index;
  return std::exchange(emulation::created_guards, 0);
}

namespace torch::stable::accelerator {
struct EmulatedDeviceGuard {
  explicit EmulatedDeviceGuard(int32_t device) {
    if (emulation::created_guards++ != emulation::ignored_guard) emulation::current_device = device;
  }
  EmulatedDeviceGuard(const EmulatedDeviceGuard&) = delete;
  ~EmulatedDeviceGuard() { emulation::current_device = previous; }
  const int previous = emulation::current_device;
};
}  // namespace torch::stable::accelerator

// The memory of the emulated tensors belongs to CPU tensors.
#define is_cuda is_cpu
#define get_device_index() is_cpu() ? emulation::tensor_device : -1
#define DeviceGuard EmulatedDeviceGuard

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = &emulation::streams[device];
  return 0;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::current_device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  emulation::check_device("cudaDeviceGetAttribute", device);
  *value = static_cast<int>(emulation::kSharedLimits[device]);
  return cudaSuccess;
}

// Between this call and the launch, another host thread may set the attribute of the same kernel for a launch of its
// own. The emulation assumes the worst of such threads, which sets the smallest value that was ever set. A kernel may
// therefore only be launched with sizes that all values allow.
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  emulation::check_device("cudaFuncSetAttribute");
  const size_t bytes = value;
  if (value < 0 || bytes > emulation::kSharedLimits[emulation::current_device]) return cudaErrorInvalidValue;
  const auto [set, inserted] =
      emulation::dynamic_limits.try_emplace({reinterpret_cast<void (*)()>(kernel), emulation::current_device}, bytes);
  set->second = std::min(set->second, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  emulation::check_stream("cudaStreamIsCapturing", stream);
  *status = emulation::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  emulation::check_stream("cudaMemcpyAsync", stream);
  emulation::check_not_capturing("a copy between the host and the device");
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  emulation::check_stream("cudaMemsetAsync", stream);
  std::memset(p, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  emulation::check_stream("cudaStreamSynchronize", stream);
  emulation::check_not_capturing("cudaStreamSynchronize");
  return cudaSuccess;
}
