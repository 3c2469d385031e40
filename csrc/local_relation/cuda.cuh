// local_relation on CUDA: how the forward and backward passes divide their work, and the code that both use.
//
// A thread computes several neighboring outputs of a column for one group, and a block computes a tile of outputs. In
// one kernel of the backward pass, threads and blocks compute gradients of inputs instead of outputs. If stride and
// dilation are 1, the windows of a tile are read from shared memory, which holds eight channels of the values at a
// time. A pixel that a thread reads from shared memory serves several outputs of the thread: in a column of taps, tap i
// of output r is in row r + i. Otherwise, in direct mode, a thread has one output and reads taps from global memory,
// mostly from L1.
#pragma once

#include <algorithm>
#include <limits>

#include "common/cuda/device.cuh"
#include "local_relation/problem.h"

namespace relops {

constexpr int kLocalThreads = 256;
constexpr int kLocalMaxBytes = 96 << 10;  // of shared memory, so that two blocks fit on a multiprocessor of sm_90
constexpr int kChannels = 8;              // number of channels of a group that are processed together

// Values in shared memory are packs of 16 bytes, [kPacks][pixels of the tile].
template <class T>
constexpr int kPack = 16 / sizeof(T);
template <class T>
constexpr int kPacks = kChannels / kPack<T>;

template <class T, bool kTiled>
constexpr int kRows = !kTiled          ? 1
                      : sizeof(T) == 8 ? 2
                                       : 4;

template <class T>
struct LocalRelationParams {
  LocalRelationArgs<T> a;
  int width, groups;                 // numbers of columns and of groups of kRows rows in a block
  int columns;                       // columns of the map, from which the number of blocks follows
  int tiles_x, tiles_y;              // number of blocks of a map in each direction
  int chunks;                        // forward only: number of chunks of kChannels channels, each with its own blocks
  bool packs;                        // whether the staged map has adjacent channels that form whole packs
  ComputeType<T>*logsumexp, *delta;  // [N,G,Ho,Wo], only for the backward pass; logarithms to base 2
  ComputeType<T>* partials;          // [N,tiles,G,k,k]: partial gradients of the prior; or null
};

// The tile, the map and the group of a block.
struct LocalBlock {
  int64_t n, g;
  int chunk, tile, y, x;  // y, x: first output or input of the tile

  template <class T>
  __device__ LocalBlock(const LocalRelationParams<T>& p, int rows) {
    // Chunks vary fastest, then groups, because their channels may be adjacent.
    const unsigned chunks = p.chunks, channel_groups = static_cast<unsigned>(p.a.G), tiles = p.tiles_x * p.tiles_y;
    unsigned b = blockIdx.x;
    chunk = b % chunks, b /= chunks;
    g = b % channel_groups, b /= channel_groups;
    tile = b % tiles, n = b / tiles;
    y = tile / p.tiles_x * p.groups * rows, x = tile % p.tiles_x * p.width;
  }
};

// The column and the rows of a tile that a thread computes. A thread beyond the last group of rows is idle and has the
// position of the first thread.
struct LocalThread {
  int column, row;
  bool active;

  template <class T>
  __device__ LocalThread(const LocalRelationParams<T>& p, int rows) {
    const int group = threadIdx.x / p.width;
    active = group < p.groups;
    column = active ? threadIdx.x % p.width : 0;
    row = active ? group * rows : 0;
  }
};

template <class Compute>
constexpr Compute kLog2E = 1.44269504088896340736;

// The rows and columns that a tile reads, beginning at (y, x), in a map of height x width. Pixels outside the map are
// zero.
struct TileArea {
  int y, x, rows, columns, height, width;
};

// Calls f(i, y, x, inside) for every pixel i of an area, with the position of the pixel in the map and whether the map
// contains it. The threads of the block divide the pixels among themselves.
template <class F>
__device__ __forceinline__ void visit_area(const TileArea& area, F f) {
  const int threads = blockDim.x, first = threadIdx.x;
  const int row_step = threads / area.columns, column_step = threads % area.columns;
  int row = first / area.columns, column = first % area.columns;
  for (int i = first; i < area.rows * area.columns; i += threads) {
    const int y = area.y + row, x = area.x + column;
    f(i, y, x, y >= 0 && y < area.height && x >= 0 && x < area.width);
    row += row_step, column += column_step;
    if (column >= area.columns) column -= area.columns, ++row;
  }
}

template <class T, class Compute>
__device__ void stage(Compute* to, const Map<T>& map, int64_t n, int64_t c, const TileArea& area) {
  visit_area(area, [&](int i, int y, int x, bool inside) {
    to[i] = inside ? static_cast<Compute>(*map.at(n, c, y, x)) : Compute(0);
  });
}

// Stages channels [c, c + channels), but at most kChannels of them, and pads them with zeros to kChannels channels.
template <class T>
__device__ void stage_packs(Pack<T, kPack<T>>* to, const Map<const T>& map, int64_t n, int64_t c, int channels,
                            bool packs, const TileArea& area) {
  visit_area(area, [&](int i, int y, int x, bool inside) {
    const T* const from = map.at(n, c, inside ? y : 0, inside ? x : 0);
#pragma unroll
    for (int pack = 0; pack < kPacks<T>; ++pack) {
      const int first = pack * kPack<T>;
      Pack<T, kPack<T>> staged;
      if (packs)
        staged = load_pack<T, kPack<T>>(from + first, inside && first < channels);
      else
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j)
          staged.x[j] = inside && first + j < channels ? from[(first + j) * map.c_stride] : static_cast<T>(0.0f);
      to[pack * area.rows * area.columns + i] = staged;
    }
  });
}

template <class T>
__device__ __forceinline__ void read_packs(ComputeType<T> (&to)[kChannels], const Pack<T, kPack<T>>* from, int pixels) {
#pragma unroll
  for (int pack = 0; pack < kPacks<T>; ++pack) {
    const Pack<T, kPack<T>> x = from[pack * pixels];
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) to[pack * kPack<T> + j] = static_cast<ComputeType<T>>(x.x[j]);
  }
}

// Reads kChannels channels of one pixel from global memory. Only the first `channels` are read, and the rest are set to
// zero.
template <class T>
__device__ __forceinline__ void read_channels(ComputeType<T> (&to)[kChannels], const Map<const T>& map, int64_t n,
                                              int64_t c, int64_t y, int64_t x, int channels) {
  const T* const from = map.at(n, c, y, x);
#pragma unroll
  for (int j = 0; j < kChannels; ++j)
    to[j] = j < channels ? static_cast<ComputeType<T>>(from[j * map.c_stride]) : ComputeType<T>(0);
}

template <class T>
__device__ __forceinline__ void write_channels(const ComputeType<T> (&from)[kChannels], const Map<T>& map, int64_t n,
                                               int64_t c, int64_t y, int64_t x, int channels) {
  T* const to = map.at(n, c, y, x);
#pragma unroll
  for (int j = 0; j < kChannels; ++j)
    if (j < channels) to[j * map.c_stride] = static_cast<T>(from[j]);
}

// Stages the prior of a group, multiplied by log2(e) because logits are to base 2.
template <class T, class Compute>
__device__ void stage_prior(Compute* to, const LocalRelationArgs<T>& a, int64_t g) {
  const int taps = static_cast<int>(a.k * a.k);
  for (int i = threadIdx.x; i < taps; i += blockDim.x)
    to[i] = a.prior == nullptr ? Compute(0) : a.prior[g * taps + i] * kLog2E<Compute>;
}

// Visits the taps of outputs (ho, wo) to (ho + R - 1, wo), column by column. For each pixel of a column, calls
// load(pixel, y, x, inside) with the position of the pixel in the tile and on the map, and then f(r, key, tap) for each
// output r that reads the pixel. `at` is the position in the tile of the pixel that tap (0, 0) of output 0 reads.
template <bool kTiled, int R, class T, class Compute, class Load, class F>
__device__ __forceinline__ void visit_taps(const LocalRelationArgs<T>& a, const LocalBlock& block, const Compute* keys,
                                           int columns, int at, int ho, int wo, Load load, F f) {
  const int k = static_cast<int>(a.k), before = k / 2, H = static_cast<int>(a.H), W = static_cast<int>(a.W);
  const int stride = static_cast<int>(a.stride), dilation = static_cast<int>(a.dilation);
  for (int j = 0; j < k; ++j) {
    const int x = kTiled ? wo + j - before : stride * wo + dilation * (j - before);
    for (int i = 0; i < k + R - 1; ++i) {
      const int y = kTiled ? ho + i - before : stride * ho + dilation * (i - before);
      const bool inside = y >= 0 && y < H && x >= 0 && x < W;
      if (!inside && !a.zero_border) continue;
      const int pixel = at + i * columns + j;
      const Compute key = kTiled   ? keys[pixel]
                          : inside ? static_cast<Compute>(*a.key.at(block.n, block.g, y, x))
                                   : Compute(0);
      load(pixel, y, x, inside);
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (static_cast<unsigned>(i - r) < static_cast<unsigned>(k)) f(r, key, (i - r) * k + j);
    }
  }
}

// Sums `x` over the threads of a warp and adds the sum to sums[tap]. Each warp has its own `sums`.
template <class Compute>
__device__ __forceinline__ void add_to_tap(Compute* sums, int tap, Compute x) {
  x = group_sum(x, 32);
  if (threadIdx.x % 32 == 0) sums[tap] += x;
}

// Adds the sums of all warps of a block and writes the totals to the partial gradients of the block.
template <class T, class Compute>
__device__ void write_partial(const LocalRelationParams<T>& p, const LocalBlock& block, const Compute* sums) {
  const int taps = static_cast<int>(p.a.k * p.a.k), warps = blockDim.x / 32;
  Compute* const partial = p.partials + ((block.n * p.tiles_x * p.tiles_y + block.tile) * p.a.G + block.g) * taps;
  __syncthreads();
  for (int i = threadIdx.x; i < taps; i += blockDim.x) {
    Compute total = 0;
    for (int warp = 0; warp < warps; ++warp) total += sums[warp * taps + i];
    partial[i] = total;
  }
}

// The contents of shared memory: numbers of the compute type, then the packs of the pixels. The numbers are the prior
// [k,k], `per_pixel` numbers for each pixel of a tile and, if `sums` is set, the sums [warps,k,k] of the gradients of
// the prior.
template <class Compute>
struct LocalMemory {
  int taps, warps;
  int pixels;  // 0 in direct mode
  int per_pixel;
  bool sums;

  RELOPS_HOST_DEVICE constexpr int numbers() const {
    const int n = taps * (sums ? 1 + warps : 1) + pixels * per_pixel;
    return (n + 15) / 16 * 16;  // the packs that follow must be aligned
  }
};

// How a map of rows x columns is divided among blocks. In direct mode, direct_columns replaces columns.
template <class T>
struct LocalLaunch {
  LocalRelationParams<T> p;
  bool tiled;
  unsigned blocks;
  int threads;
  size_t bytes;

  // per_pixel and sums are explained at LocalMemory.
  LocalLaunch(const LocalRelationParams<T>& p_, int rows, int columns, int direct_columns, int per_pixel, bool sums)
      : p(p_) {
    using Compute = ComputeType<T>;
    const size_t max_bytes = shared_memory_limit(kLocalMaxBytes);
    const LocalRelationArgs<T>& a = p.a;
    const int k = static_cast<int>(a.k);
    const auto fits = [&](int pixels, int threads) {
      const LocalMemory<Compute> memory{k * k, threads / 32, pixels, per_pixel, sums};
      bytes = memory.numbers() * sizeof(Compute) + size_t{16} * kPacks<T> * pixels;
      return bytes <= max_bytes;
    };
    const auto choose = [&](int thread_rows, int map_columns, int halo) {
      p.columns = map_columns;
      // The columns are divided evenly among tiles of at most 32 columns.
      p.width = static_cast<int>(ceil_div(map_columns, ceil_div(map_columns, 32)));
      p.groups = static_cast<int>(std::min<int64_t>(kLocalThreads / p.width, ceil_div(rows, thread_rows)));
      for (;; p.groups = (p.groups + 1) / 2) {
        threads = static_cast<int>(ceil_div(p.width * p.groups, 32) * 32);
        const int pixels = halo < 0 ? 0 : (p.groups * thread_rows + halo) * (p.width + halo);
        if (fits(pixels, threads)) break;
        if (p.groups == 1) return false;
      }
      p.tiles_x = static_cast<int>(ceil_div(map_columns, p.width));
      p.tiles_y = static_cast<int>(ceil_div(rows, p.groups * thread_rows));
      return true;
    };
    tiled = a.stride == 1 && a.dilation == 1 && choose(kRows<T, true>, columns, k - 1);
    if (!tiled) choose(kRows<T, false>, direct_columns, -1);
    constexpr LocalMemory<Compute> kLargest{kMaxKernelSize * kMaxKernelSize, 1, 0, 0, true};  // of one row of threads
    static_assert(kLargest.numbers() * sizeof(Compute) <= kSmallestSharedLimit);
    blocks = grid_size(LocalRelation::op, a.N * a.G * p.chunks * int64_t{p.tiles_x} * p.tiles_y);
  }

  template <auto tiled_kernel, auto direct_kernel>
  void run(cudaStream_t stream) const {
    const auto chosen_kernel = tiled ? tiled_kernel : direct_kernel;
    tiled ? allow_shared_memory<tiled_kernel>(kLocalMaxBytes) : allow_shared_memory<direct_kernel>(kLocalMaxBytes);
    chosen_kernel<<<blocks, threads, bytes, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  int64_t partials() const { return p.a.N * p.tiles_x * p.tiles_y; }
};

template <class T>
bool has_packs(const Map<const T>& map, int64_t m) {
  return map.c_stride == 1 && m % kPack<T> == 0 && reinterpret_cast<uintptr_t>(map.data) % 16 == 0 &&
         map.n_stride % kPack<T> == 0 && map.h_stride % kPack<T> == 0 && map.w_stride % kPack<T> == 0;
}

// This function is defined in cuda_backward.cu.
template <class T>
void local_relation_backward(const LocalRelation& r, const LocalRelationArgs<T>& a);

}  // namespace relops
