// relation_attention on CUDA: how the forward and backward passes divide their work. cuda_geometry.cuh contains the
// geometry of pairs, and cuda_products.cuh contains the products of rows of features.
//
// In the forward and backward passes, a block owns 16 rows, or a multiple of 16, of up to 8 heads. These own rows are
// queries, or keys in the kernel that computes the gradients of keys, values and key boxes. If the own rows are
// queries, the other rows are keys, and vice versa. The block iterates over the other rows in tiles. The following
// stages form a pipeline: in each step, every stage processes a different tile, so one barrier per step suffices.
//   1. The boxes of the tile: threads compute the logarithms of the sizes, and the sines and cosines of these
//      logarithms times each frequency.
//   2. b of all pairs and heads: a warp combines one other row with all own rows and writes b to shared memory. The 32
//      features of dx and dy of a pair are computed in the registers from which a tensor core reads them.
//   3. The products of features: a warp processes one head.
//   4. The gradients that flow through b, in the backward pass: a warp again processes one other row at a time.
#pragma once

#include "common/cuda/mma.cuh"
#include "relation_attention/problem.h"

namespace relops {

constexpr int kOwnRows = 16;
constexpr int kHeads = 8;  // number of heads in a block
constexpr int kHeadThreads = 32 * kHeads;

// The layout of an array [kHeads][kOwnRows][kOthers] with one value for each head and pair, padded to avoid bank
// conflicts.
template <int kOthers>
struct TileLayout {
  static constexpr int kRow = kOthers + 1, kHead = kOwnRows * kRow + 4, kSize = kHeads * kHead;
  static __device__ __forceinline__ int at(int head, int row, int other) { return head * kHead + row * kRow + other; }
};

template <class T>
struct RelationParams {
  using Compute = ComputeType<T>;

  RelationAttentionArgs<T> a;
  bool vector;                          // whether rows of features can be loaded 16 bytes at a time
  int row_tiles;                        // number of groups of kOwnRows own rows in a block
  unsigned row_blocks, groups, chunks;  // numbers of blocks of own rows, groups of heads, and chunks of channels
  // Only for the backward pass:
  const Compute* delta;      // [N,Q,M]: sum over channels of grad_output * output
  Compute* weight_partials;  // [N,row_blocks,65 M]: partial gradients of weights, then of biases; or null
  Compute* box_partials;     // [groups,N,own rows,4]: partial gradients of the own boxes; or null
};

// The work of a block. The index of the row block varies fastest, because the row blocks of a head read the same
// other rows.
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
    const int64_t remaining = own_rows - first;
    rows = remaining < 0 ? 0 : remaining < kOwnRows ? static_cast<int>(remaining) : kOwnRows;
    head = group * kHeads;
    heads = static_cast<int>(p.a.M - head < kHeads ? p.a.M - head : kHeads);
  }
  unsigned row_block, group, chunk;
  int64_t n, first;  // image, and first own row of these eight warps
  int rows;          // number of existing rows among the kOwnRows rows
  int64_t head;
  int heads;
};

// Calls f(exact) with a std::bool_constant that is true unless float32 products may use TF32.
template <class T, class F>
void dispatch_exact(bool allow_tf32, F f) {
  if constexpr (std::is_same_v<T, float>)
    if (allow_tf32) return f(std::false_type{});
  f(std::true_type{});
}

// This function is defined in cuda_backward.cu.
template <class T>
void relation_attention_backward(const RelationAttention& r, const RelationAttentionArgs<T>& a);

// Runs the forward kernel to write delta for 16-bit features, as partial sums [chunks,N,Q,M] over chunks of kColumns<T>
// channels. This function is defined in cuda_forward.cu.
template <class T>
void launch_delta(RelationAttentionArgs<T> a, float* partials, cudaStream_t stream);

}  // namespace relops
