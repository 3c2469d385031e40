// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on the CPU: conversion of boxes to
// taps, division of work among threads, and registration.
//
// First, the boxes are sorted by map (one image on one level) and then from top to bottom, and each thread converts a
// range of boxes to taps (taps.h). Then the kernels of cpu_kernel.h process work items. A work item is some channels of
// a map, a band of rows of a map, or one region. A thread that has finished an item gets the next one. No two items
// write the same element, so results do not depend on the number of threads.
//
// Two things limit the speed of the kernels: loading cache lines from L2 and L3, because regions overlap and read a map
// many times, and page faults when large results are first written. Huge pages are requested for such results to reduce
// the page faults.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/cpu/work.h"
#include "regions/cpu_args.h"
#include "regions/ops.h"

#define RELOPS_KERNEL "regions/cpu_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

// The taps of a box on one axis, in lists that grow while the taps are found.
template <class Compute>
struct TapList {
  std::vector<int32_t> begin, pixel;
  std::vector<Compute> weight, slope_first, slope_last;

  void find(const RegionAxis& axis) {
    begin.assign(1, 0);
    for (auto* list : {&weight, &slope_first, &slope_last}) list->clear();
    pixel.clear();
    for (int bin = 0; bin < axis.bins; ++bin) {
      for_each_tap<Compute>(axis, bin, 0, axis.size - 1, [&](int index, double w, double first, double last) {
        // Positions ascend, so a pixel that the bin has already read is one of the last two in the list.
        const int32_t size = static_cast<int32_t>(pixel.size());
        for (int32_t i = size - 1; i >= begin.back() && i >= size - 2; --i)
          if (pixel[i] == index) {
            weight[i] += w;
            slope_first[i] += first;
            slope_last[i] += last;
            return;
          }
        pixel.push_back(index);
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

  // Copies the lists to memory at `to` and advances `to` past them.
  AxisTaps<Compute> copy_to(std::byte*& to, bool slopes) const {
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
    for (size_t b = 0; b + 1 < begin.size(); ++b) taps.max_taps = std::max(taps.max_taps, begin[b + 1] - begin[b]);
    return taps;
  }
};

// The boxes of a problem, converted to regions, and the arguments of the kernels.
template <class T>
struct RegionWork {
  using Compute = ComputeType<T>;

  RegionWork(const RegionProblem& p, bool slopes) : p(p), boxes(static_cast<const Compute*>(p.boxes.const_data_ptr())) {
    for (size_t l = 0; l < p.levels.size(); ++l) levels.push_back(p.level<T>(l));
    order_regions();
    find_taps(slopes);
    args.N = p.N;
    args.channels = p.C;
    args.out_channels = p.out_channels();
    args.K = p.K;
    args.PH = p.PH;
    args.PW = p.PW;
    args.L = levels.size();
    args.position_sensitive = p.spec.position_sensitive;
    args.levels = levels.data();
    args.regions = regions.data();
    args.map_begin = map_begin.data();
    for (const Region<Compute>& region : regions) {
      args.max_columns = std::max<int64_t>(args.max_columns, region.x.high - region.x.low);
      args.max_taps_x = std::max<int64_t>(args.max_taps_x, region.x.max_taps);
      args.max_taps_y = std::max<int64_t>(args.max_taps_y, region.y.max_taps);
      pixels += static_cast<double>(region.y.begin[p.PH]) * region.x.begin[p.PW];
    }
  }

  // Estimates the time of a kernel on one thread. The arguments are the times per vector of pixels of a plane (NCHW),
  // per vector of channels of a pixel (channels_last), and per single value (position-sensitive ops).
  double nanoseconds(double per_plane_vector, double per_pixel_vector, double per_number) const {
    if (args.position_sensitive) return per_number * pixels * args.out_channels;
    if (!p.channels_last) return per_plane_vector * vectors_of<Compute>(pixels * p.C) + 0.5 * p.K * p.PH * p.PW * p.C;
    const double vectors = vectors_of<Compute>(p.C);
    return pixels * (1 + per_pixel_vector * (vectors < 1 ? p.C : vectors));
  }

  const RegionProblem& p;
  std::vector<RegionLevel<T>> levels;
  RegionArgs<T> args{};
  double pixels = 0;  // the total number of pixels that the bins read from one channel

 private:
  // Sorts the regions by map and then from top to bottom, so regions that read the same rows are neighbors.
  void order_regions() {
    const int64_t L = levels.size();
    level_of.resize(p.K);
    map_begin.assign(L * p.N + 1, 0);
    for (int64_t k = 0; k < p.K; ++k) {
      const Compute* box = boxes + 5 * k;
      const Compute image = region_image(box[0]);
      if (!(image >= 0 && image < p.N))
        throw std::out_of_range(std::string(p.spec.op) + ": boxes must have a batch index in [0,N) = [0," +
                                std::to_string(p.N) + "), got " + std::to_string(box[0]) + " in row " +
                                std::to_string(k));
      if (L > 1 && is_finite(box))
        level_of[k] = region_level(box[1], box[2], box[3], box[4], static_cast<Compute>(p.spec.canonical_box_size),
                                   p.spec.canonical_level, p.finest(), static_cast<int>(L));
      ++map_begin[map_of(k) + 1];
    }
    for (size_t m = 1; m < map_begin.size(); ++m) map_begin[m] += map_begin[m - 1];
    std::vector<int64_t> next(map_begin.begin(), map_begin.end() - 1), order(p.K);
    const auto top = [&](int64_t k) { return is_finite(boxes + 5 * k) ? boxes[5 * k + 2] : Compute(0); };
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return top(i) < top(j); });
    slot_of.resize(p.K);
    for (int64_t k : order) slot_of[k] = next[map_of(k)]++;
  }

  void find_taps(bool slopes) {
    double steps = 0;
    for (int64_t k = 0; k < p.K; ++k) steps += steps_of(k);
    regions.resize(p.K);
    memory.resize(p.K);
    for_each_range(p.K, threads_for(10 * steps), [&](int64_t begin, int64_t end) {
      TapList<Compute> y, x;
      for (int64_t k = begin; k < end; ++k) {
        const Compute* box = boxes + 5 * k;
        const RegionLevel<T>& level = levels[level_of[k]];
        if (is_finite(box)) {
          y.find(region_axis(p.spec, box[2], box[4], level.scale, level.H, static_cast<int>(p.PH)));
          x.find(region_axis(p.spec, box[1], box[3], level.scale, level.W, static_cast<int>(p.PW)));
        } else {
          y.find_none(p.PH);
          x.find_none(p.PW);
        }
        auto& bytes = memory[slot_of[k]];
        bytes.reset(new std::byte[y.bytes(slopes) + x.bytes(slopes) + sizeof(Compute)]);
        std::byte* to = bytes.get();
        Region<Compute>& region = regions[slot_of[k]];
        region.k = k;
        region.map = map_of(k);
        region.y = y.copy_to(to, slopes);
        to = bytes.get() + round_up<int64_t>(to - bytes.get(), sizeof(Compute));
        region.x = x.copy_to(to, slopes);
      }
    });
  }

  static bool is_finite(const Compute* box) {
    return std::isfinite(box[1]) && std::isfinite(box[2]) && std::isfinite(box[3]) && std::isfinite(box[4]);
  }
  int64_t map_of(int64_t k) const { return level_of[k] * p.N + static_cast<int64_t>(region_image(boxes[5 * k])); }
  // Returns an upper bound for the number of samples or pixels of a box, summed over both axes.
  double steps_of(int64_t k) const {
    if (p.spec.sampling_ratio > 0) return static_cast<double>(p.spec.sampling_ratio) * (p.PH + p.PW);
    const Compute* box = boxes + 5 * k;
    const RegionLevel<T>& level = levels[level_of[k]];
    // If the size of the box is NaN, std::min returns the size of the map.
    const double width = std::min<double>(level.W, std::abs(box[3] - box[1]) * level.scale);
    const double height = std::min<double>(level.H, std::abs(box[4] - box[2]) * level.scale);
    return p.PH + p.PW + width + height;
  }

  const Compute* boxes;                  // [K,5]
  std::vector<int64_t> level_of;         // [K]: level of each box
  std::vector<int64_t> slot_of;          // [K]: index of each box in regions
  std::vector<Region<Compute>> regions;  // [K]
  std::vector<int64_t> map_begin;
  std::vector<std::unique_ptr<std::byte[]>> memory;  // [K]: memory for the taps of each region
};

Tensor forward(const RegionProblem& p) {
  Tensor output = p.new_empty({p.K, p.out_channels(), p.PH, p.PW});
  dispatch_features(p.spec.op, p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    RegionWork<T> work(p, false);
    if (output.numel() == 0) return;
    work.args.output = static_cast<T*>(output.mutable_data_ptr());
    use_huge_pages(work.args.output, output.numel() * sizeof(T));
    if (p.spec.kind == RegionKind::kMaximum) {
      RELOPS_CALL_ISA(region_maximum_forward, work.args, p.channels_last, threads_for(work.nanoseconds(7, 1.5, 0)));
    } else {
      RELOPS_CALL_ISA(region_mean_forward, work.args, p.channels_last, threads_for(work.nanoseconds(3, 1.5, 2)));
    }
  });
  return output;
}

// Each element of a gradient is summed in a fixed order, whatever the number of threads, so the result is always
// deterministic.
void backward(const RegionProblem& p, const Tensor& grad_output, const Tensor* output, const Tensor* grad_boxes) {
  dispatch_features(p.spec.op, p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    using Compute = ComputeType<T>;
    RegionWork<T> work(p, grad_boxes != nullptr);
    auto& args = work.args;
    args.grad_output = static_cast<const T*>(grad_output.const_data_ptr());
    double filled = 0;  // the number of cache lines that the sums for the input gradients fill
    for (const RegionLevel<T>& level : work.levels)
      if (level.grad_input != nullptr) {
        const int64_t size = p.N * p.C * level.H * level.W;
        use_huge_pages(level.grad_input, size * sizeof(T));
        filled += size * sizeof(Compute) / 64.0;
      }
    if (p.spec.kind == RegionKind::kMaximum) {
      check_pixels_fit_int(p);
      args.pooled = static_cast<const T*>(output->const_data_ptr());
      const double searches = p.channels_last ? 0 : 14.0 * grad_output.numel();
      const double nanoseconds = 2 * filled + searches + work.nanoseconds(3, 8, 0);
      RELOPS_CALL_ISA(region_maximum_backward, args, p.channels_last, threads_for(nanoseconds));
      return;
    }
    if (filled > 0) {
      const double nanoseconds = 2 * filled + work.nanoseconds(3, 3.5, 2);
      RELOPS_CALL_ISA(region_mean_backward, args, p.channels_last, threads_for(nanoseconds));
    }
    if (grad_boxes == nullptr) return;
    Compute* sums = static_cast<Compute*>(grad_boxes->mutable_data_ptr());
    std::fill_n(sums, 5 * p.K, Compute(0));
    if (grad_output.numel() == 0) return;
    // For channels_last, one thread sums all channels of a region, so there is only one block of channels.
    const int64_t blocks = p.channels_last ? 1 : ceil_div(p.C, kChannelBlock);
    const Tensor partials = torch::stable::new_empty(p.boxes, {blocks, p.K, 4});
    args.box_partials = static_cast<Compute*>(partials.mutable_data_ptr());
    RELOPS_CALL_ISA(region_mean_backward_boxes, args, p.channels_last, threads_for(work.nanoseconds(14, 3, 4)));
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t k = 0; k < p.K; ++k)
        for (int i = 0; i < 4; ++i) sums[5 * k + 1 + i] += args.box_partials[(block * p.K + k) * 4 + i];
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { register_regions<&forward, &backward>(m); }

}  // namespace relops
