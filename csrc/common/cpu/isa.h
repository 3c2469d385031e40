// The instruction set the CPU kernels use, chosen when first asked and then kept.
#pragma once

#include <cstdint>

namespace relops {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The widest set this processor and this build support; RELOPS_CPU_ISA=baseline|avx2|avx512 lowers it (never raises).
Isa isa();

const char* isa_name(Isa isa);

// Of the vectors that kernels for it use.
int64_t vector_bytes(Isa isa);

}  // namespace relops
