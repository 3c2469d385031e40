// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on CUDA: tiles of the maps, and the
// boxes that reach them.
//
// A kernel marks the boxes that reach each tile, with one bit per box and tile. Every block that works on a tile then
// lists these boxes from the bits, whatever its channels are. The boxes of a list are in ascending order, so sums over
// boxes are bitwise identical in every run.
#pragma once

#include "regions/cuda.cuh"

namespace relops {

// The pixels [top, bottom] x [left, right] of an image on a level.
struct Tile {
  int map, level, image, top, left, bottom, right;
};

// The tiles of all levels that take part, numbered level by level.
struct RegionTiles {
  unsigned count[kMaxRegionLevels];  // tiles per level
  unsigned total;
  int words;          // words of `reached` per tile
  unsigned* reached;  // [total,words]; bit k % 32 of word k / 32 is set if box k reaches the tile
};

// Returns the tile of this block, which has kSide x kSide pixels, or fewer at the border of the map.
template <int kSide, class P>
__device__ __forceinline__ Tile tile_of_block(const P& p, const RegionTiles& tiles) {
  unsigned tile = blockIdx.x;
  int l = 0;
  for (; tile >= tiles.count[l]; ++l) tile -= tiles.count[l];
  const int H = p.levels[l].H, W = p.levels[l].W;
  const unsigned columns = (W + kSide - 1) / kSide, rows = (H + kSide - 1) / kSide;
  const unsigned line = tile / columns, image = line / rows;
  const int top = (line - image * rows) * kSide, left = (tile - line * columns) * kSide;
  const int map = static_cast<int>(image) * p.L + l;
  return {map, l, static_cast<int>(image), top, left, min(top + kSide, H) - 1, min(left + kSide, W) - 1};
}

// Marks the boxes that reach a tile, with one block per tile. Boxes whose bins span more than max_extent rows or
// columns are left out.
template <class P, int kSide>
__global__ __launch_bounds__(kRegionThreads) void region_reach_kernel(const __grid_constant__ P p,
                                                                      const __grid_constant__ RegionTiles tiles,
                                                                      int max_extent) {
  const Tile tile = tile_of_block<kSide>(p, tiles);
  for (int64_t first = 0; first < p.K; first += kRegionThreads) {
    const int64_t k = first + threadIdx.x;
    bool reaches = false;
    if (k < p.K) {
      const auto box = p.boxes[k];
      reaches = box.map == tile.map && box.extent <= max_extent && box.top <= tile.bottom && box.bottom >= tile.top &&
                box.left <= tile.right && box.right >= tile.left;
    }
    const unsigned word = __ballot_sync(kAll, reaches);
    if (threadIdx.x % 32 == 0 && k < p.K) tiles.reached[int64_t{blockIdx.x} * tiles.words + k / 32] = word;
  }
}

constexpr int kListed = 256;  // boxes that a block lists at a time

// Lists the boxes that reach the tile of this block and calls f(list, count) for up to kListed of them at a time. All
// threads of the block must call this function. f must end with a barrier after its last access to the list.
template <class F>
__device__ __forceinline__ void for_each_list(const RegionTiles& tiles, F f) {
  __shared__ int list[kListed];
  __shared__ int warp_counts[kRegionWarps];
  __shared__ int total;  // number of boxes in the words of all threads
  for (int first = 0; first < tiles.words; first += kRegionThreads) {
    // The counts are computed again for every list, because registers are short while f runs.
    for (int skipped = 0; skipped == 0 || skipped < total; skipped += kListed) {
      // Each thread lists the boxes of one word.
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
      const int index = first + threadIdx.x;
      unsigned word = index < tiles.words ? tiles.reached[int64_t{blockIdx.x} * tiles.words + index] : 0;
      int end = inclusive_sum(__popc(word));  // number of boxes in the words of the warp up to this one
      if (lane == 31) warp_counts[warp] = end;
      __syncthreads();
      for (int w = 0; w < warp; ++w) end += warp_counts[w];
      if (threadIdx.x == kRegionThreads - 1) total = end;
      int i = end - __popc(word) - skipped;
      for (; word != 0; word &= word - 1, ++i)
        if (i >= 0 && i < kListed) list[i] = index * 32 + __ffs(word) - 1;
      __syncthreads();
      if (total > 0) f(list, min(total - skipped, kListed));
    }
  }
}

// Numbers the tiles of the levels for which `takes_part(level)` is true, and marks the boxes that reach them. The
// caller must keep the returned memory.
template <int kSide, class P, class F>
Tensor find_tiles(const RegionProblem& problem, const P& p, int max_extent, F takes_part, RegionTiles& tiles,
                  cudaStream_t stream) {
  int64_t total = 0;
  for (int l = 0; l < p.L; ++l) {
    const int64_t count = p.N * ceil_div(p.levels[l].H, kSide) * ceil_div(p.levels[l].W, kSide);
    tiles.count[l] = takes_part(p.levels[l]) ? grid_size(problem.spec.op, count) : 0;
    total += tiles.count[l];
  }
  tiles.total = grid_size(problem.spec.op, total);
  tiles.words = static_cast<int>(ceil_div(p.K, 32));
  Tensor memory = torch::stable::new_empty(problem.boxes, {total * int64_t{tiles.words}}, ScalarType::Int);
  tiles.reached = static_cast<unsigned*>(memory.mutable_data_ptr());
  if (total > 0 && p.K > 0) {
    region_reach_kernel<P, kSide><<<tiles.total, kRegionThreads, 0, stream>>>(p, tiles, max_extent);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return memory;
}

}  // namespace relops
