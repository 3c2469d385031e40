// torch's own header, but with a check of CUDA calls that needs no torch with CUDA. In some versions of torch, the
// header has no include guard.
#pragma once

#include_next <torch/csrc/stable/macros.h>

#include <stdexcept>

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(expression) \
  ((expression) ? throw std::runtime_error("emulated CUDA: " #expression " failed") : void())
