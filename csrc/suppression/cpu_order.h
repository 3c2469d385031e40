// nms, batched_nms, nms_padded and soft_nms on the CPU: sorting entries by keys and classes.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "common/cpu/work.h"
#include "suppression/nms.h"

namespace relops {

template <class Key>
struct Entry {
  Key key;
  uint32_t index;
};

// Sorts `entries` by key and keeps the order of entries with equal keys. `other` is a buffer with n elements, like
// `entries`. Returns the sorted entries, which are in either of these two arrays.
template <class Key>
Entry<Key>* sort_by_key(Entry<Key>* entries, Entry<Key>* other, int64_t n) {
  constexpr int kBits = 11, kDigits = (8 * sizeof(Key) + kBits - 1) / kBits, kValues = 1 << kBits;
  uint32_t counts[kDigits][kValues] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int d = 0; d < kDigits; ++d) ++counts[d][entries[i].key >> (d * kBits) & (kValues - 1)];
  for (int d = 0; d < kDigits; ++d) {
    const auto digit = [d](Key key) { return key >> (d * kBits) & (kValues - 1); };
    if (n == 0 || counts[d][digit(entries[0].key)] == n) continue;  // all keys have the same digit
    uint32_t begin = 0;
    for (uint32_t& count : counts[d]) begin += std::exchange(count, begin);
    for (int64_t i = 0; i < n; ++i) other[counts[d][digit(entries[i].key)]++] = entries[i];
    std::swap(entries, other);
  }
  return entries;
}

struct Range {
  int64_t begin, end;
};

// Sorts n entries by class, keeps their order within each class, and returns the range of each class. Without idxs, all
// entries belong to one class.
inline std::vector<Range> group_by_class(const int64_t* idxs, uint32_t* entries, int64_t n) {
  if (n == 0) return {};
  if (idxs == nullptr) return {{0, n}};
  int64_t first = std::numeric_limits<int64_t>::max();
  for (int64_t i = 0; i < n; ++i) first = std::min(first, idxs[entries[i]]);
  Scratch scratch;
  auto* keyed = scratch.allocate<Entry<uint64_t>>(n);
  for (int64_t i = 0; i < n; ++i)
    keyed[i] = {static_cast<uint64_t>(idxs[entries[i]]) - static_cast<uint64_t>(first), entries[i]};
  const auto* sorted = sort_by_key(keyed, scratch.allocate<Entry<uint64_t>>(n), n);
  std::vector<Range> classes;
  for (int64_t i = 0; i < n; ++i) {
    entries[i] = sorted[i].index;
    if (i == 0 || sorted[i].key != sorted[i - 1].key) {
      if (i > 0) classes.back().end = i;
      classes.push_back({i, n});
    }
  }
  return classes;
}

inline int64_t read_count(const Tensor& count) { return *static_cast<const int64_t*>(count.const_data_ptr()); }

}  // namespace relops
