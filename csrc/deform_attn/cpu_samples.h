// ms_deform_attn and ms_deform_attn_fused on the CPU: the samples of an item, processed one vector of samples at a
// time. This file converts locations to row indices and weights and, in the backward pass, dot products to the
// gradients of locations and weights.
#ifndef RELOPS_DEFORM_ATTN_SAMPLES
#define RELOPS_DEFORM_ATTN_SAMPLES

#include "common/cpu/simd.h"
#include "deform_attn/cpu_args.h"

namespace relops::RELOPS_ISA {

namespace {

// Constants of the L * P samples of an item, padded to whole vectors with samples of an empty level.
template <class Compute>
struct SampleConstants {
  int64_t count, padded;
  Compute *width, *height;
  Int<Compute>*width_int, *height_int, *start;
  Int<Compute>* level;

  template <class Args>
  SampleConstants(const Args& a, Scratch& scratch)
      : count(a.L * a.P),
        padded(round_up(count, kLanes<Compute>)),
        width(scratch.allocate<Compute>(padded)),
        height(scratch.allocate<Compute>(padded)),
        width_int(scratch.allocate<Int<Compute>>(padded)),
        height_int(scratch.allocate<Int<Compute>>(padded)),
        start(scratch.allocate<Int<Compute>>(padded)),
        level(scratch.allocate<Int<Compute>>(padded)) {
    for (int64_t s = 0; s < padded; ++s) {
      const Level of = s < count ? a.levels[s / a.P] : Level{0, 0, 0};
      width[s] = of.width;
      height[s] = of.height;
      width_int[s] = of.width;
      height_int[s] = of.height;
      start[s] = of.start;
      level[s] = s < count ? s / a.P : 0;
    }
  }
};

// The samples of one item. Corners are numbered (top left, top right, bottom left, bottom right).
template <class Compute>
struct Samples {
  Compute *x, *y;   // in pixels
  Compute* weight;  // attention weight
  Compute *fraction_x, *fraction_y;
  Int<Compute>* row[4];       // index of a corner's row; S if the corner is outside
  Compute* corner_weight[4];  // bilinear weight times attention weight; 0 if the whole sample is outside
  Compute* dot[4];            // backward: dot product of the output gradient and the corner's row
  Compute* raw;               // the given locations or offsets, converted
  Compute *grad_xy, *grad_weight;

  Samples(int64_t padded, bool backward, Scratch& scratch) {
    for (Compute** p : {&x, &y, &weight, &fraction_x, &fraction_y}) *p = scratch.allocate<Compute>(padded);
    for (auto& p : row) p = scratch.allocate<Int<Compute>>(padded);
    for (auto& p : corner_weight) p = scratch.allocate<Compute>(padded);
    raw = scratch.allocate<Compute>(2 * padded);
    if (!backward) return;
    for (auto& p : dot) p = scratch.allocate<Compute>(padded);
    grad_xy = scratch.allocate<Compute>(2 * padded);
    grad_weight = scratch.allocate<Compute>(padded);
  }
};

// Returns the pairs p[0..2 * count) as Compute, padded with zeros. The result is p itself if it needs neither
// conversion nor padding.
template <class Compute, class U>
const Compute* padded_pairs(const U* p, const SampleConstants<Compute>& k, Compute* buffer) {
  if constexpr (std::is_same_v<U, Compute>)
    if (k.count == k.padded) return p;
  convert(p, buffer, 2 * k.count);
  for (int64_t i = 2 * k.count; i < 2 * k.padded; ++i) buffer[i] = 0;
  return buffer;
}

// The reference point or box of each sample's level, for one vector of samples at a time.
template <class Compute>
class References {
 public:
  template <class Args>
  References(const Args& a, int64_t n, int64_t q, const SampleConstants<Compute>& k)
      : k_(k), R_(a.R), ref_(a.reference + (n * a.Q + q) * a.L * a.R), in_vector_(a.L * a.R <= kLanes<Compute>) {
    if (!in_vector_) return;
    alignas(64) Compute few[kLanes<Compute>] = {};
    const bool inside = ref_ + kLanes<Compute> <= a.reference + a.N * a.Q * a.L * a.R;
    if (!inside) std::copy_n(ref_, a.L * a.R, few);
    all_ = load(inside ? ref_ : few);
  }

  // Returns coordinate c of the references of samples i, i + 1, ...
  Vec<Compute> get(int64_t i, Int<Compute> c) const {
    const VecInt<Compute> at = load_int<Compute>(k_.level + i) * static_cast<Int<Compute>>(R_) + c;
    if (in_vector_) return __builtin_shuffle(all_, at);
    Vec<Compute> v;
    for (int j = 0; j < kLanes<Compute>; ++j) v[j] = ref_[at[j]];
    return v;
  }

 private:
  const SampleConstants<Compute>& k_;
  int64_t R_;
  const Compute* ref_;
  bool in_vector_;
  Vec<Compute> all_;
};

// Computes x and y (in pixels) and weight of all samples of item (n, q, m).
template <class T, class U, class Compute>
void read_samples(const MsDeformAttnArgs<T, U>& a, const SampleConstants<Compute>& k, int64_t n, int64_t q, int64_t m,
                  const Samples<Compute>& s) {
  const int64_t item = (n * a.Q + q) * a.M + m;
  const Compute* xy = padded_pairs(a.locations + item * k.count * 2, k, s.raw);
  convert(a.weights + item * k.count, s.weight, k.count);
  Vec<Compute> x, y;
  if (a.reference == nullptr) {
    for (int64_t i = k.count; i < k.padded; ++i) s.weight[i] = 0;
    for (int64_t i = 0; i < k.padded; i += kLanes<Compute>) {
      load_pairs(xy + 2 * i, x, y);
      store(s.x + i, x * load(k.width + i) - Compute(0.5));
      store(s.y + i, y * load(k.height + i) - Compute(0.5));
    }
    return;
  }
  softmax(s.weight, k.count, k.padded);
  const References<Compute> reference(a, n, q, k);
  const Compute half_per_point = Compute(0.5) / a.P;
  for (int64_t i = 0; i < k.padded; i += kLanes<Compute>) {
    const Vec<Compute> width = load(k.width + i), height = load(k.height + i);
    load_pairs(xy + 2 * i, x, y);
    if (a.R == 4) {
      x *= reference.get(i, 2) * width * half_per_point;
      y *= reference.get(i, 3) * height * half_per_point;
    }
    store(s.x + i, reference.get(i, 0) * width - Compute(0.5) + x);
    store(s.y + i, reference.get(i, 1) * height - Compute(0.5) + y);
  }
}

// Computes the rows and weights of the corners from x, y and weight. `mask` is null if rows are read from a copy, in
// which masked rows are zero.
template <class Compute>
void locate_samples(const SampleConstants<Compute>& k, int64_t S, const bool* mask, const Samples<Compute>& s) {
  using Vector = Vec<Compute>;
  using Ints = VecInt<Compute>;
  const Ints outside = broadcast_int<Compute>(S);
  for (int64_t i = 0; i < k.padded; i += kLanes<Compute>) {
    Vector x = load(s.x + i), y = load(s.y + i);
    const Ints width = load_int<Compute>(k.width_int + i), height = load_int<Compute>(k.height_int + i);
    // `inside` is false for NaN. Coordinates inside the level fit in an int.
    const Ints inside = (x > Compute(-1)) & (x < load(k.width + i)) & (y > Compute(-1)) & (y < load(k.height + i));
    x = inside ? x : Vector{};
    y = inside ? y : Vector{};
    Ints left = __builtin_convertvector(x, Ints), top = __builtin_convertvector(y, Ints);
    left += x < __builtin_convertvector(left, Vector);  // converts truncation to floor: a true comparison is -1
    top += y < __builtin_convertvector(top, Vector);
    const Vector fx = x - __builtin_convertvector(left, Vector), fy = y - __builtin_convertvector(top, Vector);
    const Vector weight = inside ? load(s.weight + i) : Vector{};
    const Vector above = (1 - fy) * weight, below = fy * weight;
    const Ints in_left = inside & (left >= 0), in_right = inside & (left + 1 < width);
    const Ints in_top = top >= 0, in_bottom = top + 1 < height;
    const Ints first = load_int<Compute>(k.start + i) + top * width + left;
    store(s.fraction_x + i, fx);
    store(s.fraction_y + i, fy);
    store_int<Compute>(s.row[0] + i, in_left & in_top ? first : outside);
    store_int<Compute>(s.row[1] + i, in_right & in_top ? first + 1 : outside);
    store_int<Compute>(s.row[2] + i, in_left & in_bottom ? first + width : outside);
    store_int<Compute>(s.row[3] + i, in_right & in_bottom ? first + width + 1 : outside);
    store(s.corner_weight[0] + i, (1 - fx) * above);
    store(s.corner_weight[1] + i, fx * above);
    store(s.corner_weight[2] + i, (1 - fx) * below);
    store(s.corner_weight[3] + i, fx * below);
  }
  if (mask == nullptr) return;
  for (auto* row : s.row)
    for (int64_t i = 0; i < k.count; ++i)
      if (row[i] != S && mask[row[i]]) row[i] = S;
}

// Computes the gradients of an item's locations and weights, or of its offsets, logits and reference points,
// from the dot products.
template <class T, class U, class Compute>
void write_sampling_grads(const MsDeformAttnArgs<T, U>& a, const SampleConstants<Compute>& k, int64_t n, int64_t q,
                          int64_t m, const Samples<Compute>& s) {
  const int64_t item = (n * a.Q + q) * a.M + m;
  for (int64_t i = 0; i < k.padded; i += kLanes<Compute>) {
    const Vec<Compute> fx = load(s.fraction_x + i), fy = load(s.fraction_y + i), weight = load(s.weight + i);
    const Vec<Compute> d0 = load(s.dot[0] + i), d1 = load(s.dot[1] + i), d2 = load(s.dot[2] + i),
                       d3 = load(s.dot[3] + i);
    const Vec<Compute> dx = (1 - fy) * (d1 - d0) + fy * (d3 - d2), dy = (1 - fx) * (d2 - d0) + fx * (d3 - d1);
    store(s.grad_weight + i, (1 - fy) * ((1 - fx) * d0 + fx * d1) + fy * ((1 - fx) * d2 + fx * d3));
    store(s.x + i, weight * dx);  // x and y are no longer needed and now hold the gradient in pixels
    store(s.y + i, weight * dy);
  }
  // The gradients are written to the output directly if they have the compute type and fill whole vectors.
  Compute *grad_xy = s.grad_xy, *grad_weight = s.grad_weight;
  bool in_place = false;
  if constexpr (std::is_same_v<U, Compute>)
    if (k.count == k.padded) {
      in_place = true;
      grad_xy = a.grad_locations + item * k.count * 2;
      grad_weight = a.grad_weights + item * k.count;
    }
  Vec<Compute> expected = {};
  for (int64_t i = 0; i < k.padded; i += kLanes<Compute>) expected += load(s.weight + i) * load(s.grad_weight + i);
  const Compute mean = a.reference ? sum<Compute>(expected) : Compute(0);
  for (int64_t i = 0; i < k.padded; i += kLanes<Compute>) {
    const Vec<Compute> dx = load(s.x + i), dy = load(s.y + i);
    if (a.reference == nullptr) {
      store(grad_weight + i, load(s.grad_weight + i));
      store_pairs(grad_xy + 2 * i, dx * load(k.width + i), dy * load(k.height + i));
      continue;
    }
    store(grad_weight + i, load(s.weight + i) * (load(s.grad_weight + i) - mean));
    if (a.R == 2) {
      store_pairs(grad_xy + 2 * i, dx, dy);
      continue;
    }
    const References<Compute> reference(a, n, q, k);
    const Compute half_per_point = Compute(0.5) / a.P;
    // A sample that contributed nothing, such as one at a non-finite location, has zero gradient.
    store_pairs(grad_xy + 2 * i,
                dx != 0 ? dx * load(k.width + i) * half_per_point * reference.get(i, 2) : Vec<Compute>{},
                dy != 0 ? dy * load(k.height + i) * half_per_point * reference.get(i, 3) : Vec<Compute>{});
  }
  if (!in_place) {
    convert(grad_xy, a.grad_locations + item * k.count * 2, 2 * k.count);
    convert(grad_weight, a.grad_weights + item * k.count, k.count);
  }
  if (a.grad_reference == nullptr) return;

  const Compute* offsets = padded_pairs(a.locations + item * k.count * 2, k, s.raw);
  Compute* grad_ref = a.grad_reference + ((n * a.M + m) * a.Q + q) * a.L * a.R;
  for (int64_t l = 0, i = 0; l < a.L; ++l, grad_ref += a.R) {
    Compute center[2] = {}, extent[2] = {};
    for (int64_t p = 0; p < a.P; ++p, ++i) {
      const Compute grad[2] = {s.x[i] * k.width[i], s.y[i] * k.height[i]};
      for (int c = 0; c < 2; ++c) {
        center[c] += grad[c];
        if (grad[c] != 0) extent[c] += grad[c] * Compute(0.5) / a.P * offsets[2 * i + c];
      }
    }
    for (int c = 0; c < 2; ++c) {
      grad_ref[c] = center[c];
      if (a.R == 4) grad_ref[2 + c] = extent[c];
    }
  }
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
