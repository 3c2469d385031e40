// deform_conv2d on the CPU: the entry points of its kernels. foreach_isa.h compiles this file once per instruction set.
//
// A tile has up to 128 output pixels, and its samples are computed for about 288 pairs of a channel and a tap at a
// time. A sample takes four multiply-adds with a load per vector of channels. The matrix products take most of the
// time: 2 Co multiply-adds per sample in the backward pass with all gradients, and Co in the forward pass.
//
// In the forward pass, threads process tiles. In the backward pass, the gradient of the input is a sum over all tiles,
// and that of the weight, too. Threads therefore process parts, which are ranges of channels, so that no two threads
// add to the same element. After each band of tiles, the partial gradients of offsets and masks are added up, so their
// size does not depend on the size of the map.

#include "common/cpu/products.h"
#include "common/cpu/simd.h"
#include "deform_conv/cpu_amx.h"
#include "deform_conv/cpu_args.h"
#include "deform_conv/cpu_backward.h"
#include "deform_conv/cpu_forward.h"
#include "deform_conv/cpu_samples.h"

namespace relops::RELOPS_ISA {

template <class T, class Product = VectorProduct<T>>
void deform_conv2d_forward(const DeformConvArgs<T>& a, const typename Product::Weight* weight, int64_t threads) {
  constexpr int64_t V = kLanes<ComputeType<T>>;
  int64_t max_pixels = kTilePixels;  // smaller tiles keep more threads busy
  while (max_pixels > 32 && DeformTiles(a, V, max_pixels).count < 2 * threads) max_pixels /= 2;
  const DeformTiles tiles(a, V, max_pixels);
  for_each_item(tiles.count, threads, [&] { return DeformForward<T, Product>(a, weight, tiles); });
}

#if RELOPS_HAS_AMX && RELOPS_VECTOR_BYTES == 64
inline void deform_conv2d_forward_amx(const DeformConvArgs<BFloat16>& a, int64_t threads) {
  Scratch scratch;
  BFloat16* const weight = scratch.allocate<BFloat16>(a.Co * a.group_inputs * a.taps);
  for_each_range(a.Co, threads, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) pack_amx_weight(a, o, weight);
  });
  deform_conv2d_forward<BFloat16, AmxProduct>(a, weight, threads);
}
#endif

template <class T>
void deform_conv2d_backward(const DeformConvArgs<T>& a, const ComputeType<T>* weight, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const DeformTiles tiles(a, V, kTilePixels);
  for (const TapRange& taps : tap_ranges(a.taps)) {
    const int64_t part_partials = taps.count * DeformBackward<T>::kKinds * kTileLine<Compute>;  // of a tile
    const int64_t max_partials = kPartialBytes / sizeof(Compute) / part_partials;
    for (const std::vector<DeformPart>& parts : deform_parts(a, part_channels(taps.count, V), max_partials)) {
      const int64_t count = static_cast<int64_t>(parts.size());
      const int64_t max_tiles = std::min<int64_t>(max_partials / count, tiles.count);
      Scratch scratch;
      Compute* const partials = scratch.allocate<Compute>(max_tiles * count * part_partials);
      for (int64_t first = 0; first < tiles.count; first += max_tiles) {
        const DeformBand band{first, std::min(max_tiles, tiles.count - first)};
        for_each_item(count, threads, [&] { return DeformBackward<T>(a, weight, tiles, parts, taps, band, partials); });
        if (a.needs_positions()) add_deform_partials<T>(a, tiles, parts, taps, band, partials, threads);
      }
    }
  }
}

}  // namespace relops::RELOPS_ISA

// Each instruction set compiles these headers again.
#undef RELOPS_PRODUCTS
#undef RELOPS_DEFORM_CONV_SAMPLES
#undef RELOPS_DEFORM_CONV_AMX
#undef RELOPS_DEFORM_CONV_FORWARD
#undef RELOPS_DEFORM_CONV_BACKWARD
