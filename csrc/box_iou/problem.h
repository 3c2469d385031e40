// box_iou and generalized_box_iou: code that the CPU and CUDA kernels share. It contains the arithmetic for a pair of
// boxes, the functions that implement the schemas of library.cpp, and argument checks.
//
// The checks keep the kernels from accessing memory outside of their tensors if torch.ops is called directly.
// relops/ops/_iou.py raises the errors that are meant for users.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/boxes.h"
#include "common/tensors.h"

namespace relops {

// ---- A pair of boxes. As in common/boxes.h, F is float, double, or a vector of floats or doubles. ----

// Return the width and the height of the hull, the smallest box that contains both boxes. A negative width or height
// means that both boxes are inverted and have no hull.
template <class F>
RELOPS_HOST_DEVICE_INLINE F hull_width(const Box<F>& a, const Box<F>& b) {
  return larger(a.x2, b.x2) - smaller(a.x1, b.x1);
}
template <class F>
RELOPS_HOST_DEVICE_INLINE F hull_height(const Box<F>& a, const Box<F>& b) {
  return larger(a.y2, b.y2) - smaller(a.y1, b.y1);
}

// Returns the IoU or, if kGeneralized, the IoU minus the fraction of the hull that the union does not cover. This
// fraction is 0 if the hull has no area.
template <bool kGeneralized, class F>
RELOPS_HOST_DEVICE_INLINE F overlap(const Box<F>& a, const Box<F>& b, F area_a, F area_b) {
  const F none{}, common_area = intersection(a, b), value = iou(area_a, area_b, common_area);
  if constexpr (!kGeneralized) {
    return value;
  } else {
    const F union_area = area_a + area_b - common_area;
    const F hull_area = product(larger(hull_width(a, b), none), larger(hull_height(a, b), none));
    return value - (hull_area == none ? none : (hull_area - union_area) / hull_area);
  }
}

// The sums over pairs from which the gradient of a box is computed. `area` is the gradient with respect to the area of
// the box. The derivatives of the area with respect to the coordinates are the same for every pair, so coordinates()
// multiplies `area` by them only once.
template <class F>
struct BoxGradient {
  F x1, y1, x2, y2, area;  // x1 and y1 are summed with the opposite sign

  RELOPS_HOST_DEVICE_INLINE Box<F> coordinates(const Box<F>& box) const {
    const F grad_width = area * (box.y2 - box.y1), grad_height = area * (box.x2 - box.x1);
    return {-(x1 + grad_width), -(y1 + grad_height), x2 + grad_width, y2 + grad_height};
  }
};

// Returns the gradient of x, given the gradients of min(x, y) and max(x, y). At a tie, x and y each get half of both
// gradients.
template <class F>
RELOPS_HOST_DEVICE_INLINE F split_gradient(F x, F y, F grad_smaller, F grad_larger) {
  const F half = (grad_smaller + grad_larger) / 2;  // computed in any case, because that is faster than a branch
  return x < y ? grad_smaller : x == y ? half : grad_larger;
}

// Adds the gradient with respect to `own` from the pair (own, other). `grad` is the gradient with respect to the IoU or
// generalized IoU of the pair. A quotient 0 / 0 is treated as a constant. Widths and heights are clamped to at least 0,
// and the gradient still flows through a width or height of exactly 0.
template <bool kGeneralized, class F>
RELOPS_HOST_DEVICE_INLINE void add_gradient(BoxGradient<F>& sum, const Box<F>& own, const Box<F>& other, F own_area,
                                            F other_area, F grad) {
  const F none{};
  const F width = smaller(own.x2, other.x2) - larger(own.x1, other.x1);
  const F height = smaller(own.y2, other.y2) - larger(own.y1, other.y1);
  const F common_area = product(larger(width, none), larger(height, none));
  const F union_area = own_area + other_area - common_area;
  // The next lines differentiate common_area / union_area with respect to the area of a box and to common_area.
  const F inverse = union_area == none ? none : 1 / union_area;
  F grad_area = -(grad * inverse) * (common_area * inverse);
  F grad_common_area = grad * inverse - grad_area;
  F grad_hull_width{}, grad_hull_height{};
  if constexpr (kGeneralized) {  // add the gradients of union_area / hull_area
    const F hull_w = hull_width(own, other), hull_h = hull_height(own, other);
    const F hull_area = product(larger(hull_w, none), larger(hull_h, none));
    const F inverse_hull = hull_area == none ? none : 1 / hull_area;
    const F grad_union = grad * inverse_hull, grad_hull = -grad_union * (union_area * inverse_hull);
    grad_area += grad_union;
    grad_common_area -= grad_union;
    grad_hull_width = hull_w >= none ? grad_hull * larger(hull_h, none) : none;
    grad_hull_height = hull_h >= none ? grad_hull * larger(hull_w, none) : none;
  }
  const F grad_width = width >= none ? grad_common_area * larger(height, none) : none;
  const F grad_height = height >= none ? grad_common_area * larger(width, none) : none;
  sum.x1 += split_gradient(other.x1, own.x1, grad_width, grad_hull_width);
  sum.y1 += split_gradient(other.y1, own.y1, grad_height, grad_hull_height);
  sum.x2 += split_gradient(own.x2, other.x2, grad_width, grad_hull_width);
  sum.y2 += split_gradient(own.y2, other.y2, grad_height, grad_hull_height);
  sum.area += grad_area;
}

// ---- The ops ----

// Contiguous boxes a [N,A,4] and b [N,B,4]. N is 1 if the tensors have no batch dimension.
struct BoxPairs {
  BoxPairs(const char* op, bool generalized, const Tensor& a_, const Tensor& b_)
      : op(op), generalized(generalized), batched(a_.dim() == 3), a(a_), b(b_) {
    const int64_t last = batched ? 2 : 1;
    STD_TORCH_CHECK(batched || a.dim() == 2, op, ": a must be [A,4] or [N,A,4]");
    STD_TORCH_CHECK(b.dim() == a.dim(), op, ": b must have the same number of dimensions as a");
    STD_TORCH_CHECK(a.size(last) == 4 && b.size(last) == 4, op, ": boxes must have 4 coordinates");
    STD_TORCH_CHECK(!batched || a.size(0) == b.size(0), op, ": a and b must have the same N");
    STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float || a.scalar_type() == ScalarType::Double, op,
                    ": boxes must be float32 or float64");
    STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.device() == b.device(), op,
                    ": a and b must have the same dtype and device");
    N = batched ? a.size(0) : 1;
    A = a.size(last - 1);
    B = b.size(last - 1);
    a = dense(a);
    b = dense(b);
  }

  // Returns a new tensor [N,rows,columns], or [rows,columns] if a and b are not batched.
  Tensor new_empty(int64_t rows, int64_t columns) const {
    return batched ? torch::stable::new_empty(a, {N, rows, columns}) : torch::stable::new_empty(a, {rows, columns});
  }

  // Calls f(Type<Compute>{}) for coordinates of type Compute.
  template <class F>
  void dispatch(F f) const {
    a.scalar_type() == ScalarType::Double ? f(Type<double>{}) : f(Type<float>{});
  }

  const char* op;
  bool generalized;
  bool batched;
  int64_t N, A, B;
  Tensor a, b;
};

// The arguments for computing the gradient [N,own_count,4] of one input. `own` holds the boxes of this input, and
// `other` holds those of the other input. The strides are those of grad_output, in elements.
template <class Compute>
struct BoxIouGradient {
  bool generalized, of_a;
  int64_t N, own_count, other_count;
  const Compute *own, *other, *grad_output;
  int64_t stride_n, stride_own, stride_other;
  Compute* result;
};

// The functions that implement the schemas of library.cpp. They call two static functions of Kernels, which every
// device defines:
//   void forward(const BoxPairs&, const Tensor& output), unless the output is empty, and
//   void backward(const BoxPairs&, const BoxIouGradient<Compute>&), unless the gradient is empty.
template <class Kernels>
struct BoxIouOps {
  static Tensor forward(const char* op, bool generalized, const Tensor& a, const Tensor& b) {
    const BoxPairs p(op, generalized, a, b);
    const Tensor output = p.new_empty(p.A, p.B);
    if (output.numel() > 0) Kernels::forward(p, output);
    return output;
  }

  static std::tuple<Tensor, Tensor> backward(const char* op, bool generalized, const Tensor& grad_output,
                                             const Tensor& a, const Tensor& b, const std::vector<bool>& needs_grad) {
    const BoxPairs p(op, generalized, a, b);
    check_needs_grad(op, needs_grad, 2);
    if (p.batched)
      check_shape(op, "grad_output", grad_output, {p.N, p.A, p.B});
    else
      check_shape(op, "grad_output", grad_output, {p.A, p.B});
    STD_TORCH_CHECK(grad_output.scalar_type() == p.a.scalar_type() && grad_output.device() == p.a.device(), op,
                    ": grad_output must have the dtype and device of a");
    const auto gradient = [&](bool of_a) {
      const int64_t own_count = of_a ? p.A : p.B;
      const Tensor& own = of_a ? p.a : p.b;
      Tensor result = p.new_empty(own_count, 4);
      if (result.numel() == 0) return result;
      p.dispatch([&](auto c) {
        using Compute = typename decltype(c)::type;
        const int64_t rows = p.batched ? 1 : 0;
        const int64_t stride_a = grad_output.stride(rows), stride_b = grad_output.stride(rows + 1);
        Kernels::backward(
            p, BoxIouGradient<Compute>{p.generalized, of_a, p.N, own_count, of_a ? p.B : p.A,
                                       static_cast<const Compute*>(own.const_data_ptr()),
                                       static_cast<const Compute*>((of_a ? p.b : p.a).const_data_ptr()),
                                       static_cast<const Compute*>(grad_output.const_data_ptr()),
                                       p.batched ? grad_output.stride(0) : 0, of_a ? stride_a : stride_b,
                                       of_a ? stride_b : stride_a, static_cast<Compute*>(result.mutable_data_ptr())});
      });
      return result;
    };
    return {needs_grad[0] ? gradient(true) : none_like(a), needs_grad[1] ? gradient(false) : none_like(b)};
  }

  static Tensor box_iou(const Tensor& a, const Tensor& b) { return forward("relops.box_iou", false, a, b); }
  static std::tuple<Tensor, Tensor> box_iou_backward(const Tensor& grad_output, const Tensor& a, const Tensor& b,
                                                     const std::vector<bool>& needs_grad) {
    return backward("relops.box_iou", false, grad_output, a, b, needs_grad);
  }

  static Tensor generalized_box_iou(const Tensor& a, const Tensor& b) {
    return forward("relops.generalized_box_iou", true, a, b);
  }
  static std::tuple<Tensor, Tensor> generalized_box_iou_backward(const Tensor& grad_output, const Tensor& a,
                                                                 const Tensor& b, const std::vector<bool>& needs_grad) {
    return backward("relops.generalized_box_iou", true, grad_output, a, b, needs_grad);
  }
};

template <class Kernels>
void register_box_iou(auto& m) {
  using Ops = BoxIouOps<Kernels>;
  m.impl("box_iou", TORCH_BOX(&Ops::box_iou));
  m.impl("_box_iou_backward", TORCH_BOX(&Ops::box_iou_backward));
  m.impl("generalized_box_iou", TORCH_BOX(&Ops::generalized_box_iou));
  m.impl("_generalized_box_iou_backward", TORCH_BOX(&Ops::generalized_box_iou_backward));
}

}  // namespace relops
