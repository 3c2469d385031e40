// box_iou and generalized_box_iou: what the CPU and the CUDA half share: the arithmetic of a pair of boxes, the
// signatures of library.cpp, and their checks.
//
// These checks only keep the kernels inside their tensors when torch.ops is called directly; the errors meant for
// people are raised by relops/ops/_iou.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/boxes.h"
#include "common/tensors.h"

namespace relops {

// ---- A pair of boxes; as in common/boxes.h, F is float, double, or a vector of them ----

// Of the smallest box around both; negative where inverted boxes leave none.
template <class F>
RELOPS_HOST_DEVICE_INLINE F hull_width(const Box<F>& a, const Box<F>& b) {
  return larger(a.x2, b.x2) - smaller(a.x1, b.x1);
}
template <class F>
RELOPS_HOST_DEVICE_INLINE F hull_height(const Box<F>& a, const Box<F>& b) {
  return larger(a.y2, b.y2) - smaller(a.y1, b.y1);
}

// IoU; generalized, less the part of the hull that the union leaves empty, which is 0 where the hull has no area.
template <bool kGeneralized, class F>
RELOPS_HOST_DEVICE_INLINE F overlap(const Box<F>& a, const Box<F>& b, F area_a, F area_b) {
  const F none{}, shared = intersection(a, b), value = iou(area_a, area_b, shared);
  if constexpr (!kGeneralized) {
    return value;
  } else {
    const F united = area_a + area_b - shared;
    const F hull = product(larger(hull_width(a, b), none), larger(hull_height(a, b), none));
    return value - (hull == none ? none : (hull - united) / hull);
  }
}

// What the gradient of a box is made of. The slopes of its area are the same in every pair, so they come in at the end.
template <class F>
struct BoxGradient {
  F x1, y1, x2, y2, area;  // of x1 and y1 with the sign reversed

  RELOPS_HOST_DEVICE_INLINE Box<F> of(const Box<F>& box) const {
    const F by_width = area * (box.y2 - box.y1), by_height = area * (box.x2 - box.x1);
    return {-(x1 + by_width), -(y1 + by_height), x2 + by_width, y2 + by_height};
  }
};

// What reaches x by the smaller of x and y, and by the larger; at a tie x and y share both.
template <class F>
RELOPS_HOST_DEVICE_INLINE F share(F x, F y, F by_smaller, F by_larger) {
  return x < y ? by_smaller : x == y ? (by_smaller + by_larger) / 2 : by_larger;
}

// Adds the gradient of `own` in the pair (own, other), whose overlap has the gradient grad. 0 divided by 0 is constant;
// a side that is limited to 0 passes its gradient on where it is 0 itself.
template <bool kGeneralized, class F>
RELOPS_HOST_DEVICE_INLINE void add_gradient(BoxGradient<F>& sum, const Box<F>& own, const Box<F>& other, F own_area,
                                            F other_area, F grad) {
  const F none{};
  const F width = smaller(own.x2, other.x2) - larger(own.x1, other.x1);
  const F height = smaller(own.y2, other.y2) - larger(own.y1, other.y1);
  const F shared = product(larger(width, none), larger(height, none));
  const F united = own_area + other_area - shared;
  // Of shared / united, by the areas of the boxes and of the intersection.
  const F inverse = united == none ? none : 1 / united;
  F by_area = -(grad * inverse) * (shared * inverse);
  F by_shared = grad * inverse - by_area;
  F by_hull_width{}, by_hull_height{};
  if constexpr (kGeneralized) {  // and of united / hull
    const F across = hull_width(own, other), along = hull_height(own, other);
    const F hull = product(larger(across, none), larger(along, none));
    const F inverse_hull = hull == none ? none : 1 / hull;
    const F by_united = grad * inverse_hull, by_hull = -by_united * (united * inverse_hull);
    by_area += by_united;
    by_shared -= by_united;
    by_hull_width = across >= none ? by_hull * larger(along, none) : none;
    by_hull_height = along >= none ? by_hull * larger(across, none) : none;
  }
  const F by_width = width >= none ? by_shared * larger(height, none) : none;
  const F by_height = height >= none ? by_shared * larger(width, none) : none;
  sum.x1 += share(other.x1, own.x1, by_width, by_hull_width);
  sum.y1 += share(other.y1, own.y1, by_height, by_hull_height);
  sum.x2 += share(own.x2, other.x2, by_width, by_hull_width);
  sum.y2 += share(own.y2, other.y2, by_height, by_hull_height);
  sum.area += by_area;
}

// ---- The ops ----

// Boxes a [N,A,4] and b [N,B,4], dense. N is 1 where the tensors lack that dimension.
struct BoxPairs {
  BoxPairs(const char* op, bool generalized, const Tensor& a_, const Tensor& b_)
      : op(op), generalized(generalized), batched(a_.dim() == 3), a(a_), b(b_) {
    const int64_t last = batched ? 2 : 1;
    STD_TORCH_CHECK(batched || a.dim() == 2, op, ": a must be [A,4] or [N,A,4]");
    STD_TORCH_CHECK(b.dim() == a.dim(), op, ": b must have as many dimensions as a");
    STD_TORCH_CHECK(a.size(last) == 4 && b.size(last) == 4, op, ": boxes must have 4 coordinates");
    STD_TORCH_CHECK(!batched || a.size(0) == b.size(0), op, ": a and b differ in N");
    STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float || a.scalar_type() == ScalarType::Double, op,
                    ": boxes must be float32 or float64");
    STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.device() == b.device(), op,
                    ": a and b differ in dtype or device");
    N = batched ? a.size(0) : 1;
    A = a.size(last - 1);
    B = b.size(last - 1);
    a = dense(a);
    b = dense(b);
  }

  // [N,rows,columns], or without N.
  Tensor new_empty(int64_t rows, int64_t columns) const {
    return batched ? torch::stable::new_empty(a, {N, rows, columns}) : torch::stable::new_empty(a, {rows, columns});
  }

  // Calls f with the type of the coordinates.
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

// The gradient [N,own_count,4] of one side. Strides are in elements of grad_output.
template <class Compute>
struct BoxIouGradient {
  bool generalized, of_a;
  int64_t N, own_count, other_count;
  const Compute *own, *other, *grad_output;
  int64_t stride_n, stride_own, stride_other;
  Compute* result;
};

// The ops with the signatures of library.cpp, from the static functions of a device's Kernels,
//   void forward(const BoxPairs&, const Tensor& output), which is not called for an empty output, and
//   void backward(const BoxPairs&, const BoxIouGradient<Compute>&), which is not called for an empty gradient.
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
                    ": grad_output differs from a in dtype or device");
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
