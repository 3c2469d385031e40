#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cpu/work.h"
#include "regions/problem.h"

namespace relops {

// The taps of the bins of one region on one axis: those of bin b are [begin[b], begin[b + 1]), their pixels ascending.
template <class Compute>
struct AxisTaps {
  const int32_t* begin;
  const int32_t* pixel;
  const Compute* weight;
  const Compute *slope_first, *slope_last;  // derivatives of the weight by the box's coordinates; null where not wanted
  int32_t low, high;                        // every pixel is in [low, high)
  int32_t most;                             // taps of the bin that has most
};

template <class Compute>
struct Region {
  int64_t k;    // which box
  int64_t map;  // which map it reads
  AxisTaps<Compute> y, x;
};

template <class T>
struct RegionMaps {  // of one level
  int64_t H, W;
  const T* input;
  T* grad_input;  // null: not wanted
};

// What the kernels are called with. A map is an image on one level, number level * N + image.
template <class T>
struct RegionArgs {
  using Compute = ComputeType<T>;

  int64_t N, channels, out_channels, K, PH, PW, L;
  bool position_sensitive;
  const RegionMaps<T>* levels;     // [L]
  const Region<Compute>* regions;  // [K], ordered by map
  const int64_t* map_begin;        // [L*N + 1]
  // The largest of the regions: columns read, taps of a bin.
  int64_t most_columns, most_taps_y, most_taps_x;

  T* output;             // [K,out_channels,PH,PW] in the layout of the input; forward only
  const T* grad_output;  // likewise
  const T* pooled;       // backward of the maximum: the output
  Compute* box_shares;   // [channel blocks,K,4]: each block's share of the gradient of the boxes
};

// Channels of one work item on NCHW maps. Fixed, because gradients of boxes are summed block by block.
constexpr int64_t kChannelBlock = 8;

}  // namespace relops

#define RELOPS_KERNEL "regions/cpu_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

// The taps of one axis while they are found.
template <class Compute>
struct TapList {
  std::vector<int32_t> begin, pixel;
  std::vector<Compute> weight, slope_first, slope_last;

  void find(const RegionAxis& axis) {
    begin.assign(1, 0);
    for (auto* list : {&weight, &slope_first, &slope_last}) list->clear();
    pixel.clear();
    for (int bin = 0; bin < axis.bins; ++bin) {
      for_each_tap<Compute>(axis, bin, 0, axis.size - 1, [&](int at, double w, double first, double last) {
        // Positions ascend, so a pixel that the bin has read already is one of its last two.
        const int32_t size = static_cast<int32_t>(pixel.size());
        for (int32_t i = size - 1; i >= begin.back() && i >= size - 2; --i)
          if (pixel[i] == at) {
            weight[i] += w;
            slope_first[i] += first;
            slope_last[i] += last;
            return;
          }
        pixel.push_back(at);
        weight.push_back(w);
        slope_first.push_back(first);
        slope_last.push_back(last);
      });
      begin.push_back(static_cast<int32_t>(pixel.size()));
    }
  }

  void find_none(int64_t bins) {
    begin.assign(bins + 1, 0);
    for (auto* list : {&weight, &slope_first, &slope_last}) list->clear();
    pixel.clear();
  }

  size_t bytes(bool slopes) const {
    const size_t n = pixel.size();
    return n * sizeof(Compute) * (slopes ? 3 : 1) + (n + begin.size()) * sizeof(int32_t);
  }

  // Copies the lists to memory at `to` and moves it past them.
  AxisTaps<Compute> place(std::byte*& to, bool slopes) const {
    const auto copy = [&to](const auto& list) {
      using X = typename std::decay_t<decltype(list)>::value_type;
      X* at = reinterpret_cast<X*>(to);
      std::copy(list.begin(), list.end(), at);
      to += list.size() * sizeof(X);
      return at;
    };
    AxisTaps<Compute> taps{};
    taps.weight = copy(weight);
    if (slopes) taps.slope_first = copy(slope_first);
    if (slopes) taps.slope_last = copy(slope_last);
    taps.begin = copy(begin);
    taps.pixel = copy(pixel);
    if (pixel.empty()) return taps;
    const auto [low, high] = std::minmax_element(pixel.begin(), pixel.end());
    taps.low = *low;
    taps.high = *high + 1;
    for (size_t b = 0; b + 1 < begin.size(); ++b) taps.most = std::max(taps.most, begin[b + 1] - begin[b]);
    return taps;
  }
};

// All regions of a problem, ordered by the map they read.
template <class Compute>
struct Regions {
  Regions(const RegionProblem& p, bool slopes) : list(p.K), map_begin(p.levels.size() * p.N + 1), memory(p.K) {
    const Compute* boxes = static_cast<const Compute*>(p.boxes.const_data_ptr());
    const int64_t L = p.levels.size();
    double steps = 0;
    std::vector<int32_t> levels(p.K);
    for (int64_t k = 0; k < p.K; ++k) {
      const Compute* box = boxes + 5 * k;
      const Compute image = region_image(box[0]);
      if (!(image >= 0 && image < p.N))
        throw std::out_of_range(std::string(p.spec.op) + ": boxes must have a batch index in [0,N) = [0," +
                                std::to_string(p.N) + "), got " + std::to_string(box[0]) + " in row " +
                                std::to_string(k));
      if (L > 1 && is_finite(box))
        levels[k] = region_level(box[1], box[2], box[3], box[4], static_cast<Compute>(p.spec.canonical_box_size),
                                 static_cast<int>(p.spec.canonical_level), p.finest(), static_cast<int>(L));
      ++map_begin[map_of(p, levels[k], box) + 1];
      steps += steps_of(p, p.levels[levels[k]], box);
    }
    for (size_t m = 1; m < map_begin.size(); ++m) map_begin[m] += map_begin[m - 1];
    std::vector<int64_t> next(map_begin.begin(), map_begin.end() - 1), place(p.K);
    // From top to bottom, so that regions that read the same rows follow one another.
    const auto top = [&](int64_t k) { return is_finite(boxes + 5 * k) ? boxes[5 * k + 2] : Compute(0); };
    std::vector<int64_t> order(p.K);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return top(i) < top(j); });
    for (int64_t k : order) place[k] = next[map_of(p, levels[k], boxes + 5 * k)]++;

    for_each_range(p.K, threads_for(10 * steps), [&](int64_t begin, int64_t end) {
      TapList<Compute> y, x;
      for (int64_t k = begin; k < end; ++k) {
        const Compute* box = boxes + 5 * k;
        const RegionLevel& level = p.levels[levels[k]];
        if (is_finite(box)) {
          y.find(
              region_axis(p.spec.rule, box[2], box[4], level.scale, static_cast<int>(level.H), static_cast<int>(p.PH)));
          x.find(
              region_axis(p.spec.rule, box[1], box[3], level.scale, static_cast<int>(level.W), static_cast<int>(p.PW)));
        } else {
          y.find_none(p.PH);
          x.find_none(p.PW);
        }
        const int64_t at = place[k];
        memory[at].reset(new std::byte[y.bytes(slopes) + x.bytes(slopes) + sizeof(Compute)]);
        std::byte* to = memory[at].get();
        list[at].k = k;
        list[at].map = map_of(p, levels[k], box);
        list[at].y = y.place(to, slopes);
        to = memory[at].get() + (to - memory[at].get() + sizeof(Compute) - 1) / sizeof(Compute) * sizeof(Compute);
        list[at].x = x.place(to, slopes);
      }
    });
  }

  static bool is_finite(const Compute* box) {
    return std::isfinite(box[1]) && std::isfinite(box[2]) && std::isfinite(box[3]) && std::isfinite(box[4]);
  }
  // Samples, or pixels, on both axes of a box, at most.
  static double steps_of(const RegionProblem& p, const RegionLevel& level, const Compute* box) {
    if (p.spec.rule.sampling_ratio > 0) return static_cast<double>(p.spec.rule.sampling_ratio) * (p.PH + p.PW);
    // NaN becomes the size of the map.
    const double width = std::min<double>(level.W, std::abs(box[3] - box[1]) * level.scale);
    const double height = std::min<double>(level.H, std::abs(box[4] - box[2]) * level.scale);
    return p.PH + p.PW + width + height;
  }
  static int64_t map_of(const RegionProblem& p, int64_t level, const Compute* box) {
    return level * p.N + static_cast<int64_t>(region_image(box[0]));
  }

  std::vector<Region<Compute>> list;
  std::vector<int64_t> map_begin;
  std::vector<std::unique_ptr<std::byte[]>> memory;
};

template <class T>
struct RegionWork {
  using Compute = ComputeType<T>;

  RegionWork(const RegionProblem& p, bool slopes) : regions(p, slopes) {
    for (size_t l = 0; l < p.levels.size(); ++l)
      maps.push_back({p.levels[l].H, p.levels[l].W,
                      p.inputs.empty() ? nullptr : static_cast<const T*>(p.inputs[l].const_data_ptr()), nullptr});
    args.N = p.N;
    args.channels = p.C;
    args.out_channels = p.out_channels();
    args.K = p.K;
    args.PH = p.PH;
    args.PW = p.PW;
    args.L = maps.size();
    args.position_sensitive = p.spec.position_sensitive;
    args.levels = maps.data();
    args.regions = regions.list.data();
    args.map_begin = regions.map_begin.data();
    for (const Region<Compute>& region : regions.list) {
      args.most_columns = std::max<int64_t>(args.most_columns, region.x.high - region.x.low);
      args.most_taps_x = std::max<int64_t>(args.most_taps_x, region.x.most);
      args.most_taps_y = std::max<int64_t>(args.most_taps_y, region.y.most);
      pixels += static_cast<double>(region.y.begin[p.PH]) * region.x.begin[p.PW];
    }
  }

  // The work of a kernel: what it does to a vector of pixels of a plane, to a vector of the channels of a pixel, or,
  // position-sensitive, to a single number.
  double nanoseconds(const RegionProblem& p, double of_plane, double of_pixel, double of_number) const {
    if (args.position_sensitive) return of_number * pixels * args.out_channels;
    if (!p.channels_last) return of_plane * vectors_of<Compute>(pixels * p.C) + 0.5 * p.K * p.PH * p.PW * p.C;
    const double vectors = vectors_of<Compute>(p.C);
    return pixels * (1 + of_pixel * (vectors < 1 ? p.C : vectors));
  }

  Regions<Compute> regions;
  std::vector<RegionMaps<T>> maps;
  RegionArgs<T> args{};
  double pixels = 0;  // that bins read of a channel
};

Tensor forward(const RegionProblem& p) {
  Tensor output = p.new_empty({p.K, p.out_channels(), p.PH, p.PW});
  dispatch_features(p.spec.op, p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    RegionWork<T> work(p, false);
    if (output.numel() == 0) return;
    work.args.output = static_cast<T*>(output.mutable_data_ptr());
    use_huge_pages(work.args.output, output.numel() * sizeof(T));
    if (p.spec.rule.kind == RegionKind::kMaximum) {
      RELOPS_CALL_ISA(region_maximum_forward, work.args, p.channels_last, threads_for(work.nanoseconds(p, 7, 1.5, 0)));
    } else {
      RELOPS_CALL_ISA(region_mean_forward, work.args, p.channels_last, threads_for(work.nanoseconds(p, 3, 1.5, 2)));
    }
  });
  return output;
}

// Every element of a gradient is summed by one thread in the order of the boxes: always deterministic.
void backward(const RegionProblem& p, const Tensor& grad_output, const Tensor* output, const RegionGrads& grads) {
  dispatch_features(p.spec.op, p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    using Compute = ComputeType<T>;
    RegionWork<T> work(p, grads.wanted_boxes());
    auto& args = work.args;
    args.grad_output = static_cast<const T*>(grad_output.const_data_ptr());
    double filled = 0;  // cache lines of sums of the gradients of inputs
    for (size_t l = 0; l < p.levels.size(); ++l)
      if (grads.wanted(l)) {
        work.maps[l].grad_input = static_cast<T*>(grads.inputs[l].mutable_data_ptr());
        use_huge_pages(work.maps[l].grad_input, grads.inputs[l].numel() * sizeof(T));
        filled += grads.inputs[l].numel() * sizeof(Compute) / 64.0;
      }
    if (p.spec.rule.kind == RegionKind::kMaximum) {
      check_pixels_fit_int(p);
      args.pooled = static_cast<const T*>(output->const_data_ptr());
      const double searches = p.channels_last ? 0 : 14.0 * grad_output.numel();
      const double nanoseconds = 2 * filled + searches + work.nanoseconds(p, 3, 8, 0);
      RELOPS_CALL_ISA(region_maximum_backward, args, p.channels_last, threads_for(nanoseconds));
      return;
    }
    if (filled > 0) {
      const double nanoseconds = 2 * filled + work.nanoseconds(p, 3, 3.5, 2);
      RELOPS_CALL_ISA(region_mean_backward, args, p.channels_last, threads_for(nanoseconds));
    }
    if (!grads.wanted_boxes()) return;
    Compute* grad_boxes = static_cast<Compute*>(grads.boxes.mutable_data_ptr());
    std::fill_n(grad_boxes, 5 * p.K, Compute(0));
    if (grad_output.numel() == 0) return;
    // channels_last: a thread sums all channels of a region.
    const int64_t blocks = p.channels_last ? 1 : ceil_div(p.C, kChannelBlock);
    const Tensor shares = torch::stable::new_empty(p.boxes, {blocks, p.K, 4});
    args.box_shares = static_cast<Compute*>(shares.mutable_data_ptr());
    RELOPS_CALL_ISA(region_mean_backward_boxes, args, p.channels_last, threads_for(work.nanoseconds(p, 14, 3, 4)));
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t k = 0; k < p.K; ++k)
        for (int i = 0; i < 4; ++i) grad_boxes[5 * k + 1 + i] += args.box_shares[(block * p.K + k) * 4 + i];
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { RELOPS_REGIONS_IMPL(m, RegionOps<&forward, &backward>); }

}  // namespace relops
