// Boxes -> IoU table -> cost -> optimal assignment, one problem (one completion against its ground truth) at a time.
// No Python here.
#pragma once

#include <cstdint>
#include <vector>

#include "lsap.h"

namespace pr1 {

// A coordinate beyond this many pixels is not a place in an image; such a box is treated as empty.
constexpr double kMaxCoordinate = 1e6;

struct BoxList {
  const double* boxes;    // (count, 4) xyxy pixels
  const int64_t* labels;  // (count,)
  const bool* ignore;     // (count,) or null
  int64_t count;
};

struct MatchWeights {
  double l1, giou, cls;
  bool forbid_other_class;
  double min_iou;
};

// Index of the first box with a NaN, infinite or too large coordinate, or -1.
int64_t find_bad_box(const BoxList& list);

// Holds the buffers and solvers, reused from problem to problem; one object per thread.
class Matcher {
 public:
  // table: (pred.count, gt.count) receives the pairwise IoU. rows, cols: room for min(pred.count, gt.count) pairs,
  // written in order of ascending row. Returns the number of pairs. Never fails, whatever the boxes hold.
  int64_t match(const BoxList& pred, const BoxList& gt, double width, double height, const MatchWeights& weights,
                double* table, int64_t* rows, int64_t* cols);

 private:
  bool fill_costs(const BoxList& pred, const BoxList& gt, double width, double height, const MatchWeights& weights,
                  const double* table);

  std::vector<int64_t> rows_, cols_;       // boxes that may be matched at all
  std::vector<Lexicographic> cost_;        // (rows_, cols_): {1, 0} for an illegal pair, {0, cost} for a legal one
  std::vector<double> plain_cost_;         // the same without the first rank, when every pair is legal
  std::vector<int64_t> col_of_row_;
  LsapSolver<double> solver_;
  LsapSolver<Lexicographic> lexicographic_solver_;
};

}  // namespace pr1
