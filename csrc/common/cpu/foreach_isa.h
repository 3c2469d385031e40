// Compiles the file named by RELOPS_KERNEL once per instruction set, each time in a different namespace:
//
//   #define RELOPS_KERNEL "<family>/cpu_kernel.h"
//   #include "common/cpu/foreach_isa.h"
//   ...
//   RELOPS_CALL_ISA(kernel<float>, arguments);
//
// The kernel file may be divided into several headers, such as regions/cpu_bands.h. All these files include
// common/cpu/simd.h and define everything in namespace relops::RELOPS_ISA. Each header has an include guard, which the
// kernel file undefines at its end. All other headers that these files include must already have been included, outside
// of the sections that are compiled once per instruction set. kernel_includes.h includes the headers that most kernels
// need.

#include "common/cpu/kernel_includes.h"

#define RELOPS_ISA baseline
#define RELOPS_VECTOR_BYTES 16
#include RELOPS_KERNEL
#undef RELOPS_SIMD
#undef RELOPS_ISA
#undef RELOPS_VECTOR_BYTES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define RELOPS_ISA avx2
#define RELOPS_VECTOR_BYTES 32
#include RELOPS_KERNEL
#undef RELOPS_SIMD
#undef RELOPS_ISA
#undef RELOPS_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define RELOPS_ISA avx512
#define RELOPS_VECTOR_BYTES 64
#include RELOPS_KERNEL
#undef RELOPS_SIMD
#undef RELOPS_ISA
#undef RELOPS_VECTOR_BYTES
#pragma GCC pop_options

#define RELOPS_CALL_ISA(kernel, ...)           \
  switch (::relops::isa()) {                   \
    case ::relops::Isa::kAmx:                  \
    case ::relops::Isa::kAvx512:               \
      ::relops::avx512::kernel(__VA_ARGS__);   \
      break;                                   \
    case ::relops::Isa::kAvx2:                 \
      ::relops::avx2::kernel(__VA_ARGS__);     \
      break;                                   \
    default:                                   \
      ::relops::baseline::kernel(__VA_ARGS__); \
  }

#else
#define RELOPS_CALL_ISA(kernel, ...) ::relops::baseline::kernel(__VA_ARGS__)
#endif
