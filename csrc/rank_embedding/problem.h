// rank_embedding: the sine and cosine, the op signatures of library.cpp, and the checks of the inputs, for both CPU and
// CUDA.
//
// These checks keep the kernels from accessing memory outside of their tensors if torch.ops is called directly.
// relops/ops/rank_embedding.py raises the errors that are meant for users.
#pragma once

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/host_device.h"
#include "common/series.h"
#include "common/tensors.h"

namespace relops {

// sin_cos reduces angles up to this limit with an error of about one ulp of the angle. The C library handles larger
// angles.
constexpr double kLargeAngle = 1 << 30;

// A shorter Series<double> for results that are rounded to float. Its errors are 2e-11 (sine) and 3e-10 (cosine).
struct SeriesForFloat {
  template <class F>
  static RELOPS_HOST_DEVICE_INLINE F sine(F u) {
    return polynomial(u, 3.1415926532437535, -5.167712741221562, 2.5501627947206895, -0.5992474048987759,
                      0.08203123011264779, -0.007000500307185575);
  }
  template <class F>
  static RELOPS_HOST_DEVICE_INLINE F cosine(F u) {
    return polynomial(u, 0.9999999997806515, -4.934802137228375, 4.058709164343157, -1.3352120566711814,
                      0.23493755896550983, -0.02439671662052234);
  }
};

// Computes sine and cosine for |x| < kLargeAngle. The error is a few units of 2^-53 or the error of the series S,
// whichever is larger. F is double or a vector of doubles (common/cpu/simd.h).
template <class S = Series<double>, class F>
RELOPS_HOST_DEVICE_INLINE void sin_cos(F x, F& sine, F& cosine) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52; adding it rounds to integers
  const F n = (x * 0.3183098861837907 + kRound) - kRound;
  const F r = (x - n * 3.141592653589793) - n * 1.2246467991473532e-16;  // x - n pi, in [-pi / 2, pi / 2]
  const F half = n * 0.5, odd = half - ((half + kRound) - kRound);       // 0, or +-1/2 if n is odd
  const F sign = odd * odd * -8.0 + 1.0;
  const F half_turns = r * 0.3183098861837907, u = half_turns * half_turns;
  sine = sign * half_turns * S::sine(u);
  cosine = sign * S::cosine(u);
}

// Returns frequency j of `half` frequencies.
RELOPS_HOST_DEVICE inline double frequency(double wavelength, int64_t j, int64_t half) {
  return 1 / pow(wavelength, static_cast<double>(j) / static_cast<double>(half));
}

// T is the type of the ranks and their gradient. O is the type of the embedding and its gradient.
template <class T, class O>
struct RankEmbeddingArgs {
  int64_t count, half;  // number of ranks; number of sines per rank
  double wavelength;
  const T* ranks;

  O* output;  // [count,2*half]; only for the forward pass

  const O* grad_output;  // [count,2*half]; this and the following are only for the backward pass
  T* grad_ranks;
};

// The ops with the signatures of library.cpp, built from two static functions of a device's Kernels. Neither function
// is called if there are no ranks:
//   void forward(const char* op, const Tensor& ranks, const RankEmbeddingArgs<T, O>&)
//   void backward(const char* op, const Tensor& ranks, const RankEmbeddingArgs<T, T>&)
template <class Kernels>
struct RankEmbeddingOps {
  static constexpr const char* kOp = "relops.rank_embedding";

  static Tensor forward(const Tensor& ranks, int64_t dim, double wavelength) {
    STD_TORCH_CHECK(dim >= 2 && dim % 2 == 0, kOp, ": dim must be even and at least 2, got ", dim);
    const bool is_integer = ranks.scalar_type() == ScalarType::Long;
    std::vector<int64_t> shape(ranks.sizes().begin(), ranks.sizes().end());
    shape.push_back(dim);
    const Tensor output = torch::stable::new_empty(ranks, shape, is_integer ? ScalarType::Float : ranks.scalar_type());
    if (output.numel() == 0) return output;
    const Tensor dense_ranks = dense(ranks);
    const auto run = [&](auto t, auto o) {
      using T = typename decltype(t)::type;
      using O = typename decltype(o)::type;
      RankEmbeddingArgs<T, O> args{dense_ranks.numel(), dim / 2, wavelength,
                                   static_cast<const T*>(dense_ranks.const_data_ptr())};
      args.output = static_cast<O*>(output.mutable_data_ptr());
      Kernels::forward(kOp, dense_ranks, args);
    };
    if (is_integer)
      run(Type<int64_t>{}, Type<float>{});
    else
      dispatch_features(kOp, ranks.scalar_type(), [&](auto t) { run(t, t); });
    return output;
  }

  static Tensor backward(const Tensor& grad_output, const Tensor& ranks, double wavelength) {
    const int64_t dims = ranks.dim();
    bool matches = grad_output.dim() == dims + 1 && grad_output.size(dims) >= 2 && grad_output.size(dims) % 2 == 0;
    for (int64_t i = 0; matches && i < dims; ++i) matches = grad_output.size(i) == ranks.size(i);
    STD_TORCH_CHECK(matches, kOp, ": grad_output has the wrong shape");
    STD_TORCH_CHECK(grad_output.scalar_type() == ranks.scalar_type() && grad_output.device() == ranks.device(), kOp,
                    ": grad_output must have the dtype and device of ranks");
    const Tensor dense_ranks = dense(ranks), grad = dense(grad_output), result = torch::stable::empty_like(dense_ranks);
    if (result.numel() == 0) return result;
    dispatch_features(kOp, ranks.scalar_type(), [&](auto t) {
      using T = typename decltype(t)::type;
      RankEmbeddingArgs<T, T> args{dense_ranks.numel(), grad.size(dims) / 2, wavelength,
                                   static_cast<const T*>(dense_ranks.const_data_ptr())};
      args.grad_output = static_cast<const T*>(grad.const_data_ptr());
      args.grad_ranks = static_cast<T*>(result.mutable_data_ptr());
      Kernels::backward(kOp, dense_ranks, args);
    });
    return result;
  }
};

template <class Kernels>
void register_rank_embedding(auto& m) {
  m.impl("rank_embedding", TORCH_BOX(&RankEmbeddingOps<Kernels>::forward));
  m.impl("_rank_embedding_backward", TORCH_BOX(&RankEmbeddingOps<Kernels>::backward));
}

}  // namespace relops
