// Sorting on CUDA. The sort of CUB takes long to compile, so sort.cu alone includes it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace relops {

// Returns the number of bits needed to represent the integers in [0, values).
inline int bits_of(int64_t values) {
  int bits = 1;
  while (int64_t{1} << bits < values) ++bits;
  return bits;
}

// Sorts count < 2^31 key-value pairs by the low `bits` bits of the keys, and keeps the order of pairs with equal keys.
// If workspace is null, only sets `bytes` to the size of the workspace. Key is uint32_t or uint64_t.
template <class Key>
void sort_pairs(void* workspace, size_t& bytes, const Key* keys, Key* sorted_keys, const int32_t* values,
                int32_t* sorted_values, int64_t count, int bits, cudaStream_t stream);

}  // namespace relops
