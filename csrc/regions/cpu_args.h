// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on the CPU: what the kernels of
// cpu_kernel.h are called with.
#pragma once

#include <cstdint>
#include <span>

#include "common/dispatch.h"
#include "regions/problem.h"

namespace relops {

// The taps of the bins of one region on one axis: those of bin b are [begin[b], begin[b + 1]), their pixels ascending.
template <class Compute>
struct AxisTaps {
  const int32_t* begin;
  const int32_t* pixel;
  const Compute* weight;
  const Compute *slope_first, *slope_last;  // derivatives of the weight by the box's coordinates; null if not needed
  int32_t low, high;                        // every pixel is in [low, high)
  int32_t max_taps;                         // of any bin
};

// A box as taps. A map is an image on one level, number level * N + image.
template <class Compute>
struct Region {
  int64_t k;    // which box
  int64_t map;  // which map it reads
  AxisTaps<Compute> y, x;
};

template <class T>
struct RegionArgs {
  using Compute = ComputeType<T>;

  int64_t N, channels, out_channels, K, PH, PW, L;
  bool position_sensitive;
  const RegionLevel<T>* levels;    // [L]
  const Region<Compute>* regions;  // [K], ordered by map
  const int64_t* map_begin;        // [L*N + 1]: the regions of map m are [map_begin[m], map_begin[m + 1])
  // The largest numbers that any region has: of columns that it reads, of taps of a bin.
  int64_t max_columns, max_taps_y, max_taps_x;

  T* output;              // [K,out_channels,PH,PW] in the layout of the input; forward only
  const T* grad_output;   // likewise; backward only
  const T* pooled;        // the output, likewise; backward of the maximum only
  Compute* box_partials;  // [channel blocks,K,4]: what each block adds to the gradient of the boxes
};

// Channels of one item of work on NCHW maps. It is fixed, because the gradients of boxes are summed block by block.
constexpr int64_t kChannelBlock = 8;

}  // namespace relops
