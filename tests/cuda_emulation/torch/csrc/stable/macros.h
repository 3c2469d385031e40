// torch's own, but for the checks of CUDA calls, which need a torch with CUDA. Some versions have no guard of their
// own.
#pragma once

#include_next <torch/csrc/stable/macros.h>

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(expression) ((void)(expression))
