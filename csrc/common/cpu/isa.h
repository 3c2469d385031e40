// The instruction set that the CPU kernels use. It is chosen at the first call of isa() and never changes afterwards.
#pragma once

#include <cstdint>

// Whether this build has code for AMX, the matrix instructions of Intel processors.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11 && !defined(__clang__)
#define RELOPS_HAS_AMX 1
#else
#define RELOPS_HAS_AMX 0
#endif

namespace relops {

// kAmx is AVX-512 with products of bfloat16 matrices. Most kernels have no other code for it than for kAvx512.
enum class Isa { kBaseline, kAvx2, kAvx512, kAmx };

// Returns the widest instruction set that this processor and this build support. The environment variable
// RELOPS_CPU_ISA=baseline|avx2|avx512|amx can select a narrower instruction set, but not a wider one.
Isa isa();

const char* isa_name(Isa isa);

// Returns the size of a vector of this instruction set in bytes.
int64_t vector_bytes(Isa isa);

}  // namespace relops
