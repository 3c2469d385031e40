// rank_embedding: what the CPU and the CUDA half share: sine and cosine, the signatures of library.cpp, and their
// checks.
//
// These checks only keep the kernels inside their tensors when torch.ops is called directly; the errors meant for
// people are raised by relops/ops/rank_embedding.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/host_device.h"
#include "common/series.h"
#include "common/tensors.h"

namespace relops {

// Angles up to here are reduced below with an error of about an ulp of theirs; larger ones are left to the C library.
constexpr double kLargeAngle = 1 << 30;

// Series<double> cut short, for results that are rounded to float: errors 2e-11 (sine) and 3e-10 (cosine).
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

// For |x| < kLargeAngle, to a few units of 2^-53, or to what its series S allows. F is double or vectors of it
// (common/cpu/simd.h).
template <class S = Series<double>, class F>
RELOPS_HOST_DEVICE_INLINE void sin_cos(F x, F& sine, F& cosine) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52, adding which rounds to whole numbers
  const F n = (x * 0.3183098861837907 + kRound) - kRound;
  const F r = (x - n * 3.141592653589793) - n * 1.2246467991473532e-16;  // x - n pi, in [-pi / 2, pi / 2]
  const F half = n * 0.5, odd = half - ((half + kRound) - kRound);       // 0 or, of odd n, +-1/2
  const F sign = odd * odd * -8.0 + 1.0;
  const F turns = r * 0.3183098861837907, u = turns * turns;  // half turns
  sine = sign * turns * S::sine(u);
  cosine = sign * S::cosine(u);
}

// Of coordinate j of `half`.
RELOPS_HOST_DEVICE inline double frequency(double wavelength, int64_t j, int64_t half) {
  return 1 / pow(wavelength, static_cast<double>(j) / static_cast<double>(half));
}

// T: ranks and their gradient. O: the embedding and its gradient.
template <class T, class O>
struct RankEmbeddingArgs {
  int64_t count, half;  // ranks, sines of each
  double wavelength;
  const T* ranks;

  O* output;  // [count,2*half]; forward only

  const O* grad_output;  // [count,2*half]; backward only
  T* grad_ranks;
};

// The ops with the signatures of library.cpp, from the static functions of a device's Kernels,
//   void forward(const char* op, const Tensor& ranks, const RankEmbeddingArgs<T, O>&) and
//   void backward(const char* op, const Tensor& ranks, const RankEmbeddingArgs<T, T>&),
// neither of which is called for no ranks.
template <class Kernels>
struct RankEmbeddingOps {
  static constexpr const char* kOp = "relops.rank_embedding";

  static Tensor forward(const Tensor& ranks, int64_t dim, double wavelength) {
    STD_TORCH_CHECK(dim >= 2 && dim % 2 == 0, kOp, ": dim must be even and at least 2");
    const bool whole = ranks.scalar_type() == ScalarType::Long;
    std::vector<int64_t> shape(ranks.sizes().begin(), ranks.sizes().end());
    shape.push_back(dim);
    const Tensor output = torch::stable::new_empty(ranks, shape, whole ? ScalarType::Float : ranks.scalar_type());
    if (output.numel() == 0) return output;
    const Tensor read = dense(ranks);
    const auto run = [&](auto t, auto o) {
      using T = typename decltype(t)::type;
      using O = typename decltype(o)::type;
      RankEmbeddingArgs<T, O> args{read.numel(), dim / 2, wavelength, static_cast<const T*>(read.const_data_ptr())};
      args.output = static_cast<O*>(output.mutable_data_ptr());
      Kernels::forward(kOp, read, args);
    };
    if (whole)
      run(Type<int64_t>{}, Type<float>{});
    else
      dispatch_features(kOp, ranks.scalar_type(), [&](auto t) { run(t, t); });
    return output;
  }

  static Tensor backward(const Tensor& grad_output, const Tensor& ranks, double wavelength) {
    const int64_t dims = ranks.dim();
    bool fits = grad_output.dim() == dims + 1 && grad_output.size(dims) >= 2 && grad_output.size(dims) % 2 == 0;
    for (int64_t i = 0; fits && i < dims; ++i) fits = grad_output.size(i) == ranks.size(i);
    STD_TORCH_CHECK(fits, kOp, ": grad_output has the wrong shape");
    STD_TORCH_CHECK(grad_output.scalar_type() == ranks.scalar_type() && grad_output.device() == ranks.device(), kOp,
                    ": grad_output differs from ranks in dtype or device");
    const Tensor read = dense(ranks), grad = dense(grad_output), result = torch::stable::empty_like(read);
    if (result.numel() == 0) return result;
    dispatch_features(kOp, ranks.scalar_type(), [&](auto t) {
      using T = typename decltype(t)::type;
      RankEmbeddingArgs<T, T> args{read.numel(), grad.size(dims) / 2, wavelength,
                                   static_cast<const T*>(read.const_data_ptr())};
      args.grad_output = static_cast<const T*>(grad.const_data_ptr());
      args.grad_ranks = static_cast<T*>(result.mutable_data_ptr());
      Kernels::backward(kOp, read, args);
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
