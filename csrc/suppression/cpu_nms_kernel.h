// Greedy suppression within a class, for each instruction set.
//
// Boxes come by descending score, in blocks. A block is first compared with all boxes kept before it, by several
// threads where that is worth it; what is left then goes through the greedy order, compared with what the block itself
// has kept so far. The kept boxes lie in groups of a vector's width. Comparing costs 9 operations a group and no
// division: with the shares of nms.h it is a filter, and what passes is decided by the one expression of boxes.h. Bound
// by arithmetic; boxes are compared tile by tile, so that the 20 bytes of each come from L1.

#include "common/cpu/simd.h"

namespace relops::RELOPS_ISA {

template <class C>
class KeptBoxes {
 public:
  KeptBoxes(C* groups, C threshold) : groups_(groups), threshold_(threshold) {}

  int64_t groups() const { return ceil_div(count_, W); }
  int64_t count() const { return count_; }

  void add(const SharedBox<C>& b) {
    C* group = groups_ + count_ / W * kRows * W;
    const int64_t lane = count_++ % W;
    if (lane == 0)  // nothing intersects the lanes that are still free
      for (int64_t j = 0; j < kRows * W; ++j) group[j] = j / W < 2 ? std::numeric_limits<C>::max() : 0;
    const C rows[kRows] = {b.box.x1, b.box.y1, b.box.x2, b.box.y2, b.share};
    for (int64_t row = 0; row < kRows; ++row) group[row * W + lane] = rows[row];
  }

  // Whether a box of the groups [begin, end) suppresses this one.
  bool suppress(const SharedBox<C>& b, int64_t begin, int64_t end) const {
    const Vec<C> x1 = broadcast(b.box.x1), y1 = broadcast(b.box.y1), x2 = broadcast(b.box.x2), y2 = broadcast(b.box.y2),
                 share = broadcast(b.share);
    for (int64_t g = begin; g < end; ++g) {
      const C* group = groups_ + g * kRows * W;
      const Vec<C> width = minimum(x2, load(group + 2 * W)) - maximum(x1, load(group));
      const Vec<C> height = minimum(y2, load(group + 3 * W)) - maximum(y1, load(group + W));
      // Where both are negative the first is taken as 0.
      unsigned lanes = greater_bits(maximum(width, Vec<C>{}) * height, share + load(group + 4 * W));
      for (; lanes != 0; lanes &= lanes - 1) {
        const int j = __builtin_ctz(lanes);
        const Box<C> kept{group[j], group[W + j], group[2 * W + j], group[3 * W + j]};
        if (suppresses(kept, b.box, threshold_)) return true;
      }
    }
    return false;
  }

  static constexpr int64_t W = kLanes<C>, kRows = 5;

 private:
  C* groups_;
  C threshold_;
  int64_t count_ = 0;
};

constexpr double kNanosecondsOfGroup = 2.5;  // of kept boxes, compared with a box

// Room for n kept boxes, in values.
template <class C>
constexpr int64_t kept_size(int64_t n) {
  return round_up(n, kLanes<C>) * KeptBoxes<C>::kRows;
}

// Marks those of the n boxes of a class that are kept, most at most. kept[i] is 0 at first.
template <class C>
void suppress_class(const SharedBox<C>* boxes, int64_t n, C threshold, int64_t most, uint8_t* kept, C* room) {
  constexpr int64_t kBlock = 512, kTile = 32;  // boxes; groups, which fit in L1
  KeptBoxes<C> before(room, threshold);
  uint8_t gone[kBlock];
  for (int64_t begin = 0; begin < n && before.count() < most; begin += kBlock) {
    const int64_t size = std::min(kBlock, n - begin), groups = before.groups();
    std::memset(gone, 0, sizeof(gone));
    for_each_range(size, threads_for(kNanosecondsOfGroup * groups * size), [&](int64_t from, int64_t to) {
      for (int64_t tile = 0; tile < groups; tile += kTile)
        for (int64_t i = from; i < to; ++i)
          if (!gone[i]) gone[i] = before.suppress(boxes[begin + i], tile, std::min(tile + kTile, groups));
    });
    const int64_t first = groups > 0 ? groups - 1 : 0;  // where this block's own begin, at the latest
    for (int64_t i = 0; i < size && before.count() < most; ++i)
      if (!gone[i] && !before.suppress(boxes[begin + i], first, before.groups())) {
        before.add(boxes[begin + i]);
        kept[begin + i] = 1;
      }
  }
}

template <class C>
void suppress_classes(const NmsArgs<C>& a) {
  // Large classes one by one, with all threads; the others side by side.
  constexpr int64_t kLarge = 4096;
  int64_t largest = 0;
  double groups = 0;  // compared with small ones, if half of the boxes are kept
  std::vector<int64_t> small;
  const auto size = [&](int64_t c) { return a.classes[c].end - a.classes[c].begin; };
  const auto do_class = [&](int64_t c, C* room) {
    const int64_t begin = a.classes[c].begin;
    suppress_class(a.boxes + begin, size(c), a.threshold, a.most, a.kept + begin, room);
  };
  for (int64_t c = 0; c < a.num_classes; ++c)
    if (size(c) > kLarge) {
      Scratch scratch;
      do_class(c, scratch.take<C>(kept_size<C>(std::min(size(c), a.most))));
    } else {
      small.push_back(c);
      largest = std::max(largest, size(c));
      const double boxes = std::min<double>(size(c), 2.0 * a.most);
      groups += boxes * (2 + boxes / (4 * kLanes<C>));
    }
  const int64_t threads = threads_for(kNanosecondsOfGroup * groups);
  // A thread takes several classes at a time, where they are many.
  const int64_t count = small.size(), share = std::max<int64_t>(1, count / (16 * threads));
  for_each_item(ceil_div(count, share), threads, [&] {
    return [&, scratch = std::make_shared<Scratch>(), room = static_cast<C*>(nullptr)](int64_t item) mutable {
      if (room == nullptr) room = scratch->template take<C>(kept_size<C>(largest));
      for (int64_t i = item * share; i < std::min(count, (item + 1) * share); ++i) do_class(small[i], room);
    };
  });
}

}  // namespace relops::RELOPS_ISA
