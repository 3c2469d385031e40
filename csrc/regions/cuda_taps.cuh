// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on CUDA: the taps of a box in
// shared memory, for kernels whose blocks work on one box.
#pragma once

#include "regions/cuda.cuh"

namespace relops {

// The limit for dynamic shared memory per block. A higher limit would have to be enabled for each kernel.
constexpr size_t kSharedBytes = 46 << 10;

// The taps of a box on one axis, in shared memory. Bin b has the taps [begin[b], begin[b + 1]).
template <class Compute>
struct SharedTaps {
  int* begin;
  int* pixel;
  Compute *weight, *slope_first, *slope_last;

  RELOPS_HOST_DEVICE static size_t bytes(int64_t bins, int64_t max_taps, bool slopes) {
    return max_taps * sizeof(Compute) * (slopes ? 3 : 1) + (max_taps + bins + 1) * sizeof(int) + sizeof(Compute);
  }
  // Allocates the taps at `memory` and advances `memory` past them.
  __device__ static SharedTaps allocate(char*& memory, int bins, int max_taps, bool slopes) {
    SharedTaps taps{};
    taps.weight = reinterpret_cast<Compute*>(memory);
    taps.slope_first = slopes ? taps.weight + max_taps : nullptr;
    taps.slope_last = slopes ? taps.weight + 2 * max_taps : nullptr;
    taps.pixel = reinterpret_cast<int*>(taps.weight + (slopes ? 3 : 1) * max_taps);
    taps.begin = taps.pixel + max_taps;
    memory += (bytes(bins, max_taps, slopes) / sizeof(Compute)) * sizeof(Compute);
    return taps;
  }
};

// Upper bounds for the number of taps of a box on each axis.
struct MaxTaps {
  int y, x;

  template <class Compute>
  size_t bytes(int PH, int PW, bool slopes) const {
    return SharedTaps<Compute>::bytes(PH, y, slopes) + SharedTaps<Compute>::bytes(PW, x, slopes);
  }
};

inline MaxTaps max_taps(const RegionProblem& p) {
  // Neighboring bins have at most two pixels in common, unless the box is so huge that positions are rounded to the
  // same numbers. find_taps then leaves out taps, whose weights are about 0.
  const auto bound = [&](int64_t size, int64_t bins) {
    const int64_t any = size + 2 * bins;
    return p.spec.kind == RegionKind::kSampled && p.spec.sampling_ratio > 0
               ? std::min(any, bins * std::min<int64_t>(size, 2 * p.spec.sampling_ratio))
               : any;
  };
  MaxTaps taps{0, 0};
  for (const RegionLevel<void>& level : p.levels) {
    taps.y = std::max(taps.y, static_cast<int>(std::min<int64_t>(bound(level.H, p.PH), 2147483647)));
    taps.x = std::max(taps.x, static_cast<int>(std::min<int64_t>(bound(level.W, p.PW), 2147483647)));
  }
  return taps;
}

// Finds the taps of all bins of an axis, with one thread per bin. visit(bin, tap) must call tap(pixel, weight) or
// tap(pixel, weight, slope_first, slope_last) in the order of for_each_tap in taps.h. All threads of the block must
// call this function.
template <class Compute, class Visit>
__device__ void find_taps(int bins, int max_taps, const SharedTaps<Compute>& taps, Visit visit) {
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    // Positions ascend, so a pixel that the bin has already read is one of the last two distinct pixels.
    int count = 0, last = -1, second_last = -1;
    visit(bin, [&](int pixel, auto...) {
      if (pixel == last || pixel == second_last) return;
      second_last = last;
      last = pixel;
      ++count;
    });
    taps.begin[bin + 1] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    taps.begin[0] = 0;
    for (int bin = 0; bin < bins; ++bin) taps.begin[bin + 1] = min(taps.begin[bin] + taps.begin[bin + 1], max_taps);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    int next = taps.begin[bin];
    const int begin = next, end = taps.begin[bin + 1];
    visit(bin, [&](int pixel, auto weight, auto... slopes) {
      int tap = next;
      for (int i = next - 1; i >= begin && i >= next - 2; --i)
        if (taps.pixel[i] == pixel) tap = i;
      if (tap == end) return;
      const bool is_new = tap == next;
      next += is_new;
      taps.pixel[tap] = pixel;
      taps.weight[tap] = static_cast<Compute>(weight) + (is_new ? 0 : taps.weight[tap]);
      if constexpr (sizeof...(slopes) == 2) {
        const Compute slope[2] = {static_cast<Compute>(slopes)...};
        taps.slope_first[tap] = slope[0] + (is_new ? 0 : taps.slope_first[tap]);
        taps.slope_last[tap] = slope[1] + (is_new ? 0 : taps.slope_last[tap]);
      }
    });
  }
  __syncthreads();
}

// Returns the number of blocks per region: enough to occupy every multiprocessor, but at most `work`.
inline unsigned blocks_per_region(int64_t K, int64_t work) {
  constexpr int64_t kBlocks = 1024;
  return static_cast<unsigned>(std::clamp<int64_t>(std::min(ceil_div(kBlocks, K), work), 1, 65535));
}

}  // namespace relops
