// How CPU kernels share work among threads and get memory of their own.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/cpu/isa.h"
#include "common/host_device.h"

namespace relops {

template <class I>
constexpr I round_up(I n, I multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Uninitialized memory for a thread's own use, aligned to a cache line.
class Scratch {
 public:
  template <class X>
  X* allocate(int64_t count) {
    void* p = std::aligned_alloc(64, round_up<int64_t>(std::max<int64_t>(count, 1) * sizeof(X), 64));
    if (p == nullptr) throw std::bad_alloc();
    blocks_.emplace_back(p, std::free);
    return static_cast<X*>(p);
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks_;
};

// Asks for huge pages under a large new result: faulting in 4 KB pages one by one takes longer than filling them.
inline void use_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(p), kPage);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// How many threads some work is worth, of which callers give an estimate: the nanoseconds that it takes one, to a
// factor of two. Where all cores are busy another thread begins only at the end of a scheduler's slice, milliseconds
// later, so that for little work none is woken, whatever the number of items. Results must not depend on it.
inline int64_t threads_for(double nanoseconds) {
  constexpr double kShare = 50e3;
  const double shares = std::round(nanoseconds / kShare);
  return shares < 2 ? 1 : static_cast<int64_t>(std::min<double>(shares, torch::stable::get_num_threads()));
}

// Vectors that so many values fill, for such estimates.
template <class Compute>
double vectors_of(double values) {
  return values * sizeof(Compute) / vector_bytes(isa());
}

// Each thread makes a worker of its own, make(), and calls worker(item) for items that it takes one at a time, so that
// unequal ones are spread evenly. Which thread does an item must not matter to its result.
template <class Make>
void for_each_item(int64_t items, int64_t threads, const Make& make) {
  const int64_t workers = std::min(items, threads);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      auto worker = make();
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) worker(item);
    }
  };
  workers > 1 ? torch::stable::parallel_for(0, workers, 1, work) : work(0, workers);
}

// Calls f(begin, end) for ranges that make up [0, count), each thread's its own.
template <class F>
void for_each_range(int64_t count, int64_t threads, const F& f) {
  if (count <= 0) return;
  const int64_t ranges = std::min(count, threads);
  ranges > 1 ? torch::stable::parallel_for(0, count, ceil_div(count, ranges), f) : f(0, count);
}

}  // namespace relops
