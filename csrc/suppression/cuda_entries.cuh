// nms, batched_nms, nms_padded and soft_nms on CUDA: entries in the order of keys, by image and by class.
#pragma once

#include <cub/device/device_radix_sort.cuh>

#include "common/cuda/device.cuh"
#include "suppression/nms.h"

namespace relops {

constexpr int kEntryThreads = 256;

// Places arrays one after the other in memory that is allocated once: a first pass, from null, finds how much.
class Placement {
 public:
  explicit Placement(void* memory = nullptr) : begin_(reinterpret_cast<uintptr_t>(memory)) {}

  template <class T>
  void take(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(begin_ + used_);
    used_ += ceil_div(count * sizeof(T), 256) * 256;
  }
  int64_t used() const { return used_; }

 private:
  uintptr_t begin_;
  int64_t used_ = 0;
};

// The memory itself, for place(Placement&) that takes every array.
template <class F>
Tensor allocate(const Tensor& like, F place) {
  Placement measured;
  place(measured);
  Tensor memory = torch::stable::new_empty(like, {measured.used()}, ScalarType::Byte);
  Placement placed(memory.mutable_data_ptr());
  place(placed);
  return memory;
}

// Buffers of a sort of n keys. The result is in `sorted`; `order` are the values that came with the keys.
template <class Key>
struct SortBuffers {
  Key *keys, *sorted;
  int32_t *values, *order;
  char* workspace;
  size_t workspace_bytes = 0;

  void place(Placement& placement, int64_t n) {
    placement.take(keys, n);
    placement.take(sorted, n);
    placement.take(values, n);
    placement.take(order, n);
    STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(nullptr, workspace_bytes, keys, sorted, values, order,
                                                   static_cast<int>(n), 0, static_cast<int>(8 * sizeof(Key)), nullptr));
    placement.take(workspace, workspace_bytes);
  }

  // By the low `bits` of the keys, stable.
  void sort(int64_t n, int bits, cudaStream_t stream) {
    STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(workspace, workspace_bytes, keys, sorted, values, order,
                                                   static_cast<int>(n), 0, bits, stream));
  }
};

inline int bits_of(int64_t values) {
  int bits = 1;
  while (int64_t{1} << bits < values) ++bits;
  return bits;
}

// The index as a thread of a one-dimensional grid.
__device__ inline int64_t thread_number() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

// keys[i], values[i]: the image of entry order[i] of [B,K], and that entry.
static __global__ __launch_bounds__(kEntryThreads) void image_keys_kernel(int64_t n, int K, const int32_t* order,
                                                                          uint32_t* keys, int32_t* values) {
  const int64_t i = thread_number();
  if (i >= n) return;
  keys[i] = order[i] / K;
  values[i] = order[i];
}

// Brings entries that are in any order into that of their images, the rest staying as it is.
inline const int32_t* by_image(const NmsProblem& p, const int32_t* order, SortBuffers<uint32_t>& buffers,
                               cudaStream_t stream) {
  const int64_t n = p.B * p.K;
  image_keys_kernel<<<grid_size(p.op, ceil_div(n, kEntryThreads)), kEntryThreads, 0, stream>>>(
      n, static_cast<int>(p.K), order, buffers.keys, buffers.values);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  buffers.sort(n, bits_of(p.B), stream);
  return buffers.order;
}

// keys[i]: the class of entry order[i] (null: of entry i), so that unsigned keys are in the order of signed classes;
// values[i]: i.
static __global__ __launch_bounds__(kEntryThreads) void class_keys_kernel(int64_t n, const int64_t* idxs,
                                                                          const int32_t* order, uint64_t* keys,
                                                                          int32_t* values) {
  const int64_t i = thread_number();
  if (i >= n) return;
  keys[i] = static_cast<uint64_t>(idxs[order == nullptr ? i : order[i]]) ^ (uint64_t{1} << 63);
  values[i] = static_cast<int32_t>(i);
}

// The places [begin, end) of a class, or of an image where there are no classes.
struct Span {
  int begin, end;
};

// spans[i]: of the class of place i; classes[i] are in order within each image of K places. longest (null: not wanted)
// grows to the length of the longest.
static __global__ __launch_bounds__(kEntryThreads) void spans_kernel(int64_t n, int K, const int64_t* classes,
                                                                     Span* spans, int* longest) {
  const int64_t i = thread_number();
  if (i >= n) return;
  const int first = static_cast<int>(i) / K * K;
  // The first place from `low` on whose class is not below (or_equal: beyond) this one's.
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

// The host's copy of a number on the device: the one synchronization of ops whose result has a length of its own.
inline int64_t read_count(const Tensor& count) {
  // The handle of a default stream does not name its device: it means that of the current one.
  const torch::stable::accelerator::DeviceGuard guard(count.get_device_index());
  const cudaStream_t stream = current_stream(count.get_device_index());
  cudaStreamCaptureStatus capture;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  STD_TORCH_CHECK(capture == cudaStreamCaptureStatusNone,
                  "relops: the number of boxes kept cannot be read while a CUDA graph is captured; use nms_padded, or "
                  "soft_nms on a batch");
  int64_t host = 0;
  STD_CUDA_CHECK(cudaMemcpyAsync(&host, count.const_data_ptr(), sizeof(host), cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return host;
}

}  // namespace relops
