// torch's own header, but without checks of CUDA calls, because these checks need a torch with CUDA. In some versions
// of torch, the header has no include guard.
#pragma once

#include_next <torch/csrc/stable/macros.h>

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(expression) ((void)(expression))
