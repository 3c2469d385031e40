// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on the CPU: the kernels that
// cpu.cpp calls. foreach_isa.h compiles them once per instruction set.
//
// A bin reads a small grid of rows and columns of pixels. The weight of a pixel is the product of a factor for its row
// and a factor for its column. A row or column with its factor is called a tap (taps.h).
//
//                                NCHW                            channels_last
// forward
//   means                        mean_forward_planes             forward_pixels<T, false>
//     if by_slices()             forward_slices<T, false>          "
//   position-sensitive means     mean_forward_planes_sensitive     "
//   roi_pool                     maximum_forward_planes          forward_pixels<T, true>
//     if by_slices()             forward_slices<T, true>           "
// gradient of the input
//   means                        mean_backward_bands<T, false>   mean_backward_bands<T, true>
//   position-sensitive means     mean_backward_planes_sensitive  mean_backward_bands_sensitive
//   roi_pool                     maximum_backward_planes         maximum_backward_pixels
// gradient of the boxes
//   means                        mean_backward_boxes_planes      mean_backward_boxes_pixels
//   position-sensitive means     mean_backward_boxes_planes_     mean_backward_boxes_pixels
//                                  sensitive
//
// "means" are roi_align, prroi_pool and multi_scale_roi_align. "position-sensitive means" are ps_roi_align and
// ps_roi_pool; ps_roi_pool has no gradient of the boxes. The name of a kernel contains the kind of its work items,
// which also tells where the kernel is defined: planes of NCHW maps (cpu_planes.h), slices (cpu_slices.h), pixels of
// channels_last maps (cpu_pixels.h), bands (cpu_bands.h). There are two exceptions: kernels that are only for roi_pool
// are in cpu_maximum.h, and kernels for the gradient of the boxes are in cpu_box_gradients.h.

#include "common/cpu/simd.h"
#include "regions/cpu_args.h"
#include "regions/cpu_bands.h"
#include "regions/cpu_box_gradients.h"
#include "regions/cpu_maximum.h"
#include "regions/cpu_pixels.h"
#include "regions/cpu_planes.h"
#include "regions/cpu_slices.h"

namespace relops::RELOPS_ISA {

template <class T>
void region_mean_forward(const RegionArgs<T>& a, bool channels_last, int64_t threads) {
  if (channels_last)
    forward_pixels<T, false>(a, threads);
  else if (by_slices(a, threads))
    forward_slices<T, false>(a, threads);
  else if (a.position_sensitive)
    mean_forward_planes_sensitive(a, threads);
  else
    mean_forward_planes(a, threads);
}

template <class T>
void region_mean_backward(const RegionArgs<T>& a, bool channels_last, int64_t threads) {
  if (a.position_sensitive)
    channels_last ? mean_backward_bands_sensitive(a, threads) : mean_backward_planes_sensitive(a, threads);
  else
    channels_last ? mean_backward_bands<T, true>(a, threads) : mean_backward_bands<T, false>(a, threads);
}

template <class T>
void region_mean_backward_boxes(const RegionArgs<T>& a, bool channels_last, int64_t threads) {
  if (channels_last)
    mean_backward_boxes_pixels(a, threads);
  else if (a.position_sensitive)
    mean_backward_boxes_planes_sensitive(a, threads);
  else if (a.PW <= kLanes<ComputeType<T>>)
    mean_backward_boxes_planes<T, true>(a, threads);
  else
    mean_backward_boxes_planes<T, false>(a, threads);
}

template <class T>
void region_maximum_forward(const RegionArgs<T>& a, bool channels_last, int64_t threads) {
  if (channels_last)
    forward_pixels<T, true>(a, threads);
  else if (by_slices(a, threads))
    forward_slices<T, true>(a, threads);
  else
    maximum_forward_planes(a, threads);
}

template <class T>
void region_maximum_backward(const RegionArgs<T>& a, bool channels_last, int64_t threads) {
  if (channels_last)
    maximum_backward_pixels(a, threads);
  else
    maximum_backward_planes(a, threads);
}

}  // namespace relops::RELOPS_ISA

// These headers are compiled again for the next instruction set.
#undef RELOPS_REGIONS_MAPS
#undef RELOPS_REGIONS_TILES
#undef RELOPS_REGIONS_PLANES
#undef RELOPS_REGIONS_SLICES
#undef RELOPS_REGIONS_MAXIMUM
#undef RELOPS_REGIONS_PIXELS
#undef RELOPS_REGIONS_BANDS
#undef RELOPS_REGIONS_BOX_GRADIENTS
