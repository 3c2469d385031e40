// relation_attention on the CPU: the forward pass. PackedKeys packs the keys of some images tile by tile. ForwardWorker
// processes a block of queries with all heads over the tiles of its image, with a running maximum as in flash
// attention.
#ifndef RELOPS_RELATION_ATTENTION_FORWARD
#define RELOPS_RELATION_ATTENTION_FORWARD

#include "common/cpu/simd.h"
#include "relation_attention/cpu_args.h"
#include "relation_attention/cpu_geometry.h"
#include "relation_attention/cpu_products.h"

namespace relops::RELOPS_ISA {

// A tile of keys in the layout that the products read.
template <class Compute>
struct KeyTile {
  BoxTable<Compute> boxes;
  Compute* columns;  // [M,D,width]
  Compute* values;   // [M,width,padded Dv]
};

// The packed keys of `images` images, beginning with image `first`, tile by tile.
template <class T>
struct PackedKeys {
  using Compute = ComputeType<T>;

  const RelationAttentionArgs<T>& a;
  const KeyIndex& key_index;
  int64_t tiles_per_image;
  int64_t width;        // keys per tile: kTile, or K rounded up to whole vectors if that is less
  int64_t value_width;  // padded Dv
  int64_t images, first = 0;
  Scratch scratch;
  std::vector<KeyTile<Compute>> tiles;

  PackedKeys(const RelationAttentionArgs<T>& a, const KeyIndex& key_index, int64_t threads)
      : a(a),
        key_index(key_index),
        tiles_per_image(ceil_div(a.K, kTile<Compute>)),
        width(std::min(kTile<Compute>, round_up(a.K, kLanes<Compute>))),
        value_width(round_up(a.Dv, kLanes<Compute>)) {
    const int64_t bytes = tiles_per_image * width * a.M * (a.D + value_width) * sizeof(Compute);
    images = std::clamp<int64_t>(threads * kPackedBytes / bytes, 1, a.N);
    for (int64_t i = 0; i < images * tiles_per_image; ++i)
      tiles.push_back({BoxTable<Compute>(width, scratch), scratch.allocate<Compute>(a.M * a.D * width),
                       scratch.allocate<Compute>(a.M * width * value_width)});
  }

  // Packs tile `item`.
  void operator()(int64_t item) {
    const int64_t n = first + item / tiles_per_image, from = item % tiles_per_image * kTile<Compute>;
    const int64_t count = std::min(kTile<Compute>, key_index.count(n) - from);
    if (count <= 0) return;
    const int32_t* const index = key_index.index(n) + from;
    KeyTile<Compute>& tile = tiles[item];
    tile.boxes.fill(a.waves, a.key_boxes + n * a.K * 4, index, count);
    for (int64_t m = 0; m < a.M; ++m) {
      pack_columns(a.key, n, m, index, count, a.D, tile.columns + m * a.D * width, width);
      pack_rows(a.value, n, m, index, count, a.Dv, Compute(1), tile.values + m * width * value_width, value_width);
    }
  }
};

// Processes items and owns the memory that a thread needs for them. An item is a block of queries with all heads.
template <class T>
struct ForwardWorker {
  using Compute = ComputeType<T>;
  static constexpr int64_t V = kLanes<Compute>, kKeys = kTile<Compute>;

  const RelationAttentionArgs<T>& a;
  const PackedKeys<T>& keys;
  int64_t blocks;              // number of blocks into which the queries of an image are divided
  int64_t max_queries;         // largest number of queries in a block
  int64_t width, value_width;  // padded D and Dv
  // The distance between queries in b. It is one vector more than the size of the M rows of a query, because rows of
  // different queries would otherwise compete for the same cache sets.
  int64_t b_stride;
  Scratch scratch;
  BoxTable<Compute> queries;
  Compute* query;        // [M,max_queries,padded D], multiplied by scale
  Compute* rotated;      // [max_queries,M,32]
  Compute* output;       // [M,max_queries,padded Dv]
  Compute* running_max;  // [M,max_queries]: the largest s so far, within kSlack
  Compute* total;        // [M,max_queries,lanes]: sums of the weights, relative to exp(running_max)
  Compute* terms;        // [32,kTile]
  Compute* b;            // [max_queries,M,kTile]
  Compute* p;            // [max_queries,kTile]

  ForwardWorker(const RelationAttentionArgs<T>& a, const PackedKeys<T>& keys, int64_t blocks)
      : a(a),
        keys(keys),
        blocks(blocks),
        max_queries(ceil_div(ceil_div(a.Q, kPanelRows), blocks) * kPanelRows),
        width(round_up(a.D, V)),
        value_width(round_up(a.Dv, V)),
        b_stride(a.M * kKeys + V),
        queries(max_queries, scratch),
        query(scratch.allocate<Compute>(a.M * max_queries * width)),
        rotated(scratch.allocate<Compute>(max_queries * a.M * kHalf)),
        output(scratch.allocate<Compute>(a.M * max_queries * value_width)),
        running_max(scratch.allocate<Compute>(a.M * max_queries)),
        total(scratch.allocate<Compute>(a.M * max_queries * V)),
        terms(scratch.allocate<Compute>(kHalf * kKeys)),
        b(scratch.allocate<Compute>(max_queries * b_stride)),
        p(scratch.allocate<Compute>(max_queries * kKeys)) {}

  void operator()(int64_t item) {
    const int64_t image = item / blocks, n = keys.first + image;
    // Blocks consist of full panels of rows, because a smaller panel takes nearly as long as a full one.
    const auto from = [&](int64_t block) { return block * ceil_div(a.Q, kPanelRows) / blocks * kPanelRows; };
    const int64_t first = from(item % blocks), count = std::min(from(item % blocks + 1), a.Q) - first;
    load_queries(n, first, count);
    for (int64_t i = 0; i * kKeys < keys.key_index.count(n); ++i)
      visit(count, keys.tiles[image * keys.tiles_per_image + i], std::min(kKeys, keys.key_index.count(n) - i * kKeys));
    store_queries(n, first, count);
  }

  void load_queries(int64_t n, int64_t first, int64_t count) {
    const int32_t* const index = keys.key_index.every_query() + first;
    queries.fill(a.waves, a.query_boxes + n * a.Q * 4, index, count);
    for (int64_t m = 0; m < a.M; ++m) {
      pack_rows(a.query, n, m, index, count, a.D, a.scale, query + m * max_queries * width, width);
      for (int64_t q = 0; q < count; ++q)
        rotate(a.weight + m * kEmbedding, queries.term_rows + q * kHalf, rotated + (q * a.M + m) * kHalf);
    }
    std::fill_n(output, a.M * max_queries * value_width, Compute(0));
    std::fill_n(running_max, a.M * max_queries, -std::numeric_limits<Compute>::infinity());
    std::fill_n(total, a.M * max_queries * V, Compute(0));
  }

  // Adds the contribution of a tile of `count` keys to the sums of a block of queries.
  void visit(int64_t block, const KeyTile<Compute>& tile, int64_t count) {
    const int64_t vectors = ceil_div(count, V);
    for (int64_t q = 0; q < block; ++q)
      geometry_of(a.waves, a.by_query, queries, q, tile.boxes, vectors, a.M, a.weight, rotated + q * a.M * kHalf, terms,
                  b + q * b_stride);
    for (int64_t m = 0; m < a.M; ++m) {
      const int64_t row = m * max_queries;
      multiply<Compute>({{query + row * width, width, 1}, tile.columns + m * a.D * keys.width, keys.width, a.D}, block,
                        vectors, p, kKeys);
      // The keys do not fit into the L2 cache, so part of the next head's keys is prefetched while each query is
      // processed.
      const int64_t columns = a.D * keys.width, values = keys.width * value_width;
      const int64_t lines =
          m + 1 < a.M ? ceil_div(std::max(columns, values) * int64_t{sizeof(Compute)}, 64 * block) : 0;
      for (int64_t q = 0; q < block; ++q) {
        prefetch_lines(tile.columns + (m + 1) * columns, columns, q * lines, lines);
        prefetch_lines(tile.values + (m + 1) * values, values, q * lines, lines);
        normalize(row + q, a.bias == nullptr ? 0 : a.bias[m], count, b + q * b_stride + m * kKeys, p + q * kKeys);
      }
      multiply<Compute>({{p, kKeys, 1}, tile.values + m * keys.width * value_width, value_width, count}, block,
                        value_width / V, output + row * value_width, value_width, true);
    }
  }

  // Converts p from the logits s of one query and head (`row`) and a tile of keys to weights relative to
  // exp(running_max). The running maximum is updated only if some s exceeds it by more than kSlack, so a weight may be
  // as large as exp(kSlack) times b.
  void normalize(int64_t row, Compute bias, int64_t count, const Compute* b, Compute* p) {
    constexpr Compute kSlack = 16;
    mask_last(p, count);
    Vec<Compute> maxima = load(p);
    for (int64_t k = V; k < count; k += V) maxima = maximum(load(p + k), maxima);
    const Compute tile_max = fold<Compute>(maxima, [](Vec<Compute> x, Vec<Compute> y) { return maximum(x, y); });
    Compute& running_max = this->running_max[row];
    Vec<Compute> totals = load(total + row * V);
    if (tile_max > running_max + kSlack) {
      const Compute decay = std::exp(running_max - tile_max);
      totals *= decay;
      Compute* const sums = output + row * value_width;
      for (int64_t d = 0; d < value_width; d += V) store(sums + d, load(sums + d) * decay);
      running_max = tile_max;
    }
    for_batches<Compute, kAtOnce>(count, [&](int64_t k, auto vectors) __attribute__((always_inline)) {
      constexpr int N = vectors;
      const auto e = exponential(batch<Compute, N>([&](int i) { return load(p + k + i * V) - running_max; }));
      const auto weight =
          e * batch<Compute, N>([&](int i) { return above_floor<Compute>(load(b + k + i * V) + bias); });
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        store(p + k + i * V, weight.v[i]);
        totals += weight.v[i];
      }
    });
    store(total + row * V, totals);
  }

  // Writes output and logsumexp, or only delta if it is requested.
  void store_queries(int64_t n, int64_t first, int64_t count) {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t m = 0; m < a.M; ++m) {
        const int64_t row = m * max_queries + q, to = (n * a.Q + first + q) * a.M + m;
        const bool no_keys = keys.key_index.count(n) == 0;
        const Compute weight = sum<Compute>(load(total + row * V)), scale = no_keys ? 0 : 1 / weight;
        Compute* const sums = output + row * value_width;
        for (int64_t d = 0; d < value_width; d += V) store(sums + d, load(sums + d) * scale);
        if (a.delta != nullptr) {
          a.delta[to] = dot<Compute>(sums, a.grad_output.at(n, first + q, m), a.Dv);
          continue;
        }
        convert(sums, a.output + to * a.Dv, a.Dv);
        a.logsumexp[to] = no_keys ? std::numeric_limits<Compute>::infinity() : running_max[row] + std::log(weight);
      }
  }
};

}  // namespace relops::RELOPS_ISA

#endif
