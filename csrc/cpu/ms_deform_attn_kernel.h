// Multi-scale deformable attention on the CPU; compiled once per instruction set by foreach_isa.h.
//
// The work is Q * M * L * P samples of four rows of D values each; what bounds it is fetching those rows. In value
// [N,S,M,D] the rows of one head lie M * D apart, which leaves all but 1/M of the sets of a cache unused, so where
// queries are many a thread first copies the rows of its (image, head) into a dense array, converted to the compute
// type, and gathers from there: one head of a 100x152 pyramid is 2.6 MB instead of 20, and its smaller levels stay in
// L2. Where queries are few (a decoder) rows are read where they lie.
//
// One item is one (image, query, head). Its L * P samples are first turned into row indices and weights, a vector of
// samples at a time; then their rows are accumulated, a vector of channels at a time. A corner outside its level points
// at a row of zeros, so that the inner loop has no branch. No sampled value is ever stored.
//
// Backward: a thread owns the gradient of an (image, head), so sums need neither locks nor atomics and come out the
// same every time. Where there are fewer (image, head) pairs than threads, queries are split into a few parts with sums
// of their own, added up in a fixed order at the end.

#include "cpu/simd.h"

namespace relops::RELOPS_ISA {

namespace {

template <class I>
constexpr I round_up(I n, I multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Uninitialised memory for a thread's own use, aligned to a cache line.
class Scratch {
 public:
  template <class X>
  X* take(int64_t count) {
    void* p = std::aligned_alloc(64, round_up<int64_t>(std::max<int64_t>(count, 1) * sizeof(X), 64));
    if (p == nullptr) throw std::bad_alloc();
    blocks_.emplace_back(p, std::free);
    return static_cast<X*>(p);
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks_;
};

// Rows of one (image, head): row i at base + i * stride; row S, all zeros, stands for whatever lies outside.
template <class R>
struct Rows {
  R* base;
  int64_t stride;
  R* zero;
  int64_t S;
  R* operator[](int64_t i) const { return i == S ? zero : base + i * stride; }
};

// Constants of the L * P samples of an item, padded to whole vectors with samples of an empty level.
template <class C>
struct SampleConstants {
  int64_t count, padded;
  C *width, *height;
  Int<C>*width_int, *height_int, *start;

  template <class Args>
  SampleConstants(const Args& a, Scratch& scratch)
      : count(a.L * a.P),
        padded(round_up(count, kLanes<C>)),
        width(scratch.take<C>(padded)),
        height(scratch.take<C>(padded)),
        width_int(scratch.take<Int<C>>(padded)),
        height_int(scratch.take<Int<C>>(padded)),
        start(scratch.take<Int<C>>(padded)) {
    for (int64_t s = 0; s < padded; ++s) {
      const Level level = s < count ? a.levels[s / a.P] : Level{0, 0, 0};
      width[s] = level.width;
      height[s] = level.height;
      width_int[s] = level.width;
      height_int[s] = level.height;
      start[s] = level.start;
    }
  }
};

// The samples of one item. Corners are numbered (top left, top right, bottom left, bottom right).
template <class C>
struct Samples {
  C *x, *y;   // pixels
  C* weight;  // attention weight
  C *fraction_x, *fraction_y;
  Int<C>* row[4];       // index of a corner's row; S outside
  C* corner_weight[4];  // bilinear weight times attention weight; 0 where the whole sample is outside
  C* dot[4];            // backward: gradient of the output times the corner's row
  C* raw;               // locations or offsets as given, converted
  C *grad_xy, *grad_weight;

  Samples(int64_t padded, bool backward, Scratch& scratch) {
    for (C** p : {&x, &y, &weight, &fraction_x, &fraction_y}) *p = scratch.take<C>(padded);
    for (auto& p : row) p = scratch.take<Int<C>>(padded);
    for (auto& p : corner_weight) p = scratch.take<C>(padded);
    raw = scratch.take<C>(2 * padded);
    if (!backward) return;
    for (auto& p : dot) p = scratch.take<C>(padded);
    grad_xy = scratch.take<C>(2 * padded);
    grad_weight = scratch.take<C>(padded);
  }
};

// Fills x, y (in pixels) and weight from the inputs of item (n, q, m).
template <class T, class U, class C>
void read_samples(const MsDeformAttnArgs<T, U>& a, const SampleConstants<C>& k, int64_t n, int64_t q, int64_t m,
                  const Samples<C>& s) {
  const int64_t item = (n * a.Q + q) * a.M + m;
  const C* xy = s.raw;
  if constexpr (std::is_same_v<U, C>)
    xy = a.locations + item * k.count * 2;
  else
    convert(a.locations + item * k.count * 2, s.raw, 2 * k.count);
  convert(a.weights + item * k.count, s.weight, k.count);
  if (a.reference == nullptr) {
    for (int64_t i = 0; i < k.count; ++i) {
      s.x[i] = xy[2 * i] * k.width[i] - C(0.5);
      s.y[i] = xy[2 * i + 1] * k.height[i] - C(0.5);
    }
  } else {
    softmax(s.weight, k.count, k.padded);
    const C* ref = a.reference + (n * a.Q + q) * a.L * a.R;
    for (int64_t l = 0, i = 0; l < a.L; ++l, ref += a.R) {
      const C width = k.width[i], height = k.height[i];
      const C base_x = ref[0] * width - C(0.5), base_y = ref[1] * height - C(0.5);
      const C unit_x = a.R == 2 ? C(1) : ref[2] * width * C(0.5) / a.P;
      const C unit_y = a.R == 2 ? C(1) : ref[3] * height * C(0.5) / a.P;
      for (int64_t p = 0; p < a.P; ++p, ++i) {
        s.x[i] = base_x + xy[2 * i] * unit_x;
        s.y[i] = base_y + xy[2 * i + 1] * unit_y;
      }
    }
  }
  for (int64_t i = k.count; i < k.padded; ++i) s.x[i] = s.y[i] = s.weight[i] = 0;
}

// From x, y and weight to rows and weights of corners. `mask` is given only where rows are read in place.
template <class C>
void locate_samples(const SampleConstants<C>& k, int64_t S, const bool* mask, const Samples<C>& s) {
  using V = Vec<C>;
  using VI = VecInt<C>;
  const VI outside = broadcast_int<C>(S);
  for (int64_t i = 0; i < k.padded; i += kLanes<C>) {
    V x = load(s.x + i), y = load(s.y + i);
    const VI width = load_int<C>(k.width_int + i), height = load_int<C>(k.height_int + i);
    // False for NaN; what remains fits an int.
    const VI inside = (x > C(-1)) & (x < load(k.width + i)) & (y > C(-1)) & (y < load(k.height + i));
    x = inside ? x : V{};
    y = inside ? y : V{};
    VI left = __builtin_convertvector(x, VI), top = __builtin_convertvector(y, VI);
    left += x < __builtin_convertvector(left, V);  // truncation to floor: a true comparison is -1
    top += y < __builtin_convertvector(top, V);
    const V fx = x - __builtin_convertvector(left, V), fy = y - __builtin_convertvector(top, V);
    const V weight = inside ? load(s.weight + i) : V{};
    const V above = (1 - fy) * weight, below = fy * weight;
    const VI in_left = inside & (left >= 0), in_right = inside & (left + 1 < width);
    const VI in_top = top >= 0, in_bottom = top + 1 < height;
    const VI first = load_int<C>(k.start + i) + top * width + left;
    store(s.fraction_x + i, fx);
    store(s.fraction_y + i, fy);
    store_int<C>(s.row[0] + i, in_left & in_top ? first : outside);
    store_int<C>(s.row[1] + i, in_right & in_top ? first + 1 : outside);
    store_int<C>(s.row[2] + i, in_left & in_bottom ? first + width : outside);
    store_int<C>(s.row[3] + i, in_right & in_bottom ? first + width + 1 : outside);
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

// Calls f(constant number of vectors, first channel) over the D channels of a row, padded to whole vectors.
template <class C, class F>
void for_channels(int64_t D, F f) {
  constexpr int64_t W = kLanes<C>;
  int64_t vectors = (D + W - 1) / W, d = 0;
  for (; vectors >= 4; vectors -= 4, d += 4 * W) f(std::integral_constant<int, 4>{}, d);
  if (vectors & 2) f(std::integral_constant<int, 2>{}, d), d += 2 * W;
  if (vectors & 1) f(std::integral_constant<int, 1>{}, d);
}

// out[0..D) = sum over samples and corners of weight * row.
template <class T, class R, class C>
void gather_item(const Rows<const R>& rows, const Samples<C>& s, int64_t count, int64_t D, T* out) {
  constexpr int64_t W = kLanes<C>;
  for_channels<C>(D, [&](auto vectors, int64_t d) {
    constexpr int V = vectors;
    // Separate sums break the chain of dependent additions: as many as registers allow.
    constexpr int kSums = V == 4 ? 2 : 4;
    Vec<C> sums[kSums][V] = {};
    for (int64_t i = 0; i < count; ++i)
      for (int corner = 0; corner < 4; ++corner) {
        const R* row = rows[s.row[corner][i]] + d;
        const C weight = s.corner_weight[corner][i];
        for (int v = 0; v < V; ++v) sums[corner % kSums][v] += weight * load(row + v * W);
      }
    for (int v = 0; v < V; ++v) {
      Vec<C> total = sums[0][v] + sums[1][v];
      if constexpr (kSums == 4) total += sums[2][v] + sums[3][v];
      const int64_t at = d + v * W;
      if (at + W <= D) {
        store(out + at, total);
      } else {
        alignas(64) C tail[W];
        store(tail, total);
        convert(tail, out + at, D - at);
      }
    }
  });
}

// dot[corner][sample] = grad . row, and, with kScatter, sums[row] += corner_weight * grad.
// grad is padded with zeros to whole vectors.
template <bool kScatter, class R, class C>
void backward_item(const Rows<const R>& rows, const Rows<C>& sums, const Samples<C>& s, int64_t count, int64_t D,
                   const C* grad) {
  constexpr int64_t W = kLanes<C>;
  constexpr int kGroup = W < 4 ? 1 : W / 4;  // samples whose 4 dot products fill a vector
  for_channels<C>(D, [&](auto vectors, int64_t d) {
    constexpr int V = vectors;
    Vec<C> g[V];
    for (int v = 0; v < V; ++v) g[v] = load(grad + d + v * W);
    for (int64_t i = 0; i < count; i += kGroup) {
      Vec<C> partial[4 * kGroup];
      for (int j = 0; j < kGroup; ++j)
        for (int corner = 0; corner < 4; ++corner) {
          const Int<C> index = s.row[corner][i + j];
          const R* row = rows[index] + d;
          Vec<C> product = g[0] * load(row);
          for (int v = 1; v < V; ++v) product += g[v] * load(row + v * W);
          partial[corner * kGroup + j] = product;
          if constexpr (kScatter) {
            C* to = sums[index] + d;
            const C weight = s.corner_weight[corner][i + j];
            for (int v = 0; v < V; ++v) store(to + v * W, load(to + v * W) + weight * g[v]);
          }
        }
      alignas(64) C dots[4 * kGroup];
      for (int b = 0; b < 4 * kGroup; b += W) store(dots + b, transpose_sum<C>(partial + b));
      for (int corner = 0; corner < 4; ++corner)
        for (int j = 0; j < kGroup; ++j)
          s.dot[corner][i + j] = dots[corner * kGroup + j] + (d == 0 ? C(0) : s.dot[corner][i + j]);
    }
  });
}

// From the dot products to the gradients of locations and weights (or offsets, logits and reference) of an item.
template <class T, class U, class C>
void write_sampling_grads(const MsDeformAttnArgs<T, U>& a, const SampleConstants<C>& k, int64_t n, int64_t q, int64_t m,
                          const Samples<C>& s) {
  const int64_t item = (n * a.Q + q) * a.M + m;
  for (int64_t i = 0; i < k.padded; i += kLanes<C>) {
    const Vec<C> fx = load(s.fraction_x + i), fy = load(s.fraction_y + i), weight = load(s.weight + i);
    const Vec<C> d0 = load(s.dot[0] + i), d1 = load(s.dot[1] + i), d2 = load(s.dot[2] + i), d3 = load(s.dot[3] + i);
    const Vec<C> dx = (1 - fy) * (d1 - d0) + fy * (d3 - d2), dy = (1 - fx) * (d2 - d0) + fx * (d3 - d1);
    store(s.grad_weight + i, (1 - fy) * ((1 - fx) * d0 + fx * d1) + fy * ((1 - fx) * d2 + fx * d3));
    store(s.x + i, weight * dx);  // x and y are spent; from here on they hold the gradient in pixels
    store(s.y + i, weight * dy);
  }
  if (a.reference == nullptr) {
    for (int64_t i = 0; i < k.count; ++i) {
      s.grad_xy[2 * i] = s.x[i] * k.width[i];
      s.grad_xy[2 * i + 1] = s.y[i] * k.height[i];
    }
  } else {
    Vec<C> mean = {};
    for (int64_t i = 0; i < k.padded; i += kLanes<C>) mean += load(s.weight + i) * load(s.grad_weight + i);
    const C expected = sum<C>(mean);
    for (int64_t i = 0; i < k.padded; i += kLanes<C>)
      store(s.grad_weight + i, load(s.weight + i) * (load(s.grad_weight + i) - expected));

    const C* ref = a.reference + (n * a.Q + q) * a.L * a.R;
    const C* offsets = s.raw;
    if constexpr (std::is_same_v<U, C>) offsets = a.locations + item * k.count * 2;
    C* grad_ref = a.grad_reference ? a.grad_reference + ((n * a.M + m) * a.Q + q) * a.L * a.R : nullptr;
    for (int64_t l = 0, i = 0; l < a.L; ++l, ref += a.R) {
      const C scale[2] = {k.width[i], k.height[i]};
      C center[2] = {}, extent[2] = {};
      for (int64_t p = 0; p < a.P; ++p, ++i) {
        const C grad[2] = {s.x[i], s.y[i]};
        for (int c = 0; c < 2; ++c) {
          const C half = scale[c] * C(0.5) / a.P;
          // A sample that contributed nothing, a non-finite one among them, has no gradient.
          const bool none = grad[c] == 0;
          s.grad_xy[2 * i + c] = none ? C(0) : grad[c] * (a.R == 2 ? C(1) : half * ref[2 + c]);
          center[c] += grad[c] * scale[c];
          extent[c] += none ? C(0) : grad[c] * half * offsets[2 * i + c];
        }
      }
      if (grad_ref == nullptr) continue;
      for (int c = 0; c < 2; ++c) {
        grad_ref[c] = center[c];
        if (a.R == 4) grad_ref[2 + c] = extent[c];
      }
      grad_ref += a.R;
    }
  }
  convert(s.grad_xy, a.grad_locations + item * k.count * 2, 2 * k.count);
  convert(s.grad_weight, a.grad_weights + item * k.count, k.count);
}

// Whether to copy the rows of a head before gathering from them. In place, a row must be whole vectors.
template <class T, class U>
bool worth_packing(const MsDeformAttnArgs<T, U>& a) {
  return a.D % kLanes<ComputeType<T>> != 0 || a.Q * a.L * a.P * 4 > 2 * a.S;
}

// Dense rows of (n, m), padded with zeros to whole vectors; masked rows and row S are zero.
template <class T, class U, class C>
void pack_rows(const MsDeformAttnArgs<T, U>& a, int64_t n, int64_t m, C* packed, int64_t width) {
  for (int64_t i = 0; i <= a.S; ++i) {
    C* row = packed + i * width;
    int64_t written = 0;
    if (i < a.S && !(a.mask && a.mask[n * a.S + i])) {
      convert(a.value + ((n * a.S + i) * a.M + m) * a.D, row, a.D);
      written = a.D;
    }
    for (int64_t d = written; d < width; ++d) row[d] = 0;
  }
}

// What a thread reads rows from: either packed anew for each (n, m), or value in place.
template <class T, class U>
class RowSource {
  using C = ComputeType<T>;

 public:
  RowSource(const MsDeformAttnArgs<T, U>& a, Scratch& scratch)
      : a_(a), packs(worth_packing(a)), width(round_up(a.D, kLanes<C>)) {
    packed_ = scratch.take<C>((packs ? a.S + 1 : 1) * width);
    zero_ = scratch.take<T>(width);
    std::fill_n(zero_, width, T(0));
  }

  // f(Rows) with the rows of (n, m).
  template <class F>
  void with(int64_t n, int64_t m, F f) {
    if (packs) {
      if (n != n_ || m != m_) pack_rows(a_, n, m, packed_, width);
      n_ = n, m_ = m;
      f(Rows<const C>{packed_, width, packed_ + a_.S * width, a_.S});
    } else {
      f(Rows<const T>{a_.value + (n * a_.S * a_.M + m) * a_.D, a_.M * a_.D, zero_, a_.S});
    }
  }

  const bool* mask_in_place(int64_t n) const { return a_.mask && !packs ? a_.mask + n * a_.S : nullptr; }

 private:
  const MsDeformAttnArgs<T, U>& a_;

 public:
  const bool packs;
  const int64_t width;

 private:
  C* packed_;
  T* zero_;
  int64_t n_ = -1, m_ = -1;
};

}  // namespace

template <class T, class U>
void ms_deform_attn_forward(const MsDeformAttnArgs<T, U>& a) {
  using C = ComputeType<T>;
  // Tasks of one (n, m) are neighbours, so a thread that gets several packs once. In place, an item is little work and
  // many queries make up a task.
  const int64_t parts = std::min<int64_t>(a.Q, 8);
  torch::stable::parallel_for(0, a.N * a.M * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const SampleConstants<C> constants(a, scratch);
    const Samples<C> samples(constants.padded, false, scratch);
    RowSource<T, U> source(a, scratch);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / parts, part = task % parts, n = pair / a.M, m = pair % a.M;
      source.with(n, m, [&](const auto& rows) {
        for (int64_t q = a.Q * part / parts; q < a.Q * (part + 1) / parts; ++q) {
          read_samples(a, constants, n, q, m, samples);
          locate_samples(constants, a.S, source.mask_in_place(n), samples);
          gather_item(rows, samples, constants.count, a.D, a.output + ((n * a.Q + q) * a.M + m) * a.D);
        }
      });
    }
  });
}

template <class T, class U>
void ms_deform_attn_backward(const MsDeformAttnArgs<T, U>& a, int64_t threads) {
  using C = ComputeType<T>;
  const int64_t pairs = a.N * a.M, width = round_up(a.D, kLanes<C>);
  const bool scatter = a.grad_value != nullptr;
  // In place, a float32 or float64 gradient is its own array of sums.
  const bool sums_in_place = std::is_same_v<T, C> && !worth_packing(a);
  const int64_t parts =
      sums_in_place ? 1 : std::clamp<int64_t>((threads + pairs - 1) / pairs, 1, std::min<int64_t>(a.Q, 4));
  const int64_t sums_size = (a.S + 1) * width;
  Scratch shared;
  // With several parts their sums must outlive the task.
  C* part_sums = scatter && parts > 1 ? shared.take<C>(pairs * parts * sums_size) : nullptr;

  // Adds up `parts` sums, one after the other, and writes rows [from, to) of the gradient of (n, m).
  auto write_grad_value = [&](int64_t pair, C* sums, int64_t from, int64_t to) {
    const int64_t n = pair / a.M, m = pair % a.M;
    for (int64_t i = from; i < to; ++i) {
      if (a.mask && a.mask[n * a.S + i]) continue;
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t d = 0; d < width; ++d) sums[i * width + d] += sums[part * sums_size + i * width + d];
      convert(sums + i * width, a.grad_value + ((n * a.S + i) * a.M + m) * a.D, a.D);
    }
  };

  torch::stable::parallel_for(0, pairs * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const SampleConstants<C> constants(a, scratch);
    const Samples<C> samples(constants.padded, true, scratch);
    RowSource<T, U> source(a, scratch);
    C* grad = scratch.take<C>(width);
    C* unused_row = scratch.take<C>(width);  // takes what falls outside
    for (int64_t d = 0; d < width; ++d) grad[d] = unused_row[d] = 0;
    C* own_sums = scatter && !sums_in_place && parts == 1 ? scratch.take<C>(sums_size) : nullptr;
    for (int64_t i = 0; i < constants.padded; ++i)
      for (auto* dot : samples.dot) dot[i] = 0;

    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / parts, part = task % parts, n = pair / a.M, m = pair % a.M;
      Rows<C> sums{nullptr, width, unused_row, a.S};
      if (scatter && sums_in_place) {
        sums.base = reinterpret_cast<C*>(a.grad_value) + (n * a.S * a.M + m) * a.D;
        sums.stride = a.M * a.D;
      } else if (scatter) {
        sums.base = own_sums ? own_sums : part_sums + task * sums_size;
        std::fill_n(sums.base, sums_size, C(0));
      }
      source.with(n, m, [&](const auto& rows) {
        for (int64_t q = a.Q * part / parts; q < a.Q * (part + 1) / parts; ++q) {
          read_samples(a, constants, n, q, m, samples);
          locate_samples(constants, a.S, source.mask_in_place(n), samples);
          convert(a.grad_output + ((n * a.Q + q) * a.M + m) * a.D, grad, a.D);
          if (scatter)
            backward_item<true>(rows, sums, samples, constants.count, a.D, grad);
          else
            backward_item<false>(rows, sums, samples, constants.count, a.D, grad);
          if (a.grad_locations) write_sampling_grads(a, constants, n, q, m, samples);
        }
      });
      if (own_sums) write_grad_value(pair, own_sums, 0, a.S);
    }
  });

  if (part_sums == nullptr) return;
  torch::stable::parallel_for(0, pairs * a.S, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t pair = i / a.S, row = i % a.S, rows = std::min(a.S - row, end - i);
      write_grad_value(pair, part_sums + pair * parts * sums_size, row, row + rows);
      i += rows;
    }
  });
}

}  // namespace relops::RELOPS_ISA
