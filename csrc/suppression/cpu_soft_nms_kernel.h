// soft_nms on the CPU: suppression by decay within a class, compiled for each instruction set.
//
// Each step keeps the entry with the highest score and makes one pass over all other entries. The pass computes their
// IoU with the kept entry, decays their scores, and finds the highest score for the next step. An entry is removed if
// its score is no longer above the threshold. When the number of steps since the last compaction reaches a quarter of
// the number of stored entries, the remaining entries are compacted. The kernel is bound by arithmetic. A vector of
// entries takes about 15 operations, plus an exponential if one of the entries intersects the kept entry.

#include "common/cpu/simd.h"
#include "suppression/cpu_soft_nms_args.h"

namespace relops::RELOPS_ISA {

// The entries of a class in the order of their indices, stored as rows of `size` values.
template <class Compute>
struct SoftRows {
  static constexpr int64_t V = kLanes<Compute>;
  enum Row { kX1, kY1, kX2, kY2, kArea, kScore, kRows };

  Compute* row(int r) const { return values + r * size; }
  Box<Vec<Compute>> boxes(int64_t i) const {
    return {load(row(kX1) + i), load(row(kY1) + i), load(row(kX2) + i), load(row(kY2) + i)};
  }
  Box<Vec<Compute>> box(int64_t i) const {
    return {broadcast(row(kX1)[i]), broadcast(row(kY1)[i]), broadcast(row(kX2)[i]), broadcast(row(kY2)[i])};
  }

  // Returns the number of values that are stored for n entries.
  static int64_t values_of(int64_t n) { return kRows * round_up(n, V); }

  Compute* values;
  Int<Compute>* index;
  int64_t size;
};

// Finds the entry with the highest score. Ties go to the first entry.
template <class Compute>
struct Best {
  Vec<Compute> score{};
  VecInt<Compute> position{};

  void update(Vec<Compute> scores, VecInt<Compute> positions) {
    const VecInt<Compute> better = scores > score;
    score = better ? scores : score;
    position = better ? positions : position;
  }
  // Returns the position of the best entry and sets top to its score.
  int64_t reduce(Compute& top) const {
    top = 0;
    int64_t best = 0;
    for (int64_t j = 0; j < kLanes<Compute>; ++j)
      if (score[j] > top || (score[j] == top && position[j] < best)) {
        top = score[j];
        best = position[j];
      }
    return best;
  }
};

// Applies Soft-NMS to the n entries of a class, whose `indices` ascend. Sets decayed[index] of each kept entry to the
// final score of the entry.
template <class Compute>
void decay_class(const SoftNmsArgs<Compute>& a, const uint32_t* indices, int64_t n, const Compute* boxes,
                 const Compute* scores, Compute* decayed, SoftRows<Compute> rows) {
  constexpr int64_t V = kLanes<Compute>;
  rows.size = round_up(n, V);
  const VecInt<Compute> lane_indices = lanes<Compute>([](Int<Compute> j) { return j; });
  Best<Compute> best;
  for (int64_t i = 0; i < rows.size; ++i) {
    const int64_t k = indices[std::min(i, n - 1)];
    const Box<Compute> box{boxes[4 * k], boxes[4 * k + 1], boxes[4 * k + 2], boxes[4 * k + 3]};
    const Compute values[SoftRows<Compute>::kRows] = {box.x1, box.y1, box.x2, box.y2, area(box), i < n ? scores[k] : 0};
    for (int r = 0; r < SoftRows<Compute>::kRows; ++r) rows.row(r)[i] = values[r];
    rows.index[i] = static_cast<Int<Compute>>(k);
  }
  Compute* score = rows.row(SoftRows<Compute>::kScore);
  const Compute* areas = rows.row(SoftRows<Compute>::kArea);
  for (int64_t i = 0; i < rows.size; i += V) best.update(load(score + i), lane_indices + static_cast<Int<Compute>>(i));

  int64_t used = rows.size;
  for (int64_t step = 1, moved = 0;; ++step) {
    Compute top;
    const int64_t position = best.reduce(top);
    if (!(top > a.decay.score_threshold)) return;
    decayed[rows.index[position]] = top;
    score[position] = 0;
    const Box<Vec<Compute>> kept = rows.box(position);
    const Vec<Compute> kept_area = broadcast(areas[position]);

    if (4 * (step - moved) >= used) {
      // Every score is now either above the threshold or 0.
      int64_t remaining = 0;
      for (int64_t i = 0; i < used; ++i) {
        if (score[i] == 0) continue;
        for (int r = 0; r < SoftRows<Compute>::kRows; ++r) rows.row(r)[remaining] = rows.row(r)[i];
        rows.index[remaining++] = rows.index[i];
      }
      const int64_t before = used;
      used = round_up(remaining, V);
      for (int64_t i = remaining; i < std::min(used, before); ++i) score[i] = 0;
      moved = step;
    }

    best = {};
    for (int64_t i = 0; i < used; i += V) {
      Vec<Compute> scores = load(score + i);
      const Vec<Compute> common = intersection(kept, rows.boxes(i));
      if (greater_bits(common, Vec<Compute>{})) {
        const Vec<Compute> factor = a.decay.template factor<VecInt<Compute>>(iou(kept_area, load(areas + i), common));
        // The factor is 1 in lanes whose entry does not intersect the kept entry.
        scores = product(scores, factor);
        scores = scores > a.decay.score_threshold ? scores : Vec<Compute>{};
        store(score + i, scores);
      }
      best.update(scores, lane_indices + static_cast<Int<Compute>>(i));
    }
  }
}

template <class Compute>
void decay_classes(const SoftNmsArgs<Compute>& a) {
  int64_t largest = 0;
  double work = 0;  // nanoseconds, assuming that all entries are kept
  for (int64_t c = 0; c < a.num_classes; ++c) {
    const int64_t n = a.classes[c].end - a.classes[c].begin;
    largest = std::max(largest, n);
    work += n * (100.0 + 5.0 * n / kLanes<Compute>);
  }
  const int64_t threads = threads_for(work);
  const int64_t classes_per_item = std::max<int64_t>(1, a.num_classes / (16 * threads));
  for_each_item(ceil_div(a.num_classes, classes_per_item), threads, [&] {
    return [&, scratch = std::make_shared<Scratch>(), rows = SoftRows<Compute>{}](int64_t item) mutable {
      if (rows.values == nullptr) {
        rows.values = scratch->template allocate<Compute>(SoftRows<Compute>::values_of(largest));
        rows.index = scratch->template allocate<Int<Compute>>(round_up(largest, kLanes<Compute>));
      }
      for (int64_t c = item * classes_per_item; c < std::min(a.num_classes, (item + 1) * classes_per_item); ++c) {
        const auto& [image, begin, end] = a.classes[c];
        decay_class(a, a.indices + begin, end - begin, a.boxes + 4 * image * a.K, a.scores + image * a.K,
                    a.decayed + image * a.K, rows);
      }
    };
  });
}

}  // namespace relops::RELOPS_ISA
