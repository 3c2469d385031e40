// Geometry of boxes (x1, y1, x2, y2). All code computes IoU with the functions of this file, on host and device, for
// scalars and vectors.
//
// F is float, double, or a vector of floats or doubles (common/cpu/simd.h). Comparisons and ?: of vectors work lane by
// lane. Every function is a fixed sequence of rounded operations, so its results are bitwise identical on every device.
#pragma once

#include "common/host_device.h"

namespace relops {

template <class F>
struct Box {
  F x1, y1, x2, y2;
};

template <class F>
RELOPS_HOST_DEVICE_INLINE F smaller(F a, F b) {
  return a < b ? a : b;
}

template <class F>
RELOPS_HOST_DEVICE_INLINE F larger(F a, F b) {
  return a > b ? a : b;
}

// The area is negative if the box is inverted along exactly one axis, and NaN if a coordinate is NaN.
template <class F>
RELOPS_HOST_DEVICE_INLINE F area(const Box<F>& box) {
  return product(box.x2 - box.x1, box.y2 - box.y1);
}

template <class F>
RELOPS_HOST_DEVICE_INLINE F intersection(const Box<F>& a, const Box<F>& b) {
  const F none{};
  const F width = smaller(a.x2, b.x2) - larger(a.x1, b.x1), height = smaller(a.y2, b.y2) - larger(a.y1, b.y1);
  return product(larger(width, none), larger(height, none));
}

// Returns the IoU of two boxes, given their areas and the area of their intersection. If the union is 0, as for two
// boxes without area, the IoU is 0.
template <class F>
RELOPS_HOST_DEVICE_INLINE F iou(F area_a, F area_b, F intersection) {
  const F none{};
  const F union_area = area_a + area_b - intersection;
  return union_area == none ? none : intersection / union_area;
}

}  // namespace relops
