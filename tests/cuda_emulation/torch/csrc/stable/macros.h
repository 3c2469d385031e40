// torch's own header, without the checks of CUDA calls, which need a torch with CUDA. The header of some versions of
// torch has no include guard.
#pragma once

#include_next <torch/csrc/stable/macros.h>

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(expression) ((void)(expression))
