// box_iou and generalized_box_iou on the CPU: the loops over boxes, which are stored as one array per coordinate.
//
// In the forward pass, the lanes of a vector are neighboring elements of a row of the output, and writing the output
// limits the speed of the loop. In the backward pass, the lanes are neighboring elements of a row of grad_output, so
// grad_output is read in memory order. For `a`, the gradient of each box is summed in registers, whose lanes are added
// up at the end. For `b`, each row is added to the gradients of all boxes of a tile, which stay in the L1 cache.

#include "box_iou/cpu_args.h"
#include "common/cpu/simd.h"

namespace relops::RELOPS_ISA {

// Up to kBoxTile boxes, stored as one array per coordinate. The last box is repeated to fill the last vector, so the
// lanes past the end compute finite values if the last box is finite.
template <class Compute>
struct BoxTile {
  alignas(RELOPS_VECTOR_BYTES) Compute x1[kBoxTile], y1[kBoxTile], x2[kBoxTile], y2[kBoxTile], area[kBoxTile];

  BoxTile(const Compute* boxes, int64_t count) {
    for (int64_t i = 0; i < round_up(count, kLanes<Compute>); ++i) {
      const Compute* box = boxes + 4 * std::min(i, count - 1);
      x1[i] = box[0];
      y1[i] = box[1];
      x2[i] = box[2];
      y2[i] = box[3];
      area[i] = relops::area(Box<Compute>{box[0], box[1], box[2], box[3]});
    }
  }

  Box<Vec<Compute>> at(int64_t i) const { return {load(x1 + i), load(y1 + i), load(x2 + i), load(y2 + i)}; }
};

template <class Compute>
struct BoxInLanes {
  explicit BoxInLanes(const Compute* p)
      : box{broadcast(p[0]), broadcast(p[1]), broadcast(p[2]), broadcast(p[3])}, area(relops::area(box)) {}

  Box<Vec<Compute>> box;
  Vec<Compute> area;
};

template <bool kGeneralized, class Compute>
void box_iou_forward_of(const BoxIouForward<Compute>& p, int64_t threads) {
  constexpr int64_t V = kLanes<Compute>;
  const BoxTiling tiles(p.A, p.B);
  for_each_item(p.N * tiles.count(), threads, [&] {
    return [&](int64_t item) {
      const auto [n, row_begin, row_end, column, columns] = tiles.at(item);
      const BoxTile<Compute> b(p.b + 4 * (n * p.B + column), columns);
      // If a tile is as wide as the output, a vector may be written past the end of its row into the next row, which is
      // overwritten later.
      Compute* const tile_end = p.output + (n * p.A + row_end) * p.B;
      for (int64_t row = row_begin; row < row_end; ++row) {
        const BoxInLanes<Compute> a(p.a + 4 * (n * p.A + row));
        Compute* const out = p.output + (n * p.A + row) * p.B + column;
        const int64_t writable = columns == p.B ? tile_end - out : columns;
        for (int64_t j = 0; j < columns; j += V) {
          const Vec<Compute> v = overlap<kGeneralized>(a.box, b.at(j), a.area, load(b.area + j));
          if (j + V <= writable)
            store(out + j, v);
          else
            store_first(out + j, v, columns - j);
        }
      }
    };
  });
}

template <class Compute>
void box_iou_forward(const BoxIouForward<Compute>& p, bool generalized, int64_t threads) {
  generalized ? box_iou_forward_of<true>(p, threads) : box_iou_forward_of<false>(p, threads);
}

// Loads up to n values, which are `stride` elements apart and begin at p, and sets the other lanes to zero.
template <class Compute>
inline Vec<Compute> load_strided(const Compute* p, int64_t stride, int64_t n) {
  if (stride == 1) return load_first(p, n);
  if (stride == 0 && n >= kLanes<Compute>) return broadcast(*p);
  alignas(RELOPS_VECTOR_BYTES) Compute values[kLanes<Compute>] = {};
  for (int64_t i = 0; i < std::min(n, kLanes<Compute>); ++i) values[i] = p[i * stride];
  return load(values);
}

// Computes the gradient of `a`. Row i of grad_output belongs to box i of `a`. Each work item sums over one tile of
// columns.
template <bool kGeneralized, class Compute>
void box_iou_backward_rows(const BoxIouGradient<Compute>& p, Compute* partials, int64_t threads) {
  constexpr int64_t V = kLanes<Compute>;
  const BoxTiling tiles(p.own_count, p.other_count);
  for_each_item(p.N * tiles.count(), threads, [&] {
    return [&](int64_t item) {
      const auto [n, row_begin, row_end, column, columns] = tiles.at(item);
      const BoxTile<Compute> others(p.other + 4 * (n * p.other_count + column), columns);
      Compute* const partial = partials + column / kBoxTile * (p.N * p.own_count * 4);
      for (int64_t row = row_begin; row < row_end; ++row) {
        const BoxInLanes<Compute> own(p.own + 4 * (n * p.own_count + row));
        const Compute* grad = p.grad_output + n * p.stride_n + row * p.stride_own + column * p.stride_other;
        BoxGradient<Vec<Compute>> sums{};
        for (int64_t j = 0; j < columns; j += V)
          add_gradient<kGeneralized>(sums, own.box, others.at(j), own.area, load(others.area + j),
                                     load_strided(grad + j * p.stride_other, p.stride_other, columns - j));
        const Box<Vec<Compute>> gradient = sums.coordinates(own.box);
        Compute* const out = partial + 4 * (n * p.own_count + row);
        out[0] = sum<Compute>(gradient.x1);
        out[1] = sum<Compute>(gradient.y1);
        out[2] = sum<Compute>(gradient.x2);
        out[3] = sum<Compute>(gradient.y2);
      }
    };
  });
}

// Computes the gradient of `b`. Column j of grad_output belongs to box j of `b`. Each work item sums over up to
// kBoxTile rows.
template <bool kGeneralized, class Compute>
void box_iou_backward_columns(const BoxIouGradient<Compute>& p, Compute* partials, int64_t threads) {
  constexpr int64_t V = kLanes<Compute>;
  const int64_t slices = ceil_div(p.other_count, kBoxTile), tiles = ceil_div(p.own_count, kBoxTile);
  for_each_item(p.N * slices * tiles, threads, [&] {
    return [&](int64_t item) {
      const int64_t column = item % tiles * kBoxTile, slice = item / tiles % slices, n = item / tiles / slices;
      const int64_t columns = std::min(kBoxTile, p.own_count - column);
      const BoxTile<Compute> own(p.own + 4 * (n * p.own_count + column), columns);
      BoxGradient<Vec<Compute>> sums[kBoxTile / V];
      std::fill_n(sums, ceil_div(columns, V), BoxGradient<Vec<Compute>>{});
      const int64_t row_end = std::min((slice + 1) * kBoxTile, p.other_count);
      for (int64_t row = slice * kBoxTile; row < row_end; ++row) {
        const BoxInLanes<Compute> other(p.other + 4 * (n * p.other_count + row));
        const Compute* grad = p.grad_output + n * p.stride_n + row * p.stride_other + column * p.stride_own;
        for (int64_t j = 0; j < columns; j += V)
          add_gradient<kGeneralized>(sums[j / V], own.at(j), other.box, load(own.area + j), other.area,
                                     load_strided(grad + j * p.stride_own, p.stride_own, columns - j));
      }
      Compute* const partial = partials + 4 * ((slice * p.N + n) * p.own_count + column);
      for (int64_t j = 0; j < columns; j += V) {
        const Box<Vec<Compute>> gradient = sums[j / V].coordinates(own.at(j));
        for (int64_t i = 0; i < std::min(V, columns - j); ++i) {
          Compute* const out = partial + 4 * (j + i);
          out[0] = gradient.x1[i];
          out[1] = gradient.y1[i];
          out[2] = gradient.x2[i];
          out[3] = gradient.y2[i];
        }
      }
    };
  });
}

template <class Compute>
void box_iou_backward(const BoxIouGradient<Compute>& p, Compute* partials, int64_t threads) {
  if (p.of_a)
    p.generalized ? box_iou_backward_rows<true>(p, partials, threads)
                  : box_iou_backward_rows<false>(p, partials, threads);
  else
    p.generalized ? box_iou_backward_columns<true>(p, partials, threads)
                  : box_iou_backward_columns<false>(p, partials, threads);
}

}  // namespace relops::RELOPS_ISA
