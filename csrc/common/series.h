// Polynomials that approximate sine, cosine and logarithm, for host and device. F is float, double, or a vector of
// floats or doubles (common/cpu/simd.h).
#pragma once

#include "common/host_device.h"

namespace relops {

// Returns c + x (d + x (...)).
template <class F, class Coefficient>
RELOPS_HOST_DEVICE_INLINE F polynomial(F x, Coefficient c, Coefficient d) {
  return x * d + c;
}
template <class F, class Coefficient, class... Rest>
RELOPS_HOST_DEVICE_INLINE F polynomial(F x, Coefficient c, Rest... rest) {
  return polynomial(x, rest...) * x + c;
}

// Polynomials in u = r^2. sine(u) approximates sin(pi r) / r, and cosine(u) approximates cos(pi r), for |r| <= 1/2.
// log2(u) approximates log2(m) / r, where m = (1 + r) / (1 - r) is a mantissa between sqrt(1/2) and sqrt(2).
template <class Compute>
struct Series;
// These are minimax polynomials. Their errors before rounding are 4e-9 (sine) and 5e-8 (cosine).
template <>
struct Series<float> {
  template <class F>
  static RELOPS_HOST_DEVICE_INLINE F sine(F u) {
    return polynomial(u, 3.14159258f, -5.16770688f, 2.55003138f, -0.59804517f, 0.07722013f);
  }
  template <class F>
  static RELOPS_HOST_DEVICE_INLINE F cosine(F u) {
    return polynomial(u, 0.99999995f, -4.93479286f, 4.05841191f, -1.33188016f, 0.2196968f);
  }
  template <class F>
  static RELOPS_HOST_DEVICE_INLINE F log2(F u) {
    return polynomial(u, 2.88539008f, 0.96179669f, 0.57707802f, 0.41219858f, 0.32059890f);
  }
};
// These are Taylor polynomials. Their errors are below 1e-17.
template <>
struct Series<double> {
  template <class F>
  static RELOPS_HOST_DEVICE_INLINE F sine(F u) {
    return polynomial(u, 3.1415926535897932, -5.1677127800499700, 2.5501640398773454, -0.59926452932079208,
                      0.082145886611128229, -0.0073704309457143508, 4.6630280576761256e-4, -2.1915353447830216e-5,
                      7.9520540014755128e-7, -2.2948428997269873e-8, 5.3926646626081285e-10);
  }
  template <class F>
  static RELOPS_HOST_DEVICE_INLINE F cosine(F u) {
    return polynomial(u, 1.0, -4.9348022005446793, 4.0587121264167682, -1.3352627688545895, 0.23533063035889321,
                      -0.025806891390014060, 0.0019295743094039230, -1.0463810492484571e-4, 4.3030695870329470e-6,
                      -1.3878952462213773e-7, 3.6047307974625009e-9, -7.7007071306013539e-11);
  }
  template <class F>
  static RELOPS_HOST_DEVICE_INLINE F log2(F u) {
    return polynomial(u, 2.8853900817779268, 0.96179669392597561, 0.57707801635558536, 0.41219858311113240,
                      0.32059889797532520, 0.26230818925253880, 0.22195308321368668, 0.19235933878519512,
                      0.16972882833987806, 0.15186263588304878, 0.13739952770371080, 0.12545174268599682);
  }
};

}  // namespace relops
