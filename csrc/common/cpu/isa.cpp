// Chooses the instruction set according to the processor and the environment variable RELOPS_CPU_ISA.

#include "common/cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if RELOPS_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace relops {

namespace {

#if RELOPS_HAS_AMX
// Linux saves the tile registers only of processes that have requested it.
bool request_tile_registers() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa supported() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  // These checks must include every feature that foreach_isa.h enables.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if RELOPS_HAS_AMX
  if (avx512 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && request_tile_registers())
    return Isa::kAmx;
#endif
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa choose() {
  const char* requested = std::getenv("RELOPS_CPU_ISA");
  if (requested == nullptr) return supported();
  for (Isa i : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512})
    if (std::strcmp(requested, isa_name(i)) == 0) return std::min(i, supported());
  return supported();
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

int64_t vector_bytes(Isa isa) { return isa >= Isa::kAvx512 ? 64 : isa == Isa::kAvx2 ? 32 : 16; }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace relops
