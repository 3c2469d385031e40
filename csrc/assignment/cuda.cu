// linear_sum_assignment on CUDA.
//
// A block solves one problem. If the problem has more rows than columns, the block uses a transposed copy of the costs,
// so that a row of the search is contiguous. Each thread owns some columns. The search state is in shared memory if it
// fits. Threads read the state of columns that they do not own only after a barrier. A step of the search is one pass
// over a row, in which all loads of a thread are in flight together, and one reduction over the block, which contains
// the only barrier of the step. The latency of L2 and of shuffles limits the speed: steps run one after another, and
// only different problems run in parallel.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "assignment/problem.h"
#include "common/cuda/device.cuh"

namespace relops {

namespace {

constexpr int kMaxThreads = 512;
constexpr int kColumnsPerThread = 4;               // number of loads that are in flight together
constexpr int64_t kStateInSharedBytes = 44 << 10;  // the default limit of a launch is 48 KB; reductions use the rest
constexpr int kTile = 32;
constexpr int kTransposeThreads = 256;

template <class T>
struct AssignmentParams {
  int R, C;
  const T* cost;            // [B,R,C]
  const T* transposed;      // [B,C,R]; for problems with more rows than columns; null if there are none
  const int64_t* num_rows;  // [B]; null: all rows
  const int64_t* num_cols;  // [B]; null: all columns
  bool maximize;
  int64_t state_bytes;  // bytes of search state per problem
  char* state;          // [B,state_bytes]; null: in shared memory
  int64_t* row_to_col;  // [B,R]
  int64_t* col_to_row;  // [B,C]
};

struct UsedSizes {
  int r, c;
};

// Returns the sizes of a problem, or zeros if they exceed the sizes of the tensor.
__device__ __forceinline__ UsedSizes used_sizes(const int64_t* num_rows, const int64_t* num_cols, int R, int C,
                                                int64_t b) {
  const int64_t r = num_rows == nullptr ? R : num_rows[b], c = num_cols == nullptr ? C : num_cols[b];
  const bool fits = r >= 0 && r <= R && c >= 0 && c <= C;
  return {fits ? static_cast<int>(r) : 0, fits ? static_cast<int>(c) : 0};
}

// Sets out[b,j,i] to cost[b,i,j] for the used part of problems with more rows than columns. A block copies one tile.
template <class Bits>
__global__ __launch_bounds__(kTransposeThreads) void transpose_kernel(const Bits* cost, const int64_t* num_rows,
                                                                      const int64_t* num_cols, int R, int C,
                                                                      int tiles_down, int tiles_across, Bits* out) {
  __shared__ Bits tile[kTile][kTile + 1];
  const unsigned tiles = tiles_down * tiles_across;
  const int64_t b = blockIdx.x / tiles;
  const int tile_index = blockIdx.x % tiles;
  const UsedSizes used = used_sizes(num_rows, num_cols, R, C, b);
  const int i0 = tile_index / tiles_across * kTile, j0 = tile_index % tiles_across * kTile;
  if (used.r <= used.c || i0 >= used.r || j0 >= used.c) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int k = warp; k < kTile; k += kTransposeThreads / 32)
    if (i0 + k < used.r && j0 + lane < used.c) tile[k][lane] = cost[(b * R + i0 + k) * C + j0 + lane];
  __syncthreads();
  for (int k = warp; k < kTile; k += kTransposeThreads / 32)
    if (j0 + k < used.c && i0 + lane < used.r) out[(b * C + j0 + k) * R + i0 + lane] = tile[lane][k];
}

// Returns the key by which columns with equal values are ordered: columns without a row come first, and ties are broken
// by the index of the column.
__device__ __forceinline__ uint64_t column_key(int column, int row) {
  return uint64_t{row >= 0} << 63 | uint64_t{static_cast<unsigned>(column)} << 32 | static_cast<unsigned>(row);
}
__device__ __forceinline__ int column_of_key(uint64_t key) { return static_cast<int>(key >> 32 & 0x7fffffff); }
__device__ __forceinline__ int row_of_key(uint64_t key) { return static_cast<int>(static_cast<unsigned>(key)); }

template <class X>
__device__ __forceinline__ bool precedes(const X& a, const X& b) {
  return a.first < b.first || (a.first == b.first && a.key < b.key);
}

// The lowest value and the key of its column, reduced over a block.
struct LowestOne {
  double first;
  uint64_t key;
  __device__ static LowestOne empty() { return {INFINITY, ~uint64_t{0}}; }
  __device__ static LowestOne of(double x, uint64_t key) { return {x, key}; }
  __device__ void merge(const LowestOne& other) {
    if (precedes(other, *this)) *this = other;
  }
  __device__ LowestOne from_lane(int mask) const {
    return {__shfl_xor_sync(kAll, first, mask), __shfl_xor_sync(kAll, key, mask)};
  }
};

// The lowest value, the key of its column, and the second lowest value, reduced over a block.
struct LowestTwo {
  double first, second;
  uint64_t key;
  __device__ static LowestTwo empty() { return {INFINITY, INFINITY, ~uint64_t{0}}; }
  __device__ static LowestTwo of(double x, uint64_t key) { return {x, INFINITY, key}; }
  __device__ void merge(const LowestTwo& other) {
    const bool better = precedes(other, *this);
    const double losing = better ? first : other.first, runner_up = better ? other.second : second;
    second = losing < runner_up ? losing : runner_up;
    first = better ? other.first : first;
    key = better ? other.key : key;
  }
  __device__ LowestTwo from_lane(int mask) const {
    return {__shfl_xor_sync(kAll, first, mask), __shfl_xor_sync(kAll, second, mask), __shfl_xor_sync(kAll, key, mask)};
  }
};

// Merges x over the block and returns the result to all threads. `parity` alternates between calls, so that a slow
// thread can still read the results of the previous call.
template <class X>
__device__ X merge_over_block(X x, int parity) {
  constexpr int kMaxWarps = kMaxThreads / 32;
  __shared__ X warp_results[2][kMaxWarps];
  const int lane = threadIdx.x % 32, slot = lane % kMaxWarps;
  for (int mask = 16; mask > 0; mask /= 2) x.merge(x.from_lane(mask));
  if (lane == 0) warp_results[parity][threadIdx.x / 32] = x;
  __syncthreads();
  x = slot < blockDim.x / 32 ? warp_results[parity][slot] : X::empty();
  for (int mask = kMaxWarps / 2; mask > 0; mask /= 2) x.merge(x.from_lane(mask));
  return x;
}

// Implements the Search of assign_rows (problem.h).
template <class T>
class BlockSearch {
 public:
  static int64_t bytes(int64_t n, int64_t m) { return (m * (8 + 8 + 4 + 4 + 1) + n * 4 + 15) / 16 * 16; }

  __device__ BlockSearch(const T* cost, int64_t stride, int n, int m, bool maximize, char* state)
      : cost_(cost),
        stride_(stride),
        m_(m),
        maximize_(maximize),
        price_(reinterpret_cast<double*>(state)),
        distance_(price_ + m),
        predecessor_(reinterpret_cast<int*>(distance_ + m)),
        row_of_(predecessor_ + m),
        column_of_(row_of_ + m),
        settled_(reinterpret_cast<bool*>(column_of_ + n)) {
    for (int j = threadIdx.x; j < m; j += blockDim.x) {
      price_[j] = 0;
      row_of_[j] = -1;
    }
    for (int i = threadIdx.x; i < n; i += blockDim.x) column_of_[i] = -1;
    double max_magnitude = 0;
    for (int i = threadIdx.x / 32; i < n; i += blockDim.x / 32)
#pragma unroll 4
      for (int j = threadIdx.x % 32; j < m; j += 32) {
        const double magnitude = fabs(stored(i, j));
        if (permitted(magnitude) && magnitude > max_magnitude) max_magnitude = magnitude;
      }
    // The maximum is computed as the negated minimum of the negated values, because only a minimum reduction is
    // available.
    scale_ = cost_scale(-merge_over_block(LowestOne::of(-max_magnitude, 0), 0).first, n);
  }

  __device__ bool permits(int i, int j) const { return permitted(fabs(stored(i, j))); }
  __device__ int column_of(int i) const { return column_of_[i]; }
  __device__ bool has_column(int i) const { return column_of_[i] >= 0; }
  __device__ void bids_done() const { __syncthreads(); }

  __device__ Lowest lowest(int i) {
    LowestTwo thread_best = LowestTwo::empty();
    scan(i, [&](int j, double cost) { thread_best.merge(LowestTwo::of(cost - price_[j], column_key(j, row_of_[j]))); });
    const LowestTwo block_best = merge_over_block(thread_best, parity_ ^= 1);
    return {block_best.first, block_best.second, column_of_key(block_best.key), row_of_key(block_best.key)};
  }

  __device__ void assign(int i, const Lowest& to) {
    if (to.column % blockDim.x == threadIdx.x) {
      price_[to.column] -= to.second - to.first;
      row_of_[to.column] = i;
    }
    if (threadIdx.x > 0) return;
    if (to.row >= 0) column_of_[to.row] = -1;
    column_of_[i] = to.column;
  }

  __device__ Nearest start(int i) {
    LowestOne thread_best = LowestOne::empty();
    scan(i, [&](int j, double cost) {
      distance_[j] = cost - price_[j];
      predecessor_[j] = i;
      settled_[j] = false;
      thread_best.merge(LowestOne::of(distance_[j], column_key(j, row_of_[j])));
    });
    return nearest(thread_best);
  }

  __device__ Nearest extend(const Nearest& at) {
    const double offset = at.distance - (scaled(stored(at.row, at.column)) - price_[at.column]);
    LowestOne thread_best = LowestOne::empty();
    scan(at.row, [&](int j, double cost) {
      if (j == at.column) settled_[j] = true;
      if (settled_[j]) return;
      const double x = cost - price_[j] + offset;
      if (x < distance_[j]) {
        distance_[j] = x;
        predecessor_[j] = at.row;
      }
      thread_best.merge(LowestOne::of(distance_[j], column_key(j, row_of_[j])));
    });
    return nearest(thread_best);
  }

  // Other threads read the prices and the assignment (row_of_, column_of_) only after the barrier at the end.
  __device__ void finish(int i, const Nearest& end) {
    for (int j = threadIdx.x; j < m_; j += blockDim.x)
      if (settled_[j]) price_[j] += distance_[j] - end.distance;
    if (threadIdx.x == 0)
      for (int column = end.column, row = -1; row != i;) {
        row = predecessor_[column];
        row_of_[column] = row;
        const int previous = column_of_[row];
        column_of_[row] = column;
        column = previous;
      }
    __syncthreads();
  }

 private:
  __device__ static bool permitted(double magnitude) { return magnitude < INFINITY; }  // false for NaN

  __device__ double stored(int i, int j, bool valid = true) const {
    return static_cast<double>(static_cast<ComputeType<T>>(load_pack<T, 1>(cost_ + i * stride_ + j, valid).x[0]));
  }

  __device__ double scaled(double cost) const {
    return permitted(fabs(cost)) ? product(maximize_ ? -cost : cost, scale_.scale) : scale_.forbidden;
  }

  // Calls f(j, cost of row i and column j) for each column j of this thread.
  template <class F>
  __device__ __forceinline__ void scan(int i, F f) const {
    for (int first = threadIdx.x; first < m_; first += kColumnsPerThread * blockDim.x) {
      double costs[kColumnsPerThread];
#pragma unroll
      for (int k = 0; k < kColumnsPerThread; ++k) {
        const int j = first + k * blockDim.x;
        costs[k] = stored(i, j < m_ ? j : 0, j < m_);
      }
#pragma unroll
      for (int k = 0; k < kColumnsPerThread; ++k) {
        const int j = first + k * blockDim.x;
        if (j < m_) f(j, scaled(costs[k]));
      }
    }
  }

  __device__ Nearest nearest(const LowestOne& thread_best) {
    const LowestOne block_best = merge_over_block(thread_best, parity_ ^= 1);
    return {block_best.first, column_of_key(block_best.key), row_of_key(block_best.key)};
  }

  const T* cost_;
  int64_t stride_;
  int m_, parity_ = 0;
  bool maximize_;
  CostScale scale_;
  double *price_, *distance_;
  int *predecessor_, *row_of_, *column_of_;  // predecessor_: the row from which a column was reached
  bool* settled_;
};

template <class T, bool kStateInShared>
__global__ __launch_bounds__(kMaxThreads, 1) void assign_kernel(const __grid_constant__ AssignmentParams<T> p) {
  extern __shared__ __align__(16) char memory[];
  const int64_t b = blockIdx.x;
  int64_t *row_matches = p.row_to_col + b * p.R, *column_matches = p.col_to_row + b * p.C;
  for (int i = threadIdx.x; i < p.R; i += blockDim.x) row_matches[i] = -1;
  for (int j = threadIdx.x; j < p.C; j += blockDim.x) column_matches[j] = -1;
  const UsedSizes used = used_sizes(p.num_rows, p.num_cols, p.R, p.C, b);
  const int n = min(used.r, used.c), m = max(used.r, used.c);
  if (n == 0) return;
  const bool columns_are_rows = used.r > used.c;
  BlockSearch<T> search((columns_are_rows ? p.transposed : p.cost) + b * p.R * p.C, columns_are_rows ? p.R : p.C, n, m,
                        p.maximize, kStateInShared ? memory : p.state + b * p.state_bytes);
  assign_rows(search, n, m);
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const int j = search.column_of(i);
    if (!search.permits(i, j)) continue;
    (columns_are_rows ? column_matches : row_matches)[i] = j;
    (columns_are_rows ? row_matches : column_matches)[j] = i;
  }
}

template <class T>
Tensor transposed(const AssignmentProblems& p, cudaStream_t stream) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  Tensor out = torch::stable::new_empty(p.cost, {p.B, p.C, p.R});
  const int64_t down = ceil_div(p.R, kTile), across = ceil_div(p.C, kTile);
  transpose_kernel<Bits><<<grid_size(kAssignmentOp, p.B * down * across), kTransposeThreads, 0, stream>>>(
      static_cast<const Bits*>(p.cost.const_data_ptr()), sizes_or_null(p.num_rows), sizes_or_null(p.num_cols),
      static_cast<int>(p.R), static_cast<int>(p.C), static_cast<int>(down), static_cast<int>(across),
      static_cast<Bits*>(out.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<Tensor, Tensor> linear_sum_assignment(const Tensor& cost, const std::optional<Tensor>& num_rows,
                                                 const std::optional<Tensor>& num_cols, bool maximize) {
  const torch::stable::accelerator::DeviceGuard guard(cost.get_device_index());
  const AssignmentProblems p(cost, num_rows, num_cols);
  Tensor row_to_col = p.new_output(p.R), col_to_row = p.new_output(p.C);
  if (p.B == 0 || p.R + p.C == 0) return {row_to_col, col_to_row};
  const cudaStream_t stream = current_stream(cost.get_device_index());
  dispatch_features(kAssignmentOp, p.cost.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    AssignmentParams<T> a{};
    a.R = static_cast<int>(p.R);
    a.C = static_cast<int>(p.C);
    a.cost = static_cast<const T*>(p.cost.const_data_ptr());
    a.num_rows = sizes_or_null(p.num_rows);
    a.num_cols = sizes_or_null(p.num_cols);
    a.maximize = maximize;
    a.row_to_col = static_cast<int64_t*>(row_to_col.mutable_data_ptr());
    a.col_to_row = static_cast<int64_t*>(col_to_row.mutable_data_ptr());
    const bool more_rows_than_columns = p.R > p.C || p.num_cols;
    std::optional<Tensor> transposed_copy, state_memory;
    if (more_rows_than_columns && p.cost.numel() > 0) {
      transposed_copy = transposed<T>(p, stream);
      a.transposed = static_cast<const T*>(transposed_copy->const_data_ptr());
    }
    const int64_t max_size = std::max(p.R, p.C);
    const int threads = static_cast<int>(
        std::clamp<int64_t>(ceil_div(ceil_div(max_size, kColumnsPerThread), 32) * 32, 32, kMaxThreads));
    a.state_bytes = BlockSearch<T>::bytes(std::min(p.R, p.C), max_size);
    const unsigned blocks = grid_size(kAssignmentOp, p.B);
    if (a.state_bytes <= kStateInSharedBytes) {
      assign_kernel<T, true><<<blocks, threads, a.state_bytes, stream>>>(a);
    } else {
      state_memory = torch::stable::new_empty(p.cost, {p.B * a.state_bytes}, ScalarType::Byte);
      a.state = static_cast<char*>(state_memory->mutable_data_ptr());
      assign_kernel<T, false><<<blocks, threads, 0, stream>>>(a);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {row_to_col, col_to_row};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CUDA, m) { m.impl("linear_sum_assignment", TORCH_BOX(&linear_sum_assignment)); }

}  // namespace relops
