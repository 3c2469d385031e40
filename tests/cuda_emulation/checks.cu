// Ops that break rules of CUDA or show how the emulation computes, for test_cuda_emulation_checks.py.

#include <torch/csrc/stable/library.h>

#include <cub/device/device_radix_sort.cuh>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/cuda/device.cuh"

namespace {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

__global__ void nothing_kernel() {}

// Makes one CUDA call while device `guarded` is current, on the stream of device `of_stream`.
Tensor call(const Tensor& x, std::string name, int64_t guarded, int64_t of_stream) {
  const DeviceGuard guard(static_cast<int32_t>(guarded));
  const cudaStream_t stream = of_stream < 0 ? nullptr : relops::current_stream(static_cast<int32_t>(of_stream));
  Tensor result = torch::stable::new_empty(x, {4}, torch::headeronly::ScalarType::Int);
  int* memory = result.mutable_data_ptr<int>();
  int host, device;
  size_t bytes = 1;
  cudaStreamCaptureStatus status;
  const std::map<std::string, std::function<void()>> calls{
      {"launch", [&] { nothing_kernel<<<1, 32, 0, stream>>>(); }},
      {"memset", [&] { STD_CUDA_CHECK(cudaMemsetAsync(memory, 0, 4, stream)); }},
      {"copy", [&] { STD_CUDA_CHECK(cudaMemcpyAsync(&host, memory, 4, cudaMemcpyDeviceToHost, stream)); }},
      {"synchronize", [&] { STD_CUDA_CHECK(cudaStreamSynchronize(stream)); }},
      {"is capturing", [&] { STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status)); }},
      {"sort",
       [&] {
         STD_CUDA_CHECK(
             cub::DeviceRadixSort::SortPairs(memory, bytes, memory, memory, memory, memory, 1, 0, 32, stream));
       }},
      {"size of a sort",
       [&] {
         STD_CUDA_CHECK(
             cub::DeviceRadixSort::SortPairs(nullptr, bytes, memory, memory, memory, memory, 1, 0, 32, nullptr));
       }},
      {"function attribute",
       [&] {
         STD_CUDA_CHECK(cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 48 << 10));
       }},
      {"device attribute",
       [&] {
         STD_CUDA_CHECK(cudaGetDevice(&device));
         STD_CUDA_CHECK(cudaDeviceGetAttribute(&host, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
       }},
  };
  calls.at(name)();
  return result;
}

template <int kStaticBytes>
__global__ void shared_kernel() {
  __shared__ char memory[kStaticBytes + 1];
  memory[0] = 0;
}

// Launches a kernel with one byte more than `static_bytes` of static shared memory, after setting its attribute to each
// of the given values.
Tensor launch(const Tensor& x, std::vector<int64_t> attributes, int64_t static_bytes, int64_t dynamic_bytes) {
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = relops::current_stream(x.get_device_index());
  const auto with = [&](auto bytes) {
    for (const int64_t value : attributes)
      STD_CUDA_CHECK(cudaFuncSetAttribute(shared_kernel<bytes>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(value)));
    shared_kernel<bytes><<<1, 32, dynamic_bytes, stream>>>();
  };
  // Each number of bytes is another kernel.
  if (static_bytes == 0) with(std::integral_constant<int, 0>{});
  if (static_bytes == 1023) with(std::integral_constant<int, 1023>{});
  if (static_bytes == 2047) with(std::integral_constant<int, 2047>{});
  return x;
}

__global__ void barrier_kernel(bool diverging) {
  if (diverging && threadIdx.x == 0)
    __syncthreads();
  else
    __syncwarp();
}

Tensor grid(const Tensor& x, int64_t blocks, int64_t threads, bool diverging) {
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = relops::current_stream(x.get_device_index());
  barrier_kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream>>>(diverging);
  return x;
}

__global__ void uninitialized_kernel(float* out) {
  extern __shared__ __align__(16) char memory[];
  __shared__ float variable;
  float& dynamic = *reinterpret_cast<float*>(memory);
  out[2 * blockIdx.x] = variable;
  out[2 * blockIdx.x + 1] = dynamic;
  variable = dynamic = 0;
}

// Returns uninitialized memory of the dtype of x.
Tensor uninitialized(const Tensor& x) { return torch::stable::new_empty(x, {4}); }

// Returns uninitialized shared memory of two blocks.
Tensor uninitialized_shared(const Tensor& x) {
  const DeviceGuard guard(x.get_device_index());
  const Tensor result = torch::stable::new_empty(x, {4});
  uninitialized_kernel<<<2, 1, 4, relops::current_stream(x.get_device_index())>>>(result.mutable_data_ptr<float>());
  return result;
}

__global__ void function_kernel(int function, const float* a, const float* b, float* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (function == 0) out[i] = __sinf(a[i]);
  if (function == 1) out[i] = __cosf(a[i]);
  if (function == 2) out[i] = __fdividef(a[i], b[i]);
  if (function == 3) {
    out[i] = a[i];
    atomicAdd(out + i, b[i]);
  }
}

// Applies a function of function_kernel to tensors whose size is a multiple of 32.
Tensor apply(const Tensor& a, const Tensor& b, int64_t function) {
  const DeviceGuard guard(a.get_device_index());
  const Tensor result = torch::stable::new_empty(a, a.sizes());
  function_kernel<<<static_cast<unsigned>(a.numel() / 32), 32, 0, relops::current_stream(a.get_device_index())>>>(
      static_cast<int>(function), a.const_data_ptr<float>(), b.const_data_ptr<float>(),
      result.mutable_data_ptr<float>());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY(cuda_emulation, m) {
  m.def("call(Tensor x, str name, int guarded, int of_stream) -> Tensor");
  m.def("launch(Tensor x, int[] attributes, int static_bytes, int dynamic_bytes) -> Tensor");
  m.def("grid(Tensor x, int blocks, int threads, bool diverging) -> Tensor");
  m.def("uninitialized(Tensor x) -> Tensor");
  m.def("uninitialized_shared(Tensor x) -> Tensor");
  m.def("apply(Tensor a, Tensor b, int function) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_emulation, CPU, m) {
  m.impl("call", TORCH_BOX(&call));
  m.impl("launch", TORCH_BOX(&launch));
  m.impl("grid", TORCH_BOX(&grid));
  m.impl("uninitialized", TORCH_BOX(&uninitialized));
  m.impl("uninitialized_shared", TORCH_BOX(&uninitialized_shared));
  m.impl("apply", TORCH_BOX(&apply));
}
