// Whole batches over the thread pool: problems of any shape, results packed one after another. No Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "match.h"

namespace pr1 {

// What the environment asks for: PR1_ISA (kernels.h) and PR1_THREADS (pool.h). Throws std::invalid_argument.
struct Settings {
  const Kernels* kernels;
  int threads;
  static Settings from_environment();
};

// The first problem that has no answer, whatever the number of threads.
struct Failure {
  int64_t problem = -1;  // -1: none
  std::string what;
};

struct CostMatrix {
  const void* costs;  // row-major (m, n), double or float
  bool is_double;
  int64_t m, n;
};

// offsets: (problems + 1,), where each problem's min(m, n) pairs begin. Returns their number.
int64_t assignment_offsets(const std::vector<CostMatrix>& problems, int64_t* offsets);

// rows, cols: room for offsets[problems] pairs.
Failure assign_batch(const std::vector<CostMatrix>& problems, const int64_t* offsets, int64_t* rows, int64_t* cols,
                     const Settings& settings);

// Problem i has the boxes offsets[i]..offsets[i + 1].
struct BoxBatch {
  const double* boxes;
  const int64_t* labels;
  const bool* ignore;  // or null
  const int64_t* offsets;

  BoxList problem(int64_t i) const {
    const int64_t start = offsets[i];
    const int count = static_cast<int>(offsets[i + 1] - start);
    return {boxes + 4 * start, labels + start, ignore ? ignore + start : nullptr, count};
  }
};

struct MatchOutput {
  int64_t *rows, *cols;
  int64_t* offsets;  // (batch + 1,)
  double *iou, *table;
  const int64_t* table_offsets;  // (batch + 1,)
  bool* ignored;                 // as many as predicted boxes
};

// Room of each problem for pairs, min(m, n), and for the table, m * n.
void match_offsets(const BoxBatch& pred, const BoxBatch& gt, int64_t batch, int64_t* offsets, int64_t* table_offsets);

// sizes: (batch, 2) width, height. out.offsets holds the room of each problem on entry (match_offsets) and its pairs on
// return; rows, cols and iou are then packed accordingly.
Failure match_batch(const BoxBatch& pred, const BoxBatch& gt, const double* sizes, int64_t batch,
                    const MatchWeights& weights, const Settings& settings, const MatchOutput& out);

}  // namespace pr1
