// nms, batched_nms and nms_padded on the CPU: greedy suppression within a class, for each instruction set.
//
// Boxes are processed in blocks, in the order of descending score. First, a block is compared with all boxes that were
// kept before it, by several threads if there is enough work. Then the remaining boxes are processed one by one and
// compared with the boxes that the block itself has kept so far. Kept boxes are stored in groups as wide as a vector.
// Comparing a box with a group takes 9 operations and no division: the area bounds of nms.h serve as a filter, and the
// IoU of boxes.h decides about the pairs that pass it. The kernel is bound by arithmetic. Boxes are compared tile by
// tile, so that the 20 bytes of each box come from L1.

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

  // Whether a kept box of the groups [begin, end) suppresses box b.
  bool suppress(const BoundedBox<Compute>& b, int64_t begin, int64_t end) const {
    const Vec<Compute> x1 = broadcast(b.box.x1), y1 = broadcast(b.box.y1), x2 = broadcast(b.box.x2),
                       y2 = broadcast(b.box.y2), area_bound = broadcast(b.area_bound);
    for (int64_t g = begin; g < end; ++g) {
      const Compute* group = groups_ + g * kRows * V;
      const Vec<Compute> width = minimum(x2, load(group + 2 * V)) - maximum(x1, load(group));
      const Vec<Compute> height = minimum(y2, load(group + 3 * V)) - maximum(y1, load(group + V));
      // A negative width counts as 0, so that the product is not positive if the height is negative, too.
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

// Returns the number of values that n kept boxes take.
template <class Compute>
constexpr int64_t kept_size(int64_t n) {
  return round_up(n, kLanes<Compute>) * KeptBoxes<Compute>::kRows;
}

// Sets kept[i] = 1 for each box i of a class that is kept, for at most max_kept of its n boxes. All kept[i] must be 0
// before the call.
template <class Compute>
void suppress_class(const BoundedBox<Compute>* boxes, int64_t n, Compute threshold, int64_t max_kept, uint8_t* kept,
                    Compute* memory) {
  constexpr int64_t kBlock = 512;  // boxes
  constexpr int64_t kTile = 32;    // groups; a tile fits in L1
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
    const int64_t first = groups > 0 ? groups - 1 : 0;  // boxes that this block keeps are in this group or later ones
    for (int64_t i = 0; i < size && kept_boxes.count() < max_kept; ++i)
      if (!suppressed[i] && !kept_boxes.suppress(boxes[begin + i], first, kept_boxes.groups())) {
        kept_boxes.add(boxes[begin + i]);
        kept[begin + i] = 1;
      }
  }
}

template <class Compute>
void suppress_classes(const NmsArgs<Compute>& a) {
  // Large classes are processed one after the other, each by all threads; small classes are processed side by side.
  constexpr int64_t kLarge = 4096;
  int64_t largest = 0;
  double groups = 0;  // comparisons with groups in small classes, if half of the boxes are kept
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
