// The Python module relops._C. Its only function returns facts about the build, and the ops are called through
// torch.ops. Importing the module loads the shared library, whose static initializers register the schemas and the CPU
// kernels.

#include <pybind11/pybind11.h>

#include "common/cpu/isa.h"

PYBIND11_MODULE(_C, m) {
  m.def(
      "build_info",
      [] {
        pybind11::dict facts;
        facts["version"] = RELOPS_VERSION;
        facts["torch"] = RELOPS_TORCH;
        facts["compiler"] = RELOPS_COMPILER;
        facts["nvcc"] = RELOPS_NVCC;
        facts["cuda_archs"] = RELOPS_CUDA_ARCHS;
        facts["cpu_isa"] = relops::isa_name(relops::isa());
        return facts;
      },
      "Return what this build was made with and which instruction set its CPU kernels use on this machine.");
}
