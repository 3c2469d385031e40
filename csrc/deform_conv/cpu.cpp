// deform_conv2d on the CPU: the registration of the ops. cpu_kernel.h explains how the work is divided. The results do
// not depend on the number of threads.

#include "deform_conv/cpu_args.h"

#define RELOPS_KERNEL "deform_conv/cpu_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

struct Kernels {
  // Estimates the time of `times` forward passes on one thread, in nanoseconds.
  template <class T>
  static double nanoseconds(const DeformConvArgs<T>& a, double times) {
    const double samples = static_cast<double>(a.N) * a.C * a.taps * a.Ho * a.Wo;
    return times * vectors_of<ComputeType<T>>(samples) * (1.5 + 0.15 * a.group_outputs);
  }

  static Tensor wide_weight(const DeformConv& d) {
    return torch::stable::to(d.weight, compute_dtype(d.weight.scalar_type()));
  }

  template <class T>
  static void forward(const DeformConv& d, const DeformConvArgs<T>& a, bool) {
#if RELOPS_HAS_AMX
    if constexpr (std::is_same_v<T, BFloat16>)
      if (isa() == Isa::kAmx && avx512::AmxProduct::supports(a))  // takes about half of the time
        return avx512::deform_conv2d_forward_amx(a, threads_for(nanoseconds(a, 0.5)));
#endif
    const Tensor weight = wide_weight(d);
    RELOPS_CALL_ISA(deform_conv2d_forward, a, static_cast<const ComputeType<T>*>(weight.const_data_ptr()),
                    threads_for(nanoseconds(a, 1)));
  }

  template <class T>
  static void backward(const DeformConv& d, const DeformConvArgs<T>& a, bool, bool) {
    const Tensor weight = wide_weight(d);
    RELOPS_CALL_ISA(deform_conv2d_backward, a, static_cast<const ComputeType<T>*>(weight.const_data_ptr()),
                    threads_for(nanoseconds(a, 3)));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { register_deform_conv2d<Kernels>(m); }

}  // namespace relops
