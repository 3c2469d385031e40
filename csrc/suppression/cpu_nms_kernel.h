// nms, batched_nms and nms_padded on the CPU: greedy suppression within a class, for each instruction set.
//
// Boxes come by descending score, in blocks. A block is first compared with all boxes kept before it, by several
// threads where that is worth it; what is left then goes through the greedy order, compared with what the block itself
// has kept so far. The kept boxes lie in groups of a vector's width. Comparing costs 9 operations a group and no
// division: with the shares of nms.h it is a filter, and what passes is decided by the one expression of boxes.h. Bound
// by arithmetic; boxes are compared tile by tile, so that the 20 bytes of each come from L1.

#include "common/cpu/simd.h"
#include "suppression/cpu_nms_args.h"

namespace relops::RELOPS_ISA {

template <class Compute>
class KeptBoxes {
 public:
  KeptBoxes(Compute* groups, Compute threshold) : groups_(groups), threshold_(threshold) {}

  int64_t groups() const { return ceil_div(count_, V); }
  int64_t count() const { return count_; }

  void add(const SharedBox<Compute>& b) {
    Compute* group = groups_ + count_ / V * kRows * V;
    const int64_t lane = count_++ % V;
    if (lane == 0)  // nothing intersects the lanes that are still free
      for (int64_t j = 0; j < kRows * V; ++j) group[j] = j / V < 2 ? std::numeric_limits<Compute>::max() : 0;
    const Compute rows[kRows] = {b.box.x1, b.box.y1, b.box.x2, b.box.y2, b.share};
    for (int64_t row = 0; row < kRows; ++row) group[row * V + lane] = rows[row];
  }

  // Whether a box of the groups [begin, end) suppresses this one.
  bool suppress(const SharedBox<Compute>& b, int64_t begin, int64_t end) const {
    const Vec<Compute> x1 = broadcast(b.box.x1), y1 = broadcast(b.box.y1), x2 = broadcast(b.box.x2),
                       y2 = broadcast(b.box.y2), share = broadcast(b.share);
    for (int64_t g = begin; g < end; ++g) {
      const Compute* group = groups_ + g * kRows * V;
      const Vec<Compute> width = minimum(x2, load(group + 2 * V)) - maximum(x1, load(group));
      const Vec<Compute> height = minimum(y2, load(group + 3 * V)) - maximum(y1, load(group + V));
      // Where both are negative the first is taken as 0.
      unsigned lanes = greater_bits(maximum(width, Vec<Compute>{}) * height, share + load(group + 4 * V));
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

constexpr double kNanosecondsOfGroup = 2.5;  // of kept boxes, compared with a box

// Room for n kept boxes, in values.
template <class Compute>
constexpr int64_t kept_size(int64_t n) {
  return round_up(n, kLanes<Compute>) * KeptBoxes<Compute>::kRows;
}

// Marks those of the n boxes of a class that are kept, most at most. kept[i] is 0 at first.
template <class Compute>
void suppress_class(const SharedBox<Compute>* boxes, int64_t n, Compute threshold, int64_t most, uint8_t* kept,
                    Compute* room) {
  constexpr int64_t kBlock = 512, kTile = 32;  // boxes; groups, which fit in L1
  KeptBoxes<Compute> before(room, threshold);
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

template <class Compute>
void suppress_classes(const NmsArgs<Compute>& a) {
  // Large classes one by one, with all threads; the others side by side.
  constexpr int64_t kLarge = 4096;
  int64_t largest = 0;
  double groups = 0;  // compared with small ones, if half of the boxes are kept
  std::vector<int64_t> small;
  const auto size = [&](int64_t c) { return a.classes[c].end - a.classes[c].begin; };
  const auto do_class = [&](int64_t c, Compute* room) {
    const int64_t begin = a.classes[c].begin;
    suppress_class(a.boxes + begin, size(c), a.threshold, a.most, a.kept + begin, room);
  };
  for (int64_t c = 0; c < a.num_classes; ++c)
    if (size(c) > kLarge) {
      Scratch scratch;
      do_class(c, scratch.allocate<Compute>(kept_size<Compute>(std::min(size(c), a.most))));
    } else {
      small.push_back(c);
      largest = std::max(largest, size(c));
      const double boxes = std::min<double>(size(c), 2.0 * a.most);
      groups += boxes * (2 + boxes / (4 * kLanes<Compute>));
    }
  const int64_t threads = threads_for(kNanosecondsOfGroup * groups);
  // A thread takes several classes at a time, where they are many.
  const int64_t count = small.size(), share = std::max<int64_t>(1, count / (16 * threads));
  for_each_item(ceil_div(count, share), threads, [&] {
    return [&, scratch = std::make_shared<Scratch>(), room = static_cast<Compute*>(nullptr)](int64_t item) mutable {
      if (room == nullptr) room = scratch->template allocate<Compute>(kept_size<Compute>(largest));
      for (int64_t i = item * share; i < std::min(count, (item + 1) * share); ++i) do_class(small[i], room);
    };
  });
}

}  // namespace relops::RELOPS_ISA
