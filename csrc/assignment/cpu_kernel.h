// linear_sum_assignment on the CPU. foreach_isa.h compiles this file once per instruction set.
//
// A work item is one problem. First, the costs of the problem are packed: the smaller side becomes the rows, float64
// costs stay float64, and all other costs become float32. Rows are padded to whole vectors with infinite costs, which
// are never the minimum. Then the search scans rows, one vector of columns at a time, with five operations per vector.
// For typical sizes, rows are read from the L2 cache, and distances, prices and predecessors from the L1 cache.

#include "assignment/cpu_args.h"
#include "common/cpu/simd.h"

namespace relops::RELOPS_ISA {

namespace {

constexpr int64_t kWide = kLanes<double>;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Loads a vector of float64 from packed costs.
inline Vec<double> load_cost(const double* p) { return load(p); }
inline Vec<double> load_cost(const float* p) {
#if RELOPS_VECTOR_BYTES == 64  // GCC would convert the vector in two halves
  return (Vec<double>)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p));
#else
  typedef float Narrow __attribute__((vector_size(RELOPS_VECTOR_BYTES / 2)));
  Narrow narrow;
  __builtin_memcpy(&narrow, p, sizeof(narrow));
  return __builtin_convertvector(narrow, Vec<double>);
#endif
}

inline double lowest_lane(Vec<double> v) {
  return fold<double>(v, [](Vec<double> a, Vec<double> b) { return minimum(a, b); });
}

// Among the columns whose value is `target`, returns the first one without a row, or the first one if all of them have
// rows. value(j) returns a vector with the values of columns j, j + 1, ...
template <class F>
inline int pick_column(double target, int64_t columns, const int* row_of, F value) {
  const Vec<double> target_lanes = broadcast(target);
  int first = -1;
  for (int64_t j = 0; j < columns; j += 2 * kWide)
    for (unsigned bits = equal_bits(value(j), target_lanes) | equal_bits(value(j + kWide), target_lanes) << kWide;
         bits != 0; bits &= bits - 1) {
      const int column = static_cast<int>(j) + __builtin_ctz(bits);
      if (row_of[column] < 0) return column;
      if (first < 0) first = column;
    }
  return first;
}

// Implements the Search of assign_rows (problem.h). S is the type of the packed costs.
template <class S>
class Search {
 public:
  // Allocates arrays for problems with up to n rows and `columns` columns. `columns` must be a multiple of two vectors.
  Search(Scratch& scratch, int64_t n, int64_t columns)
      : price_(scratch.allocate<double>(columns)),
        distance_(scratch.allocate<double>(columns)),
        predecessor_(scratch.allocate<int64_t>(columns)),
        row_of_(scratch.allocate<int>(columns)),
        column_of_(scratch.allocate<int>(n)),
        settled_(scratch.allocate<Settled>(n)) {}

  void reset(const S* costs, int64_t n, int64_t columns) {
    costs_ = costs;
    columns_ = columns;
    std::fill_n(price_, columns, 0.0);
    std::fill_n(row_of_, columns, -1);
    std::fill_n(column_of_, n, -1);
  }

  const int* columns_of_rows() const { return column_of_; }
  void bids_done() {}
  bool has_column(int i) const { return column_of_[i] >= 0; }

  Lowest lowest(int i) const {
    const S* cost = costs_ + i * columns_;
    const double* price = price_;
    const int64_t columns = columns_;
    Vec<double> first = broadcast(kInfinity), second = first;
    VecInt<double> at = {}, first_at = {};
    for (int64_t j = 0; j < columns; j += kWide, at += kWide) {
      const Vec<double> x = load_cost(cost + j) - load(price + j);
      const VecInt<double> lower = x < first;
      second = minimum(second, lower ? first : x);
      first = lower ? x : first;
      first_at = lower ? at : first_at;
    }
    const double lowest = lowest_lane(first);
    const int lane = __builtin_ctz(equal_bits(first, broadcast(lowest)));
    int column = static_cast<int>(first_at[lane]) + lane;
    // The second lowest value of this lane replaces the lowest, so the next minimum is the second lowest of the row.
    first[lane] = second[lane];
    const double next = lowest_lane(first);
    if (next == lowest)
      column = pick_column(lowest, columns, row_of_, [=](int64_t j) { return load_cost(cost + j) - load(price + j); });
    return {lowest, next, column, row_of_[column]};
  }

  void assign(int i, const Lowest& to) {
    price_[to.column] -= to.second - to.first;
    if (to.row >= 0) column_of_[to.row] = -1;
    row_of_[to.column] = i;
    column_of_[i] = to.column;
  }

  Nearest start(int i) {
    const S* cost = costs_ + i * columns_;
    const double* price = price_;
    double* distance = distance_;
    int64_t* predecessor = predecessor_;
    const int64_t columns = columns_;
    settled_count_ = 0;
    Vec<double> nearest = broadcast(kInfinity);
    for (int64_t j = 0; j < columns; j += kWide) {
      const Vec<double> x = load_cost(cost + j) - load(price + j);
      store(distance + j, x);
      store_int<double>(predecessor + j, broadcast_int<double>(i));
      nearest = minimum(x, nearest);
    }
    return pick(nearest);
  }

  // A settled column has the price -inf and the distance inf until the search ends, so no row can lower this distance.
  Nearest extend(const Nearest& at) {
    const S* cost = costs_ + at.row * columns_;
    const double* price = price_;
    double* distance = distance_;
    int64_t* predecessor = predecessor_;
    const int64_t columns = columns_;
    const int row = at.row;
    const double offset = at.distance - (cost[at.column] - price_[at.column]);
    settled_[settled_count_++] = {at.column, price_[at.column], at.distance};
    price_[at.column] = -kInfinity;
    distance_[at.column] = kInfinity;
    Vec<double> nearest = broadcast(kInfinity);
    for (int64_t j = 0; j < columns; j += kWide) {
      const Vec<double> x = load_cost(cost + j) - load(price + j) + offset;
      const Vec<double> old = load(distance + j), now = minimum(x, old);
      store(distance + j, now);
      store_int<double>(predecessor + j, x < old ? broadcast_int<double>(row) : load_int<double>(predecessor + j));
      nearest = minimum(now, nearest);
    }
    return pick(nearest);
  }

  void finish(int i, const Nearest& end) {
    for (int64_t k = 0; k < settled_count_; ++k)
      price_[settled_[k].column] = settled_[k].price + (settled_[k].distance - end.distance);
    for (int column = end.column, row = -1; row != i;) {
      row = static_cast<int>(predecessor_[column]);
      row_of_[column] = row;
      std::swap(column, column_of_[row]);
    }
  }

 private:
  struct Settled {
    int column;
    double price, distance;
  };

  Nearest pick(Vec<double> nearest) const {
    const double distance = lowest_lane(nearest);
    const double* distances = distance_;
    const int column = pick_column(distance, columns_, row_of_, [=](int64_t j) { return load(distances + j); });
    return {distance, column, row_of_[column]};
  }

  const S* costs_ = nullptr;
  int64_t columns_ = 0, settled_count_ = 0;
  double *price_, *distance_;
  int64_t* predecessor_;  // the row from which a column was reached
  int *row_of_, *column_of_;
  Settled* settled_;
};

// Converts costs for packing: negates them if `maximize` is set, makes forbidden costs infinite, and collects the
// values on which the scale depends. The loops below pass this object by value, because GCC would write it to memory in
// every iteration if they passed it by reference.
template <class Compute>
struct Packing {
  const VecInt<Compute> sign;
  Vec<Compute> max_magnitude = {};     // the largest magnitude of the permitted costs
  VecInt<Compute> any_forbidden = {};  // a mask

  explicit Packing(bool maximize) : sign((VecInt<Compute>)broadcast(maximize ? Compute(-0.0) : Compute(0.0))) {}

  // Lanes n and above are not part of the problem. This function uses only selections (?:), because GCC 12 compiles a
  // combination of two masks to code that processes one bit at a time.
  Vec<Compute> operator()(Vec<Compute> x, int64_t n) {
    constexpr Compute kForbidden = std::numeric_limits<Compute>::infinity();
    const VecInt<Compute> lane = lanes<Compute>([](Int<Compute> j) { return j; }), count = broadcast_int<Compute>(n);
    x = lane < count ? x : Vec<Compute>{};
    const Vec<Compute> magnitude = (Vec<Compute>)((VecInt<Compute>)x & ~(VecInt<Compute>)broadcast(Compute(-0.0)));
    const Vec<Compute> permitted = magnitude < kForbidden ? magnitude : Vec<Compute>{};
    max_magnitude = permitted > max_magnitude ? permitted : max_magnitude;
    any_forbidden |= magnitude < kForbidden ? VecInt<Compute>{} : broadcast_int<Compute>(-1);
    x = magnitude < kForbidden ? (Vec<Compute>)((VecInt<Compute>)x ^ sign) : broadcast(kForbidden);
    return lane < count ? x : broadcast(kForbidden);
  }
};

// Loads a vector from p without reading past `end`, the end of the tensor. The caller uses only the first n lanes.
template <class T>
inline Vec<ComputeType<T>> load_before(const T* p, int64_t n, const T* end) {
  return end - p >= kLanes<ComputeType<T>> ? load(p) : load_first(p, n);
}

// The size of a packed problem, in which the smaller side becomes the rows.
struct Size {
  int64_t n, m, columns;  // columns is m, rounded up to a multiple of two vectors
  bool columns_are_rows;
};

// Packs the rows of a cost matrix. The tensor that contains the matrix ends at `end`.
template <class T, class Compute>
Packing<Compute> pack_rows(const T* cost, int64_t stride, const T* end, const Size& size, Packing<Compute> packing,
                           Compute* out) {
  for (int64_t i = 0; i < size.n; ++i, cost += stride, out += size.columns)
    for (int64_t j = 0; j < size.columns; j += kLanes<Compute>)
      store(out + j, packing(load_before(cost + j, size.m - j, end), size.m - j));
  return packing;
}

// Packs the columns of a cost matrix as rows. Transposes blocks of V x V costs, where V is the number of vector lanes.
template <class T, class Compute>
Packing<Compute> pack_columns(const T* cost, int64_t stride, const T* end, const Size& size, Packing<Compute> packing,
                              Compute* out) {
  constexpr int64_t V = kLanes<Compute>;
  for (int64_t i = 0; i < size.columns; i += V)
    for (int64_t j = 0; j < size.n; j += V) {
      const int64_t n = size.n - j;
      Vec<Compute> square[V];
      for (int64_t k = 0; k < V; ++k)
        square[k] = i + k < size.m ? packing(load_before(cost + (i + k) * stride + j, n, end), n)
                                   : broadcast(static_cast<Compute>(kInfinity));
      transpose<Compute>(square);
      for (int64_t k = 0; k < std::min(V, n); ++k) store(out + (j + k) * size.columns + i, square[k]);
    }
  return packing;
}

// Scales packed costs and replaces infinite costs, which are forbidden, by scale.forbidden. This is needed only if some
// costs are forbidden or too large.
template <class Compute, class S>
void apply_scale(const Compute* packed, const Size& size, const CostScale& scale, S* out) {
  for (int64_t i = 0; i < size.n; ++i, packed += size.columns, out += size.columns)
    for (int64_t j = 0; j < size.columns; ++j) {
      const double x = packed[j];
      out[j] = static_cast<S>(j < size.m && x == kInfinity ? scale.forbidden : x * scale.scale);
    }
}

template <class T>
class Solver {
 public:
  using Compute = ComputeType<T>;

  explicit Solver(const AssignmentArgs<T>& args)
      : a_(args),
        max_rows_(std::min(args.R, args.C)),
        max_columns_(round_up(std::max(args.R, args.C), 2 * kWide)),
        packed_(scratch_.template allocate<Compute>(max_rows_ * max_columns_)),
        search_(scratch_, max_rows_, max_columns_) {}

  void operator()(int64_t b) {
    const int64_t r = a_.num_rows == nullptr ? a_.R : a_.num_rows[b];
    const int64_t c = a_.num_cols == nullptr ? a_.C : a_.num_cols[b];
    std::fill_n(a_.row_to_col + b * a_.R, a_.R, -1);
    std::fill_n(a_.col_to_row + b * a_.C, a_.C, -1);
    const int64_t m = std::max(r, c);
    const Size size{std::min(r, c), m, round_up(m, 2 * kWide), r > c};
    if (size.n == 0) return;
    const T *cost = a_.cost + b * a_.R * a_.C, *end = a_.cost + a_.B * a_.R * a_.C;
    const Packing<Compute> start(a_.maximize);
    const Packing<Compute> packing = size.columns_are_rows ? pack_columns(cost, a_.C, end, size, start, packed_)
                                                           : pack_rows(cost, a_.C, end, size, start, packed_);
    const double max_magnitude =
        fold<Compute>(packing.max_magnitude, [](Vec<Compute> x, Vec<Compute> y) { return maximum(x, y); });
    const bool any_forbidden = mask_bits<Compute>(packing.any_forbidden) != 0;
    const CostScale scale = cost_scale(max_magnitude, static_cast<int>(size.n));
    if (!any_forbidden && scale.scale == 1.0) return solve(search_, packed_, b, size, kInfinity);
    if (scale.forbidden <= std::numeric_limits<Compute>::max()) {
      apply_scale(packed_, size, scale, packed_);
      return solve(search_, packed_, b, size, scale.forbidden);
    }
    // The cost of a forbidden pair is too large for float32, so the search uses float64 costs.
    Scratch scratch;
    double* wide = scratch.allocate<double>(size.n * size.columns);
    Search<double> search(scratch, size.n, size.columns);
    apply_scale(packed_, size, scale, wide);
    solve(search, wide, b, size, scale.forbidden);
  }

 private:
  template <class S>
  void solve(Search<S>& search, const S* costs, int64_t b, const Size& size, double forbidden) {
    search.reset(costs, size.n, size.columns);
    assign_rows(search, static_cast<int>(size.n), static_cast<int>(size.m));
    int64_t *row_matches = a_.row_to_col + b * a_.R, *column_matches = a_.col_to_row + b * a_.C;
    if (size.columns_are_rows) std::swap(row_matches, column_matches);
    for (int64_t i = 0; i < size.n; ++i) {
      const int64_t j = search.columns_of_rows()[i];
      if (costs[i * size.columns + j] >= forbidden) continue;
      row_matches[i] = j;
      column_matches[j] = i;
    }
  }

  const AssignmentArgs<T>& a_;
  int64_t max_rows_, max_columns_;
  Scratch scratch_;
  Compute* packed_;
  Search<Compute> search_;
};

}  // namespace

template <class T>
void linear_sum_assignment(const AssignmentArgs<T>& args, int64_t threads) {
  for_each_item(args.B, threads, [&] { return Solver<T>(args); });
}

}  // namespace relops::RELOPS_ISA
