// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on the CPU: the arguments of the
// kernels of cpu_kernel.h.
#pragma once

#include <cstdint>
#include <span>

#include "common/dispatch.h"
#include "regions/problem.h"

namespace relops {

// The taps of a region on one axis. Bin b has the taps [begin[b], begin[b + 1]), in ascending order of their pixels.
template <class Compute>
struct AxisTaps {
  const int32_t* begin;
  const int32_t* pixel;
  const Compute* weight;
  // Derivatives of the weight with respect to the first and last coordinate of the box; null if not needed.
  const Compute *slope_first, *slope_last;
  int32_t low, high;  // every pixel is in [low, high)
  int32_t max_taps;   // the largest number of taps of a bin
};

// A box, converted to taps. A map is one image on one level and has the number level * N + image.
template <class Compute>
struct Region {
  int64_t k;    // index of the box
  int64_t map;  // number of the map from which the box reads
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
  int64_t max_columns;             // the largest number of columns that a region reads
  int64_t max_taps_y, max_taps_x;  // the largest number of taps of a bin

  // These tensors are [K,out_channels,PH,PW] in the layout of the input.
  T* output;              // forward pass only
  const T* grad_output;   // backward pass only
  const T* pooled;        // the output of the forward pass; only for the backward pass of roi_pool
  Compute* box_partials;  // [channel blocks,K,4]: the gradients of the boxes from each block
};

// On NCHW maps, a work item processes a block of this many channels. The number is a constant, because the gradients of
// boxes are summed block by block and the order of summation must not vary.
constexpr int64_t kChannelBlock = 8;

}  // namespace relops
