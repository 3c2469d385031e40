// Tensor functions that the ops use on both the CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "common/dispatch.h"
#include "common/host_device.h"

namespace relops {

using torch::stable::Tensor;

inline Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

inline torch::headeronly::MemoryFormat memory_format(bool channels_last) {
  using Format = torch::headeronly::MemoryFormat;
  return channels_last ? Format::ChannelsLast : Format::Contiguous;
}

// Returns whether an input is treated as channels_last. relops/ops/_memory_format.py applies the same rule.
inline bool is_channels_last(const Tensor& input) {
  return input.dim() == 4 && !input.is_contiguous() && input.size(1) > 1 && input.stride(1) == 1;
}

// Returns an empty tensor, which ops return in place of a gradient that is not needed.
inline Tensor none_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, {0}); }

// Returns grad if it is needed, else an empty tensor. Callers use this function if a kernel computes several gradients
// at once and only some of them are needed.
inline Tensor only_if(bool needed, const Tensor& grad) { return needed ? grad : none_like(grad); }

inline void check_needs_grad(const char* op, const std::vector<bool>& needs_grad, size_t count) {
  STD_TORCH_CHECK(needs_grad.size() == count, op, ": needs_grad must have one flag per gradient");
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool equal = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) equal = equal && tensor.size(i++) == size;
  STD_TORCH_CHECK(equal, op, ": ", name, " has the wrong shape");
}

// A map [N,C,H,W] with strides in elements.
template <class T>
struct Map {
  T* data = nullptr;
  int64_t n_stride = 0, c_stride = 0, h_stride = 0, w_stride = 0;
  RELOPS_HOST_DEVICE T* at(int64_t n, int64_t c, int64_t h, int64_t w = 0) const {
    return data + n * n_stride + c * c_stride + h * h_stride + w * w_stride;
  }
};

template <class T>
Map<T> map_of(const Tensor& x) {
  // torch regards a map of width 1 as contiguous whatever its stride along the rows, so as_map() does not copy it.
  const int64_t w_stride = x.size(3) == 1 && x.stride(1) != 1 ? 1 : x.stride(3);
  return {static_cast<T*>(const_cast<void*>(x.const_data_ptr())), x.stride(0), x.stride(1), x.stride(2), w_stride};
}

// Returns x, or a copy of x if neither the stride along the rows nor the stride along the channels is 1.
inline Tensor as_map(const Tensor& x) { return x.stride(3) == 1 || x.stride(1) == 1 ? x : dense(x); }

}  // namespace relops
