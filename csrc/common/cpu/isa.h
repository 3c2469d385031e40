// The instruction set that the CPU kernels use. It is chosen at the first call of isa() and never changes afterwards.
#pragma once

#include <cstdint>

namespace relops {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// Returns the widest instruction set that this processor and this build support. The environment variable
// RELOPS_CPU_ISA=baseline|avx2|avx512 can select a narrower instruction set, but not a wider one.
Isa isa();

const char* isa_name(Isa isa);

// Returns the size of a vector of this instruction set in bytes.
int64_t vector_bytes(Isa isa);

}  // namespace relops
