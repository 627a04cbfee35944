// Boxes -> IoU table -> cost -> optimal assignment, one problem (one completion against its ground truth), one thread,
// no Python. The algorithm is tile.h, compiled once per instruction set by kernels.cpp.
#pragma once

#include <cstdint>

#include "lsap.h"

namespace pr1 {

// A coordinate beyond this many pixels is not a place in an image; such a box is treated as empty.
constexpr double kMaxCoordinate = 1e6;

struct BoxList {
  const double* boxes;    // (count, 4) xyxy pixels
  const int64_t* labels;  // (count,)
  const bool* ignore;     // (count,) or null
  int count;
};

struct MatchWeights {
  double l1, giou, cls;
  bool forbid_other_class;
  double min_iou;
};

struct MatchProblem {
  BoxList pred, gt;
  double width, height;
};

struct MatchResult {
  double* table;           // (pred.count, gt.count) pairwise IoU
  bool* ignored;           // (pred.count,), all false when the call is made
  int64_t *rows, *cols;    // room for min(pred.count, gt.count) pairs, by ascending row
  double* iou;             // of the pairs
  int64_t pairs;
};

// Workspace, kept from problem to problem; one per thread. k: predictions with a legal partner, s: the number of ground
// truth boxes rounded up to whole vectors.
struct MatchWork {
  Buffer<double> gt;            // x1, y1, x2, y2, area, centre x, centre y, width, height, least IoU: (10, s)
  Buffer<int64_t> label;        // (s,)
  Buffer<double> cost;          // (k, s), +inf where illegal
  Buffer<double> least, first;  // (s,) least cost of each column, and the first row that has it
  Buffer<double> dense;         // the problem left to the solver
  Buffer<int32_t> pred_of_row, col_of_row, open_cols;
  Buffer<uint8_t> taken;
  Work<double> solver;
};

// Returns false if a ground truth box has a coordinate that is NaN, infinite or beyond kMaxCoordinate. Whatever the
// predicted boxes hold, it does not fail.
using MatchOne = bool (*)(const MatchProblem&, const MatchWeights&, MatchWork&, MatchResult&);

// Written so that a NaN fails.
inline bool in_range(const double* b) {
  return b[0] >= -kMaxCoordinate && b[1] >= -kMaxCoordinate && b[2] >= -kMaxCoordinate && b[3] >= -kMaxCoordinate &&
         b[0] <= kMaxCoordinate && b[1] <= kMaxCoordinate && b[2] <= kMaxCoordinate && b[3] <= kMaxCoordinate;
}

}  // namespace pr1
