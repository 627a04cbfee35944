#include "match.h"

#include <algorithm>
#include <cmath>

namespace pr1 {
namespace {

bool in_range(const double* box) {
  // Written so that a NaN fails.
  return std::all_of(box, box + 4, [](double x) { return std::abs(x) <= kMaxCoordinate; });
}

double area(const double* b) { return b[2] > b[0] && b[3] > b[1] ? (b[2] - b[0]) * (b[3] - b[1]) : 0.0; }

bool has_area(const double* box) { return in_range(box) && area(box) > 0; }

double intersection(const double* a, const double* b) {
  const double w = std::min(a[2], b[2]) - std::max(a[0], b[0]);
  const double h = std::min(a[3], b[3]) - std::max(a[1], b[1]);
  return w > 0 && h > 0 ? w * h : 0.0;
}

double iou(const double* a, const double* b) {
  if (!has_area(a) || !has_area(b)) return 0.0;
  const double inter = intersection(a, b);
  return inter / (area(a) + area(b) - inter);
}

// Generalised IoU: IoU minus the share of the enclosing box that neither covers (Rezatofighi et al., CVPR 2019, eq. 4).
double giou(const double* a, const double* b) {
  const double inter = intersection(a, b);
  const double both = area(a) + area(b) - inter;
  const double hull = (std::max(a[2], b[2]) - std::min(a[0], b[0])) * (std::max(a[3], b[3]) - std::min(a[1], b[1]));
  return inter / both - (hull - both) / hull;
}

// L1 distance of (centre x, centre y, width, height), x and width in image widths, y and height in image heights.
double l1(const double* a, const double* b, double width, double height) {
  const double x = std::abs(a[0] + a[2] - b[0] - b[2]) / 2 + std::abs((a[2] - a[0]) - (b[2] - b[0]));
  const double y = std::abs(a[1] + a[3] - b[1] - b[3]) / 2 + std::abs((a[3] - a[1]) - (b[3] - b[1]));
  return x / width + y / height;
}

}  // namespace

int64_t find_bad_box(const BoxList& list) {
  for (int64_t i = 0; i < list.count; ++i) {
    if (!in_range(list.boxes + 4 * i)) return i;
  }
  return -1;
}

// Returns whether every pair of the problem is legal.
bool Matcher::fill_costs(const BoxList& pred, const BoxList& gt, double width, double height,
                         const MatchWeights& weights, const double* table) {
  bool all_legal = true;
  cost_.clear();
  plain_cost_.clear();
  for (const int64_t i : rows_) {
    for (const int64_t j : cols_) {
      const double* a = pred.boxes + 4 * i;
      const double* b = gt.boxes + 4 * j;
      const bool other = pred.labels[i] != gt.labels[j];
      const bool legal = !(other && weights.forbid_other_class) && table[i * gt.count + j] >= weights.min_iou;
      const double cost = weights.l1 * l1(a, b, width, height) + weights.giou * (1 - giou(a, b)) + weights.cls * other;
      cost_.push_back(legal ? Lexicographic{0, cost} : Lexicographic{1, 0});
      plain_cost_.push_back(cost);
      all_legal = all_legal && legal;
    }
  }
  return all_legal;
}

int64_t Matcher::match(const BoxList& pred, const BoxList& gt, double width, double height,
                       const MatchWeights& weights, double* table, int64_t* rows, int64_t* cols) {
  rows_.clear();
  cols_.clear();
  for (int64_t i = 0; i < pred.count; ++i) {
    if (has_area(pred.boxes + 4 * i) && !(pred.ignore && pred.ignore[i])) rows_.push_back(i);
    for (int64_t j = 0; j < gt.count; ++j) table[i * gt.count + j] = iou(pred.boxes + 4 * i, gt.boxes + 4 * j);
  }
  for (int64_t j = 0; j < gt.count; ++j) {
    if (has_area(gt.boxes + 4 * j) && !(gt.ignore && gt.ignore[j])) cols_.push_back(j);
  }
  const bool all_legal = fill_costs(pred, gt, width, height, weights, table);
  const int64_t m = rows_.size(), n = cols_.size();
  col_of_row_.resize(m);
  if (all_legal) {
    solver_.solve(plain_cost_.data(), m, n, col_of_row_.data());
  } else {
    lexicographic_solver_.solve(cost_.data(), m, n, col_of_row_.data());
  }
  int64_t pairs = 0;
  for (int64_t k = 0; k < m; ++k) {
    const int64_t c = col_of_row_[k];
    if (c < 0 || cost_[k * n + c].first > 0) continue;
    rows[pairs] = rows_[k];
    cols[pairs] = cols_[c];
    ++pairs;
  }
  return pairs;
}

}  // namespace pr1
