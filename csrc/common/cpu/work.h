// How CPU kernels divide work among threads and allocate memory for each thread.
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

// Uninitialized memory for one thread, aligned to cache lines.
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

// Requests huge pages for a large new result, because faulting in 4 KB pages one by one takes longer than filling them.
inline void use_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(p), kPage);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Returns how many threads to use for work that would take one thread `nanoseconds`. The caller's estimate of this time
// should be right to within a factor of two. If all cores are busy, an additional thread starts only at the end of a
// scheduler's time slice, milliseconds later. A small amount of work therefore stays on one thread, no matter how many
// items it has. Results must not depend on the number of threads.
inline int64_t threads_for(double nanoseconds) {
  constexpr double kNanosecondsPerThread = 50e3;
  const double threads = std::round(nanoseconds / kNanosecondsPerThread);
  return threads < 2 ? 1 : static_cast<int64_t>(std::min<double>(threads, torch::stable::get_num_threads()));
}

// Returns the number of vectors that hold `values` values, for estimates of the work.
template <class Compute>
double vectors_of(double values) {
  return values * sizeof(Compute) / vector_bytes(isa());
}

// Each thread creates its own worker with make(). The thread then gets one item at a time and calls worker(item), so
// items of unequal cost are spread evenly. The result of an item must not depend on which thread computes it.
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

// Divides [0, count) into at most one range per thread and calls f(begin, end) for each range.
template <class F>
void for_each_range(int64_t count, int64_t threads, const F& f) {
  if (count <= 0) return;
  const int64_t ranges = std::min(count, threads);
  ranges > 1 ? torch::stable::parallel_for(0, count, ceil_div(count, ranges), f) : f(0, count);
}

}  // namespace relops
