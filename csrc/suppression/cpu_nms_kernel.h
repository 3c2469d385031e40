// nms, batched_nms and nms_padded on the CPU: greedy suppression within a class, compiled for each instruction set.
//
// Boxes are processed in blocks, in the order of descending score. First, the boxes of a block are compared with all
// boxes kept from earlier blocks, by several threads if there is enough work. Then the remaining boxes are processed
// one by one and compared with the boxes kept so far from the same block. Kept boxes are stored in groups, one box per
// lane of a vector. Comparing a box with a group takes 9 operations and no division: pairs are first filtered by the
// area bounds of nms.h, and the IoU of boxes.h is computed only for pairs that pass the filter. The kernel is bound by
// arithmetic. Kept boxes are processed in tiles, so their 20 bytes per box are loaded from the L1 cache.

#include "common/cpu/simd.h"
#include "suppression/cpu_nms_args.h"

namespace relops::RELOPS_ISA {

template <class Compute>
class KeptBoxes {
 public:
  KeptBoxes(Compute* groups, Compute threshold) : groups_(groups), threshold_(threshold) {}

  int64_t groups() const { return ceil_div(count_, V); }
  int64_t count() const { return count_; }

  void add(const BoundedBox<Compute>& b) {
    Compute* group = groups_ + count_ / V * kRows * V;
    const int64_t lane = count_++ % V;
    if (lane == 0)  // fills the new group with boxes that no box intersects
      for (int64_t j = 0; j < kRows * V; ++j) group[j] = j / V < 2 ? std::numeric_limits<Compute>::max() : 0;
    const Compute rows[kRows] = {b.box.x1, b.box.y1, b.box.x2, b.box.y2, b.area_bound};
    for (int64_t row = 0; row < kRows; ++row) group[row * V + lane] = rows[row];
  }

  // Returns whether a kept box in the groups [begin, end) suppresses box b.
  bool suppress(const BoundedBox<Compute>& b, int64_t begin, int64_t end) const {
    const Vec<Compute> x1 = broadcast(b.box.x1), y1 = broadcast(b.box.y1), x2 = broadcast(b.box.x2),
                       y2 = broadcast(b.box.y2), area_bound = broadcast(b.area_bound);
    for (int64_t g = begin; g < end; ++g) {
      const Compute* group = groups_ + g * kRows * V;
      const Vec<Compute> width = minimum(x2, load(group + 2 * V)) - maximum(x1, load(group));
      const Vec<Compute> height = minimum(y2, load(group + 3 * V)) - maximum(y1, load(group + V));
      // A negative width is replaced by 0, because its product with a negative height would be positive.
      unsigned lanes = greater_bits(maximum(width, Vec<Compute>{}) * height, area_bound + load(group + 4 * V));
      for (; lanes != 0; lanes &= lanes - 1) {
        const int j = __builtin_ctz(lanes);
        const Box<Compute> kept{group[j], group[V + j], group[2 * V + j], group[3 * V + j]};
        if (suppresses(kept, b.box, threshold_)) return true;
      }
    }
    return false;
  }

  static constexpr int64_t V = kLanes<Compute>, kRows = 5;

 private:
  Compute* groups_;
  Compute threshold_;
  int64_t count_ = 0;
};

constexpr double kNanosecondsPerGroup = 2.5;  // to compare a box with a group of kept boxes

// Returns the number of values that are stored for n kept boxes.
template <class Compute>
constexpr int64_t kept_size(int64_t n) {
  return round_up(n, kLanes<Compute>) * KeptBoxes<Compute>::kRows;
}

// Applies NMS to the n boxes of a class and keeps at most max_kept of them. Sets kept[i] = 1 for each kept box i. All
// kept[i] must be 0 before the call.
template <class Compute>
void suppress_class(const BoundedBox<Compute>* boxes, int64_t n, Compute threshold, int64_t max_kept, uint8_t* kept,
                    Compute* memory) {
  constexpr int64_t kBlock = 512;  // in boxes
  constexpr int64_t kTile = 32;    // in groups; a tile fits in the L1 cache
  KeptBoxes<Compute> kept_boxes(memory, threshold);
  uint8_t suppressed[kBlock];
  for (int64_t begin = 0; begin < n && kept_boxes.count() < max_kept; begin += kBlock) {
    const int64_t size = std::min(kBlock, n - begin), groups = kept_boxes.groups();
    std::memset(suppressed, 0, sizeof(suppressed));
    for_each_range(size, threads_for(kNanosecondsPerGroup * groups * size), [&](int64_t from, int64_t to) {
      for (int64_t tile = 0; tile < groups; tile += kTile)
        for (int64_t i = from; i < to; ++i)
          if (!suppressed[i])
            suppressed[i] = kept_boxes.suppress(boxes[begin + i], tile, std::min(tile + kTile, groups));
    });
    const int64_t first = groups > 0 ? groups - 1 : 0;  // the first group that can get boxes of this block
    for (int64_t i = 0; i < size && kept_boxes.count() < max_kept; ++i)
      if (!suppressed[i] && !kept_boxes.suppress(boxes[begin + i], first, kept_boxes.groups())) {
        kept_boxes.add(boxes[begin + i]);
        kept[begin + i] = 1;
      }
  }
}

template <class Compute>
void suppress_classes(const NmsArgs<Compute>& a) {
  // Large classes are processed one after another, each by all threads. Small classes are processed in parallel, each
  // by one thread.
  constexpr int64_t kLarge = 4096;
  int64_t largest = 0;
  double groups = 0;  // comparisons with groups in small classes, assuming that half of the boxes are kept
  std::vector<int64_t> small;
  const auto size = [&](int64_t c) { return a.classes[c].end - a.classes[c].begin; };
  const auto do_class = [&](int64_t c, Compute* memory) {
    const int64_t begin = a.classes[c].begin;
    suppress_class(a.boxes + begin, size(c), a.threshold, a.max_kept, a.kept + begin, memory);
  };
  for (int64_t c = 0; c < a.num_classes; ++c)
    if (size(c) > kLarge) {
      Scratch scratch;
      do_class(c, scratch.allocate<Compute>(kept_size<Compute>(std::min(size(c), a.max_kept))));
    } else {
      small.push_back(c);
      largest = std::max(largest, size(c));
      const double boxes = std::min<double>(size(c), 2.0 * a.max_kept);
      groups += boxes * (2 + boxes / (4 * kLanes<Compute>));
    }
  const int64_t threads = threads_for(kNanosecondsPerGroup * groups);
  // If there are many classes, a work item consists of several classes.
  const int64_t count = small.size(), classes_per_item = std::max<int64_t>(1, count / (16 * threads));
  for_each_item(ceil_div(count, classes_per_item), threads, [&] {
    return [&, scratch = std::make_shared<Scratch>(), memory = static_cast<Compute*>(nullptr)](int64_t item) mutable {
      if (memory == nullptr) memory = scratch->template allocate<Compute>(kept_size<Compute>(largest));
      for (int64_t i = item * classes_per_item; i < std::min(count, (item + 1) * classes_per_item); ++i)
        do_class(small[i], memory);
    };
  });
}

}  // namespace relops::RELOPS_ISA
