// Chooses the instruction set according to the processor and the environment variable RELOPS_CPU_ISA.

#include "common/cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace relops {

namespace {

Isa supported() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  // These checks must include every feature that foreach_isa.h enables.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa choose() {
  const char* requested = std::getenv("RELOPS_CPU_ISA");
  if (requested == nullptr) return supported();
  for (Isa i : {Isa::kBaseline, Isa::kAvx2})
    if (std::strcmp(requested, isa_name(i)) == 0) return std::min(i, supported());
  return supported();
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

int64_t vector_bytes(Isa isa) { return isa == Isa::kAvx512 ? 64 : isa == Isa::kAvx2 ? 32 : 16; }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace relops
