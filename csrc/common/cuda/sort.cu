// Sorting on CUDA with CUB.

#include <cub/device/device_radix_sort.cuh>

#include "common/cuda/device.cuh"
#include "common/cuda/sort.cuh"

namespace relops {

template <class Key>
void sort_pairs(void* workspace, size_t& bytes, const Key* keys, Key* sorted_keys, const int32_t* values,
                int32_t* sorted_values, int64_t count, int bits, cudaStream_t stream) {
  STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(workspace, bytes, keys, sorted_keys, values, sorted_values,
                                                 static_cast<int>(count), 0, bits, stream));
}

template void sort_pairs(void*, size_t&, const uint32_t*, uint32_t*, const int32_t*, int32_t*, int64_t, int,
                         cudaStream_t);
template void sort_pairs(void*, size_t&, const uint64_t*, uint64_t*, const int32_t*, int32_t*, int64_t, int,
                         cudaStream_t);

}  // namespace relops
