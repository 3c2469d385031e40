// nms, batched_nms, nms_padded and soft_nms on CUDA: sorting entries by key, image and class.
#pragma once

#include "common/cuda/device.cuh"
#include "common/cuda/sort.cuh"
#include "suppression/nms.h"

namespace relops {

constexpr int kEntryThreads = 256;

// Allocates arrays one after another from one block of memory. An Arena without memory only measures how much memory
// the arrays need.
class Arena {
 public:
  explicit Arena(void* memory = nullptr) : begin_(reinterpret_cast<uintptr_t>(memory)) {}

  template <class T>
  void allocate(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(begin_ + used_);
    used_ += ceil_div(count * sizeof(T), 256) * 256;
  }
  int64_t used() const { return used_; }

 private:
  uintptr_t begin_;
  int64_t used_ = 0;
};

// Returns memory for all arrays that allocate_arrays(Arena&) allocates. allocate_arrays is called twice: first to
// measure the size, then to set the pointers to the arrays.
template <class F>
Tensor allocate_memory(const Tensor& like, F allocate_arrays) {
  Arena measuring;
  allocate_arrays(measuring);
  Tensor memory = torch::stable::new_empty(like, {measuring.used()}, ScalarType::Byte);
  Arena arena(memory.mutable_data_ptr());
  allocate_arrays(arena);
  return memory;
}

// Buffers for sorting n key-value pairs. sort() writes the sorted keys to `sorted` and their values to `order`.
template <class Key>
struct SortBuffers {
  Key *keys, *sorted;
  int32_t *values, *order;
  char* workspace;
  size_t workspace_bytes = 0;

  void allocate(Arena& arena, int64_t n) {
    arena.allocate(keys, n);
    arena.allocate(sorted, n);
    arena.allocate(values, n);
    arena.allocate(order, n);
    sort_pairs(nullptr, workspace_bytes, keys, sorted, values, order, n, static_cast<int>(8 * sizeof(Key)), nullptr);
    arena.allocate(workspace, workspace_bytes);
  }

  // Sorts by the low `bits` bits of the keys and keeps the order of pairs with equal keys.
  void sort(int64_t n, int bits, cudaStream_t stream) {
    sort_pairs(workspace, workspace_bytes, keys, sorted, values, order, n, bits, stream);
  }
};

// Returns the index of the thread in a one-dimensional grid.
__device__ inline int64_t thread_index() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

// Sets keys[i] to the image of entry order[i] of [B,K], and values[i] to order[i].
static __global__ __launch_bounds__(kEntryThreads) void image_keys_kernel(int64_t n, int K, const int32_t* order,
                                                                          uint32_t* keys, int32_t* values) {
  const int64_t i = thread_index();
  if (i >= n) return;
  keys[i] = order[i] / K;
  values[i] = order[i];
}

// Sorts the entries `order` by image and keeps their order within each image.
inline const int32_t* sort_by_image(const NmsProblem& p, const int32_t* order, SortBuffers<uint32_t>& buffers,
                                    cudaStream_t stream) {
  const int64_t n = p.B * p.K;
  image_keys_kernel<<<grid_size(p.op, ceil_div(n, kEntryThreads)), kEntryThreads, 0, stream>>>(
      n, static_cast<int>(p.K), order, buffers.keys, buffers.values);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  buffers.sort(n, bits_of(p.B), stream);
  return buffers.order;
}

// Sets keys[i] to the class of entry order[i], or of entry i if order is null, and sets values[i] to i. The sign bit of
// the class is inverted, so the unsigned keys have the same order as the signed classes.
static __global__ __launch_bounds__(kEntryThreads) void class_keys_kernel(int64_t n, const int64_t* idxs,
                                                                          const int32_t* order, uint64_t* keys,
                                                                          int32_t* values) {
  const int64_t i = thread_index();
  if (i >= n) return;
  keys[i] = static_cast<uint64_t>(idxs[order == nullptr ? i : order[i]]) ^ (uint64_t{1} << 63);
  values[i] = static_cast<int32_t>(i);
}

// The positions [begin, end) of a class, or of an image if there are no classes.
struct Span {
  int begin, end;
};

// Sets spans[i] to the span of the class at position i. Each image has K positions, and `classes` must be sorted within
// each image. If `longest` is not null, *longest must be 0 before the call and is set to the length of the longest
// span.
static __global__ __launch_bounds__(kEntryThreads) void spans_kernel(int64_t n, int K, const int64_t* classes,
                                                                     Span* spans, int* longest) {
  const int64_t i = thread_index();
  if (i >= n) return;
  const int first = static_cast<int>(i) / K * K;
  // Returns the first position in [low, high) whose class is greater than the class at position i or, unless or_equal
  // is set, equal to it. Returns `high` if no such position exists.
  const auto search = [&](int low, int high, bool or_equal) {
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (classes[middle] < classes[i] || (or_equal && classes[middle] == classes[i]))
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  const Span span{search(first, static_cast<int>(i), false), search(static_cast<int>(i), first + K, true)};
  spans[i] = span;
  if (longest != nullptr && span.begin == i) atomicMax(longest, span.end - span.begin);
}

// Copies the number of kept entries from the device to the host. Only ops whose output size depends on the data wait
// for the device, and they do so only in this function.
inline int64_t read_count(const Tensor& count) {
  // The handle of a default stream does not identify a device: it refers to the default stream of the current device.
  const torch::stable::accelerator::DeviceGuard guard(count.get_device_index());
  const cudaStream_t stream = current_stream(count.get_device_index());
  cudaStreamCaptureStatus capture;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  STD_TORCH_CHECK(capture == cudaStreamCaptureStatusNone,
                  "relops: the number of kept boxes cannot be read while a CUDA graph is captured; use nms_padded, or "
                  "soft_nms on a batch");
  int64_t host = 0;
  STD_CUDA_CHECK(cudaMemcpyAsync(&host, count.const_data_ptr(), sizeof(host), cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return host;
}

}  // namespace relops
