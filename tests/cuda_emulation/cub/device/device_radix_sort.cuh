// The part of cub::DeviceRadixSort that csrc uses, for the emulation of CUDA in tests.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda_runtime.h"

namespace cub {

struct DeviceRadixSort {
  template <class Key, class Value>
  static cudaError_t SortPairs(void* workspace, size_t& bytes, const Key* keys, Key* sorted_keys, const Value* values,
                               Value* sorted_values, int64_t count, int begin_bit, int end_bit, cudaStream_t stream) {
    if (workspace == nullptr) {  // even this call asks the current device for its properties
      emulation::check_device("cub::DeviceRadixSort");
      bytes = 1;
      return cudaSuccess;
    }
    emulation::check_stream("cub::DeviceRadixSort", stream);
    const Key mask = static_cast<Key>(~uint64_t{0} >> (64 - end_bit) >> begin_bit << begin_bit);
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return (keys[a] & mask) < (keys[b] & mask); });
    for (int64_t i = 0; i < count; ++i) {
      sorted_keys[i] = keys[order[i]];
      sorted_values[i] = values[order[i]];
    }
    return cudaSuccess;
  }
};

}  // namespace cub
