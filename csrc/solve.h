// The assignment algorithm, over the vectors of lanes.h. Included by kernels.cpp once per instruction set, inside its
// namespace and target region (hence no include guard).
//
// Order of work, which also settles ties, the same for every instruction set:
// 1. Transpose if there are more rows than columns. Squares: the potential of each column is its least cost; else 0, as
//    it must be for columns that stay free.
// 2. Each row in order takes its cheapest column (cost - potential) if that is free; of equally cheap ones the lowest
//    free one. If this serves every row it is optimal.
// 3. For each row left over, in order: Dijkstra's shortest augmenting path. It ends at a free column before it goes on
//    through a taken one at the same distance, and takes the lowest index among equals.
// There is no augmenting row reduction between 2 and 3, as is usual elsewhere: a sweep of 3 costs what a sweep of the
// reduction does, and few are needed.

// N: vectors a row takes if known when compiling, so that the state of a search stays in registers; else 0.
template <class T, int N>
class Solver {
  using L = Lanes<T>;
  using V = typename L::V;
  static constexpr int W = L::W;
  static constexpr T kInf = std::numeric_limits<T>::infinity();

  const int rows_, cols_, vectors_, stride_;
  T *const cost_, *const v_;
  Work<T>& work_;
  int32_t *const row_of_col_, *const col_of_row_, *const free_rows_;
  uint64_t* const free_cols_;
  int free_count_ = 0;

  PR1_INLINE int vectors() const { return N ? N : vectors_; }
  PR1_INLINE int stride() const { return N ? N * W : stride_; }
  PR1_INLINE const T* row(int i) const { return cost_ + static_cast<int64_t>(i) * stride(); }

  // A row's worth of vectors: in registers when N is known, else in memory.
  class Row {
    V registers_[N ? N : 1];
    T* const memory_;

   public:
    PR1_INLINE explicit Row(T* memory) : memory_(memory) {}
    PR1_INLINE V get(int b) const {
      if constexpr (N > 0) return registers_[b];
      return L::load(memory_ + b * W);
    }
    PR1_INLINE V set(int b, V value) {
      if constexpr (N > 0) {
        registers_[b] = value;
      } else {
        L::store(memory_ + b * W, value);
      }
      return value;
    }
  };

  // The lowest free column where x == least, else the lowest column where it is. There is one.
  PR1_INLINE int choose(const Row& x, V least, bool& free) const {
    if (N) {
      uint64_t equal = 0;
      for (int b = 0; b < N; ++b) equal |= L::bits(L::eq(x.get(b), least)) << (b * W);
      const uint64_t open = equal & free_cols_[0];
      free = open != 0;
      return __builtin_ctzll(free ? open : equal);
    }
    int first = -1;
    free = true;
    if (W == 1) {
      for (int j = 0; j < stride_; ++j) {
        if (!L::bits(L::eq(x.get(j), least))) continue;
        if (row_of_col_[j] < 0) return j;
        if (first < 0) first = j;
      }
    } else {
      for (int word = 0; word * 64 < stride_; ++word) {
        uint64_t equal = 0;
        const int begin = word * (64 / W), end = std::min(begin + 64 / W, vectors_);
        for (int b = begin; b < end; ++b) equal |= L::bits(L::eq(x.get(b), least)) << ((b - begin) * W);
        if (!equal) continue;
        if (const uint64_t open = equal & free_cols_[word]) return word * 64 + __builtin_ctzll(open);
        if (first < 0) first = word * 64 + __builtin_ctzll(equal);
      }
    }
    free = false;
    return first;
  }

  // Step 1: copies the costs into rows filled up with +inf, and the potentials of step 2 into v. `most` is the largest
  // magnitude. False if a cost is NaN or -inf.
  bool fill(const T* cost, bool transpose, T& most) {
    const V inf = L::set1(kInf), minus_inf = L::set1(-kInf), zero = L::set1(0);
    Row least(v_);
    V largest = zero;
    uint64_t bad = 0;
    for (int b = 0; b < vectors(); ++b) least.set(b, inf);
    for (int i = 0; i < rows_; ++i) {
      T* to = cost_ + static_cast<int64_t>(i) * stride();
      if (transpose) {
        for (int j = 0; j < cols_; ++j) to[j] = cost[static_cast<int64_t>(j) * rows_ + i];
      }
      const T* from = transpose ? to : cost + static_cast<int64_t>(i) * cols_;
      for (int b = 0; b < vectors(); ++b) {
        const int left = cols_ - b * W;
        V c = left >= W ? L::load(from + b * W) : L::load_part(from + b * W, left);
        largest = L::max(largest, L::abs(c));
        if (left < W) c = L::select(L::below(left), c, inf);
        bad |= L::bits(L::not_gt(c, minus_inf));
        least.set(b, L::min(least.get(b), c));
        L::store(to + b * W, c);
      }
    }
    // Squares start from each column's least cost. Rectangles must not: the potential of a column that stays free is 0.
    // So is that of the filling, where inf - inf would be NaN.
    for (int b = 0; b < vectors(); ++b) {
      L::store(v_ + b * W, rows_ == cols_ ? L::select(L::lt(least.get(b), inf), least.get(b), zero) : zero);
    }
    most = -L::first(L::min_of_all(L::sub(zero, largest)));
    return !bad;
  }

  // Whether all sums of costs that the later steps form are finite in T and, for whole numbers, exact. In float32,
  // 2^24 - 1 and -2^24 are exact but their difference is not, and a column that is better by one would tie.
  bool fits(T most) const {
    const int64_t count = static_cast<int64_t>(rows_) * stride();
    if (most == kInf) {
      most = 0;
      for (int64_t k = 0; k < count; ++k) most = std::max(most, cost_[k] < kInf ? std::abs(cost_[k]) : T{0});
    }
    const T terms = 4 * (static_cast<T>(rows_) + 1);
    if (most > std::numeric_limits<T>::max() / terms) return false;
    if (sizeof(T) == sizeof(double) || most * terms <= T{1 << 24}) return true;
    for (int64_t k = 0; k < count; ++k) {
      if (cost_[k] < kInf && cost_[k] != std::nearbyint(cost_[k])) return true;
    }
    return false;
  }

  // Step 2. False if a row has no column at all.
  template <bool kSquare>
  bool greedy() {
    for (int word = 0; word * 64 < stride(); ++word) free_cols_[word] = ~uint64_t{0};
    std::fill_n(row_of_col_, stride(), -1);
    Row x(work_.distance.get());
    for (int i = 0; i < rows_; ++i) {
      const T* c = row(i);
      V least = L::set1(kInf);
      for (int b = 0; b < vectors(); ++b) {
        V xb = L::load(c + b * W);
        if (kSquare) xb = L::sub(xb, L::load(v_ + b * W));
        least = L::min(least, x.set(b, xb));
      }
      least = L::min_of_all(least);
      if (L::first(least) == kInf) return false;
      bool free;
      const int j = choose(x, least, free);
      // Without branches, as they could not be predicted.
      free_rows_[free_count_] = i;
      free_count_ += !free;
      col_of_row_[i] = free ? j : -1;
      row_of_col_[j] = free ? i : row_of_col_[j];
      free_cols_[j / 64] &= ~(uint64_t{1} << (j % 64));
    }
    return true;
  }

  // One vector of Dijkstra's sweep: distances by way of a row with costs c and potential `base`. Where kScanned, column
  // j is taken out first.
  template <bool kScanned>
  PR1_INLINE static void relax(const T* c, Row& v, Row& d, Row& parent, int b, int j, V base, V from, V& least) {
    V vb = v.get(b), db = d.get(b);
    if (kScanned) {
      const auto lane = N ? L::lane(j, b) : L::lane(j % W, 0);
      vb = v.set(b, L::select(lane, L::set1(-kInf), vb));
      db = L::select(lane, L::set1(kInf), db);
    }
    const V x = L::sub(L::sub(L::load(c + b * W), vb), base);
    const auto shorter = L::lt(x, db);
    db = d.set(b, L::select(shorter, x, db));
    parent.set(b, L::select(shorter, from, parent.get(b)));
    least = L::min(least, db);
  }

  // Step 3 for one row. False if no free column can be reached.
  bool augment(int start) {
    Row d(work_.distance.get());     // of each column; +inf once it is scanned
    Row v(work_.working.get());      // -inf once scanned, so that it is never relaxed again
    Row parent(work_.parent.get());  // the row before each column, as a T
    int32_t* scanned = work_.scanned.get();
    T* scanned_distance = work_.scanned_distance.get();
    const V inf = L::set1(kInf);
    const T* c = row(start);
    V least = inf;
    for (int b = 0; b < vectors(); ++b) {
      const V vb = v.set(b, L::load(v_ + b * W));
      parent.set(b, L::set1(static_cast<T>(start)));
      least = L::min(least, d.set(b, L::sub(L::load(c + b * W), vb)));
    }
    int count = 0;
    int j;
    T reached;
    while (true) {
      least = L::min_of_all(least);
      reached = L::first(least);
      if (reached == kInf) return false;
      bool free;
      j = choose(d, least, free);
      if (free) break;
      const int i = row_of_col_[j];
      scanned[count] = j;
      scanned_distance[count++] = reached;
      c = row(i);
      const V base = L::sub(L::set1(c[j] - v_[j]), least), from = L::set1(static_cast<T>(i));
      least = inf;
      if (N) {
        for (int b = 0; b < N; ++b) relax<true>(c, v, d, parent, b, j, base, from, least);
      } else {
        for (int b = 0; b < j / W; ++b) relax<false>(c, v, d, parent, b, j, base, from, least);
        relax<true>(c, v, d, parent, j / W, j, base, from, least);
        for (int b = j / W + 1; b < vectors_; ++b) relax<false>(c, v, d, parent, b, j, base, from, least);
      }
    }
    if (N) {
      for (int b = 0; b < N; ++b) L::store(work_.parent.get() + b * W, parent.get(b));
    }
    for (int k = 0; k < count; ++k) v_[scanned[k]] += scanned_distance[k] - reached;
    free_cols_[j / 64] &= ~(uint64_t{1} << (j % 64));
    int i;
    do {  // back along the path; each row on it hands its column to the row before
      i = static_cast<int>(work_.parent.get()[j]);
      row_of_col_[j] = i;
      std::swap(j, col_of_row_[i]);
    } while (i != start);
    return true;
  }

 public:
  Solver(int rows, int cols, int vectors, Work<T>& work)
      : rows_(rows),
        cols_(cols),
        vectors_(vectors),
        stride_(vectors * W),
        cost_(work.cost.reserve(static_cast<int64_t>(rows) * stride_)),
        v_(work.potential.reserve(stride_)),
        work_(work),
        row_of_col_(work.row_of_col.reserve(stride_)),
        col_of_row_(work.col_of_row.reserve(rows)),
        free_rows_(work.free_rows.reserve(rows)),
        free_cols_(work.free_cols.reserve(stride_ / 64 + 1)) {
    work.distance.reserve(stride_);
    work.working.reserve(stride_);
    work.parent.reserve(stride_);
    work.scanned_distance.reserve(rows);
    work.scanned.reserve(rows);
  }

  Status run(const T* cost, bool transpose) {
    T most;
    if (!fill(cost, transpose, most)) return Status::kBadCost;
    const bool square = rows_ == cols_;
    if (square && !fits(most)) return Status::kTooLarge;
    if (!(square ? greedy<true>() : greedy<false>())) return Status::kInfeasible;
    if (free_count_ && !square && !fits(most)) return Status::kTooLarge;
    for (int k = 0; k < free_count_; ++k) {
      if (!augment(free_rows_[k])) return Status::kInfeasible;
    }
    return Status::kSolved;
  }
};

template <class T>
Status solve(const T* cost, int m, int n, Work<T>& work) {
  constexpr int W = Lanes<T>::W;
  const int rows = std::min(m, n), cols = std::max(m, n), vectors = (cols + W - 1) / W;
  const bool transpose = m > n;
  switch (W > 1 ? vectors : 0) {
    case 1: return Solver<T, 1>(rows, cols, vectors, work).run(cost, transpose);
    case 2: return Solver<T, 2>(rows, cols, vectors, work).run(cost, transpose);
    case 3: return Solver<T, 3>(rows, cols, vectors, work).run(cost, transpose);
    case 4: return Solver<T, 4>(rows, cols, vectors, work).run(cost, transpose);
    default: return Solver<T, 0>(rows, cols, vectors, work).run(cost, transpose);
  }
}
