// relation_attention on CUDA: who does what in the forward and the backward. cuda_geometry.cuh has the geometry of
// pairs, cuda_products.cuh the products of rows of features.
//
// In both directions a block has 16 `own` rows, or a multiple of that, of up to 8 heads. They are queries, or keys in
// the kernel that computes the gradients of keys, values and key boxes. The block goes over the `others` in tiles. A
// step takes a tile through stages, each of which is on another tile, so that there is one barrier a step:
//   1. the boxes of the tile: logarithms of sizes, and their sines and cosines;
//   2. b of all pairs and heads, to shared memory: a warp has an other and all own rows; the 32 features of a pair, of
//      dx and dy, are computed in the registers where a tensor core wants them;
//   3. the products of features: a warp has a head;
//   4. in the backward, the gradients that go through b: warps have others again.
#pragma once

#include "common/cuda/mma.cuh"
#include "relation_attention/problem.h"

namespace relops {

constexpr int kOwnRows = 16;
constexpr int kHeads = 8;  // of a block
constexpr int kHeadThreads = 32 * kHeads;

// Pairs and heads: Compute tile[kHeads][kOwnRows][others], padded against bank conflicts.
template <int kOthers>
struct TileLayout {
  static constexpr int kRow = kOthers + 1, kHead = kOwnRows * kRow + 4, kSize = kHeads * kHead;
  static __device__ __forceinline__ int at(int head, int row, int other) { return head * kHead + row * kRow + other; }
};

template <class T>
struct RelationParams {
  using Compute = ComputeType<T>;

  RelationAttentionArgs<T> a;
  bool vector;                          // rows of features can be loaded 16 bytes at a time
  int row_tiles;                        // of kOwnRows, of a block
  unsigned row_blocks, groups, chunks;  // of own rows, of heads, of channels
  // Backward:
  const Compute* delta;  // [N,Q,M], sum over channels of grad_output * output
  Compute* of_weight;    // [N,row_blocks,65 M], partial gradients of weights, then biases; or null
  Compute* of_boxes;     // [groups,N,own rows,4], partial gradients of the own boxes; or null
};

// What a block works on. Row blocks are numbered fastest, because those of a head read the same rows of the other side.
struct RelationBlock {
  template <class T>
  __device__ RelationBlock(const RelationParams<T>& p, int64_t own_rows) {
    unsigned block = blockIdx.x;
    row_block = block % p.row_blocks;
    block /= p.row_blocks;
    group = block % p.groups;
    block /= p.groups;
    chunk = block % p.chunks;
    n = block / p.chunks;
    first = int64_t{row_block} * p.row_tiles * kOwnRows + threadIdx.x / kHeadThreads * kOwnRows;
    const int64_t left = own_rows - first;
    rows = left < 0 ? 0 : left < kOwnRows ? static_cast<int>(left) : kOwnRows;
    head = group * kHeads;
    heads = static_cast<int>(p.a.M - head < kHeads ? p.a.M - head : kHeads);
  }
  unsigned row_block, group, chunk;
  int64_t n, first;  // image; first own row of these eight warps
  int rows;          // how many of the kOwnRows rows exist
  int64_t head;
  int heads;
};

// Calls f(exact) with a std::bool_constant that says whether products of float32 are as exact as float32 is.
template <class T, class F>
void dispatch_exact(bool allow_tf32, F f) {
  if constexpr (std::is_same_v<T, float>)
    if (allow_tf32) return f(std::false_type{});
  f(std::true_type{});
}

// In cuda_backward.cu.
template <class T>
void relation_attention_backward(const RelationAttention& r, const RelationAttentionArgs<T>& a);

// In cuda_forward.cu, for 16-bit features: writes the partial sums [chunks of kColumns<T> channels,N,Q,M] of delta, by
// the forward.
template <class T>
void launch_delta(RelationAttentionArgs<T> a, float* partials, cudaStream_t stream);

}  // namespace relops
