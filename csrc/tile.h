// Matching of one problem, over the vectors of lanes.h and the solver of solve.h. Included by kernels.cpp once per
// instruction set, inside its namespace and target region (hence no include guard).

// Ground truth by coordinate, filled up to whole vectors with empty boxes that are never legal.
struct GtTile {
  using L = Lanes<double>;
  double *x1, *y1, *x2, *y2, *area, *cx, *cy, *w, *h, *least_iou;
  int64_t* label;
  int count, stride;

  GtTile(const MatchProblem& problem, double min_iou, MatchWork& work)
      : count(problem.gt.count), stride((count + L::W - 1) / L::W * L::W) {
    double* p = work.gt.reserve(10 * static_cast<int64_t>(stride));
    for (double** field : {&x1, &y1, &x2, &y2, &area, &cx, &cy, &w, &h, &least_iou}) {
      *field = p;
      p += stride;
    }
    label = work.label.reserve(stride);
    const double per_width = 1 / problem.width, per_height = 1 / problem.height;
    for (int j = 0; j < count; ++j) {
      const double* b = problem.gt.boxes + 4 * static_cast<int64_t>(j);
      const bool box = b[2] > b[0] && b[3] > b[1];
      const bool legal = box && !(problem.gt.ignore && problem.gt.ignore[j]);
      set(j, box ? b[0] : 0, box ? b[1] : 0, box ? b[2] : 0, box ? b[3] : 0, per_width, per_height);
      least_iou[j] = legal ? min_iou : std::numeric_limits<double>::infinity();
      label[j] = problem.gt.labels[j];
    }
    for (int j = count; j < stride; ++j) {
      set(j, 0, 0, 0, 0, per_width, per_height);
      least_iou[j] = std::numeric_limits<double>::infinity();
      label[j] = 0;
    }
  }

 private:
  PR1_INLINE void set(int j, double left, double top, double right, double bottom, double per_width,
                      double per_height) {
    x1[j] = left;
    y1[j] = top;
    x2[j] = right;
    y2[j] = bottom;
    area[j] = (right - left) * (bottom - top);
    cx[j] = (left + right) * 0.5 * per_width;
    cy[j] = (top + bottom) * 0.5 * per_height;
    w[j] = (right - left) * per_width;
    h[j] = (bottom - top) * per_height;
  }
};

// One prediction, each value in every lane.
struct PredLanes {
  using L = Lanes<double>;
  using V = L::V;
  V x1, y1, x2, y2, area, cx, cy, w, h;

  PR1_INLINE PredLanes(const double* b, double width, double height) {
    const double per_width = 1 / width, per_height = 1 / height;
    x1 = L::set1(b[0]), y1 = L::set1(b[1]), x2 = L::set1(b[2]), y2 = L::set1(b[3]);
    area = L::set1((b[2] - b[0]) * (b[3] - b[1]));
    cx = L::set1((b[0] + b[2]) * 0.5 * per_width), cy = L::set1((b[1] + b[3]) * 0.5 * per_height);
    w = L::set1((b[2] - b[0]) * per_width), h = L::set1((b[3] - b[1]) * per_height);
  }
};

class BoxMatcher {
  using L = Lanes<double>;
  using V = L::V;
  static constexpr double kInf = std::numeric_limits<double>::infinity();

  const MatchProblem& problem_;
  const MatchWeights& weights_;
  MatchWork& work_;
  MatchResult& result_;
  const GtTile gt_;
  double* const cost_;
  int32_t* const pred_of_row_;
  int rows_ = 0;  // predictions with at least one legal partner

  // IoU of a prediction with every ground truth box into the table, costs (+inf: illegal) into `cost`. Returns the
  // least.
  PR1_INLINE V fill_row(const PredLanes& p, int64_t label, double* table, double* cost, bool usable) const {
    const V zero = L::set1(0), one_class = L::set1(weights_.cls), inf = L::set1(kInf), two = L::set1(2);
    const V l1 = L::set1(weights_.l1), giou = L::set1(weights_.giou);
    V least = inf;
    for (int j = 0; j < gt_.stride; j += L::W) {
      const V x1 = L::load(gt_.x1 + j), y1 = L::load(gt_.y1 + j), x2 = L::load(gt_.x2 + j), y2 = L::load(gt_.y2 + j);
      const V iw = L::max(L::sub(L::min(p.x2, x2), L::max(p.x1, x1)), zero);
      const V ih = L::max(L::sub(L::min(p.y2, y2), L::max(p.y1, y1)), zero);
      const V inter = L::mul(iw, ih);
      const V both = L::sub(L::add(p.area, L::load(gt_.area + j)), inter);
      const V iou = L::div(inter, both);
      const int left = gt_.count - j;
      if (left >= L::W) {
        L::store(table + j, iou);
      } else {
        L::store_part(table + j, left, iou);
      }
      // Bits: all is decided by then for most vectors, as most pairs of a crowded image are of no use to each other.
      constexpr uint64_t kAll = (uint64_t{1} << L::W) - 1;
      uint64_t legal = ~L::bits(L::lt(iou, L::load(gt_.least_iou + j))) & kAll;
      const auto same = L::same(gt_.label + j, label);
      if (weights_.forbid_other_class) legal &= L::bits(same);
      V c = inf;
      if (legal && usable) {
        const V hw = L::sub(L::max(p.x2, x2), L::min(p.x1, x1)), hh = L::sub(L::max(p.y2, y2), L::min(p.y1, y1));
        const V x = L::add(L::abs(L::sub(p.cx, L::load(gt_.cx + j))), L::abs(L::sub(p.w, L::load(gt_.w + j))));
        const V y = L::add(L::abs(L::sub(p.cy, L::load(gt_.cy + j))), L::abs(L::sub(p.h, L::load(gt_.h + j))));
        // 1 - GIoU = 1 - (IoU - (hull - both) / hull) = 2 - IoU - both / hull
        const V apart = L::sub(L::sub(two, iou), L::div(both, L::mul(hw, hh)));
        c = L::add(L::mul(l1, L::add(x, y)), L::mul(giou, apart));
        c = L::select(same, c, L::add(c, one_class));
        c = L::select(L::lt(iou, L::load(gt_.least_iou + j)), inf, c);
        if (weights_.forbid_other_class) c = L::select(same, c, inf);
        least = L::min(least, c);
      }
      L::store(cost + j, c);
    }
    return L::min_of_all(least);
  }

  // Whether more than half of the box lies inside one ignored ground truth box of its label.
  bool inside_ignored(const double* b, int64_t label) const {
    const double half = 0.5 * ((b[2] - b[0]) * (b[3] - b[1]));
    for (int j = 0; j < gt_.count; ++j) {
      if (!problem_.gt.ignore[j] || gt_.label[j] != label) continue;
      const double w = std::min(b[2], gt_.x2[j]) - std::max(b[0], gt_.x1[j]);
      const double h = std::min(b[3], gt_.y2[j]) - std::max(b[1], gt_.y1[j]);
      if (w > 0 && h > 0 && w * h > half) return true;
    }
    return false;
  }

  double* cost_row(int r) const { return cost_ + static_cast<int64_t>(r) * gt_.stride; }

  // Table, costs, and each row's cheapest column into `choice`. Returns whether no two rows chose the same column: then
  // every prediction that can be matched at all is matched as cheaply as it can be, which is optimal.
  bool fill(int32_t* choice) {
    const BoxList& pred = problem_.pred;
    uint8_t* taken = work_.taken.reserve(std::max(gt_.stride, pred.count) + 1);
    std::fill_n(taken, gt_.stride, 0);
    bool distinct = true;
    bool any_ignored = false;
    for (int j = 0; problem_.gt.ignore && j < gt_.count; ++j) any_ignored |= problem_.gt.ignore[j];
    for (int i = 0; i < pred.count; ++i) {
      const double* b = pred.boxes + 4 * static_cast<int64_t>(i);
      double* table = result_.table + static_cast<int64_t>(i) * gt_.count;
      if (!in_range(b) || !(b[2] > b[0] && b[3] > b[1])) {
        std::fill_n(table, gt_.count, 0.0);
        continue;
      }
      if (any_ignored) result_.ignored[i] = inside_ignored(b, pred.labels[i]);
      const bool usable = !(pred.ignore && pred.ignore[i]);
      double* cost = cost_row(rows_);
      const V least = fill_row(PredLanes(b, problem_.width, problem_.height), pred.labels[i], table, cost, usable);
      if (L::first(least) == kInf) continue;
      int col = -1;  // the lowest free one of the cheapest, else the lowest
      for (int j = 0; j < gt_.stride; j += L::W) {
        uint64_t equal = L::bits(L::eq(L::load(cost + j), least));
        for (; equal && (col < 0 || taken[col]); equal &= equal - 1) {
          const int k = j + __builtin_ctzll(equal);
          if (col < 0 || !taken[k]) col = k;
        }
      }
      distinct = distinct && !taken[col];
      taken[col] = 1;
      choice[rows_] = col;
      pred_of_row_[rows_++] = i;
    }
    return distinct;
  }

  // The same from the other side: each column's cheapest row, the lowest of equals.
  bool fill_by_columns(int32_t* choice) {
    double* least = work_.least.reserve(gt_.stride);
    double* first = work_.first.reserve(gt_.stride);
    for (int j = 0; j < gt_.stride; j += L::W) {
      V low = L::set1(kInf), row = L::set1(0);
      for (int r = 0; r < rows_; ++r) {
        const V c = L::load(cost_row(r) + j);
        row = L::select(L::lt(c, low), L::set1(r), row);
        low = L::min(low, c);
      }
      L::store(least + j, low);
      L::store(first + j, row);
    }
    std::fill_n(choice, rows_, -1);
    for (int j = 0; j < gt_.count; ++j) {
      if (least[j] == kInf) continue;
      int32_t& col = choice[static_cast<int>(first[j])];
      if (col >= 0) return false;
      col = j;
    }
    return true;
  }

  // The general case. Illegal pairs, if there are any left among the boxes with a legal partner, cost more than any
  // number of legal ones, so that the least total has the most legal pairs.
  void solve_rest(int32_t* choice) {
    const double* least = work_.least.get();  // of fill_by_columns
    int32_t* cols = work_.open_cols.reserve(gt_.stride);
    int n = 0;
    for (int j = 0; j < gt_.count; ++j) {
      if (work_.first.get()[j] >= 0 && least[j] < kInf) cols[n++] = j;
    }
    double* dense = work_.dense.reserve(static_cast<int64_t>(rows_) * n);
    double most = 0;
    bool all_legal = true;
    for (int r = 0; r < rows_; ++r) {
      for (int k = 0; k < n; ++k) {
        const double c = cost_row(r)[cols[k]];
        dense[static_cast<int64_t>(r) * n + k] = c;
        if (c < kInf) {
          most = std::max(most, c);
        } else {
          all_legal = false;
        }
      }
    }
    if (!all_legal) {
      // A power of two: adding it to a cost and taking it off again loses as few digits as can be.
      const double price = std::exp2(std::ceil(std::log2(2.0 * std::min(rows_, n) * std::max(most, 1e-9))));
      for (int64_t k = 0; k < static_cast<int64_t>(rows_) * n; ++k) dense[k] = dense[k] < kInf ? dense[k] : price;
    }
    solve<double>(dense, rows_, n, work_.solver);
    for (int r = 0; r < rows_; ++r) {
      const int k = col_of(work_.solver, rows_, n, r);
      choice[r] = k >= 0 && cost_row(r)[cols[k]] < kInf ? cols[k] : -1;
    }
  }

 public:
  BoxMatcher(const MatchProblem& problem, const MatchWeights& weights, MatchWork& work, MatchResult& result)
      : problem_(problem),
        weights_(weights),
        work_(work),
        result_(result),
        gt_(problem, weights.min_iou, work),
        cost_(work.cost.reserve(static_cast<int64_t>(problem.pred.count) * gt_.stride)),
        pred_of_row_(work.pred_of_row.reserve(problem.pred.count)) {}

  void run() {
    int32_t* choice = work_.col_of_row.reserve(problem_.pred.count);
    if (!fill(choice) && !fill_by_columns(choice)) solve_rest(choice);
    result_.pairs = 0;
    for (int r = 0; r < rows_; ++r) {
      if (choice[r] < 0) continue;
      const int64_t i = pred_of_row_[r], j = choice[r];
      result_.rows[result_.pairs] = i;
      result_.cols[result_.pairs] = j;
      result_.iou[result_.pairs++] = result_.table[i * gt_.count + j];
    }
  }
};

bool match_one(const MatchProblem& problem, const MatchWeights& weights, MatchWork& work, MatchResult& result) {
  for (int j = 0; j < problem.gt.count; ++j) {
    if (!in_range(problem.gt.boxes + 4 * static_cast<int64_t>(j))) return false;
  }
  BoxMatcher(problem, weights, work, result).run();
  return true;
}
