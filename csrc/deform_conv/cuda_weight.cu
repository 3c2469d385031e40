// deform_conv2d on CUDA: the copy of the weight that the matrix products read.
//
// The copy has a contiguous block of memory for each chunk of each tap, so that a block of a matrix product reads it
// with few addresses. It is at most as large as the weight, rounded up to whole pieces of 16 bytes in each segment of
// channels. A thread copies one element. The kernel is bound by the latency of memory: the weight of 256 x 256 channels
// with 3x3 taps has 2.4 MB in float32.

#include "deform_conv/cuda.cuh"

namespace relops {

namespace {

template <class T>
struct ArrangeParams {
  const T* weight;  // [Co,group_inputs,taps]
  T* result;        // [taps,chunks,rows,width]
  unsigned chunks, rows, width, row_blocks;
  int depth;                     // of the chunks
  int row_group, size, segment;  // rows per group, elements of a row, and elements between the ends of segments
  bool rounds;
  int64_t row_stride, group_stride, stride;  // in `weight`, of rows, groups and elements
};

template <class T>
__global__ __launch_bounds__(kThreads) void arrange_weight_kernel(const __grid_constant__ ArrangeParams<T> p) {
  const unsigned element = blockIdx.x % p.row_blocks * kThreads + threadIdx.x, pair = blockIdx.x / p.row_blocks;
  const unsigned row = element / p.width, t = pair / p.chunks;
  if (row >= p.rows) return;
  const int group = static_cast<int>(row) / p.row_group, i = static_cast<int>(element % p.width);
  int chunk = static_cast<int>(pair % p.chunks);
  T x = 0;
  // Skips the chunks of the previous segments.
  int first = group * p.size;
  const int begin = first, end = first + p.size;
  while (first < end) {
    const int segment_end = min(end, first - first % p.segment + p.segment);
    const int chunks = (segment_end - first + p.depth - 1) / p.depth;
    if (chunk < chunks) {
      const int k = first + chunk * p.depth + i;
      if (k < segment_end)
        x = p.weight[group * p.group_stride + row % p.row_group * p.row_stride + (k - begin) * p.stride + t];
      break;
    }
    chunk -= chunks;
    first = segment_end;
  }
  if (p.rounds) x = operand<T, false>(x);
  p.result[int64_t{pair} * p.rows * p.width + element] = x;
}

}  // namespace

template <class T>
Tensor arrange_weight(const DeformConv& d, DeformConvParams<T>& p, bool by_input, bool allow_tf32,
                      cudaStream_t stream) {
  ArrangeParams<T> arrange{p.a.weight};
  const int64_t size = by_input ? d.group_outputs : d.group_inputs, segment = by_input ? size : d.offset_channels;
  // A row has at most size / segment + 2 segments, each of which may end with a chunk that is not full.
  const int64_t ends = size <= segment && (by_input || d.offset_channels % size == 0) ? 1 : size / segment + 2;
  const int64_t depth = by_input ? kDepth<T> : kSampleDepth<T>;
  const int64_t longest = std::min(size, segment);
  const int64_t rows = by_input ? d.C : d.Co;
  p.weight_chunks = static_cast<int>(ends == 1 ? ceil_div(size, depth) : size / depth + ends);
  p.weight_width = static_cast<int>(std::min<int64_t>(ceil_div(longest, kPieceSize<T>) * kPieceSize<T>, depth));
  p.weight_stride = rows * p.weight_width;
  STD_TORCH_CHECK(p.weight_stride < int64_t{1} << 32, d.op, ": there are too many channels");
  const int64_t row_blocks = ceil_div(rows * p.weight_width, kThreads);
  const int64_t pairs = d.taps * p.weight_chunks;
  const Tensor result = torch::stable::new_empty(d.weight, {pairs * rows * p.weight_width});
  arrange.result = static_cast<T*>(result.mutable_data_ptr());
  p.weight = arrange.result;
  arrange.chunks = static_cast<unsigned>(p.weight_chunks);
  arrange.rows = static_cast<unsigned>(rows);
  arrange.width = static_cast<unsigned>(p.weight_width);
  arrange.row_blocks = grid_size(d.op, row_blocks);
  arrange.row_group = static_cast<int>(by_input ? d.group_inputs : d.group_outputs);
  arrange.size = static_cast<int>(size);
  arrange.segment = static_cast<int>(segment);
  arrange.depth = static_cast<int>(depth);
  arrange.rounds = allow_tf32;
  arrange.group_stride = d.group_outputs * d.group_inputs * d.taps;
  arrange.row_stride = by_input ? d.taps : d.group_inputs * d.taps;
  arrange.stride = by_input ? d.group_inputs * d.taps : d.taps;
  arrange_weight_kernel<T><<<grid_size(d.op, pairs * row_blocks), kThreads, 0, stream>>>(arrange);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

template Tensor arrange_weight(const DeformConv&, DeformConvParams<double>&, bool, bool, cudaStream_t);
template Tensor arrange_weight(const DeformConv&, DeformConvParams<float>&, bool, bool, cudaStream_t);
template Tensor arrange_weight(const DeformConv&, DeformConvParams<Half>&, bool, bool, cudaStream_t);
template Tensor arrange_weight(const DeformConv&, DeformConvParams<BFloat16>&, bool, bool, cudaStream_t);

}  // namespace relops
