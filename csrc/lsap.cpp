#include "lsap.h"

#include <algorithm>
#include <cmath>

namespace pr1 {

template <class Cost>
void LsapSolver<Cost>::reserve(int64_t m, int64_t n) {
  const size_t short_side = std::min(m, n), long_side = std::max(m, n);
  if (row_potential_.size() < short_side) {
    row_potential_.resize(short_side);
    col_of_row_.resize(short_side);
  }
  if (col_potential_.size() < long_side) {
    col_potential_.resize(long_side);
    distance_.resize(long_side);
    parent_.resize(long_side);
    row_of_col_.resize(long_side);
    scanned_.resize(long_side);
    scanned_cols_.reserve(long_side);
  }
  if (m > n && transposed_.size() < short_side * long_side) transposed_.resize(short_side * long_side);
}

// Dijkstra over the columns from `row`. Returns the free column at the end of the shortest augmenting path, or -1.
template <class Cost>
int64_t LsapSolver<Cost>::shortest_path(const Cost* cost, int64_t n, int64_t row) {
  std::fill_n(distance_.begin(), n, forbidden<Cost>());
  std::fill_n(scanned_.begin(), n, 0);
  scanned_cols_.clear();
  Cost reached{};
  int64_t i = row;
  while (true) {
    const Cost* costs = cost + i * n;
    const Cost base = reached - row_potential_[i];
    Cost best = forbidden<Cost>();
    int64_t best_col = -1;
    for (int64_t j = 0; j < n; ++j) {
      if (scanned_[j]) continue;
      const Cost d = base + (costs[j] - col_potential_[j]);
      if (d < distance_[j]) {
        distance_[j] = d;
        parent_[j] = i;
      }
      const bool shorter = distance_[j] < best;
      const bool as_short = best_col >= 0 && !(best < distance_[j]);
      if (shorter || (as_short && row_of_col_[best_col] >= 0 && row_of_col_[j] < 0)) {
        best = distance_[j];
        best_col = j;
      }
    }
    if (best_col < 0) return -1;
    reached = best;
    scanned_[best_col] = 1;
    scanned_cols_.push_back(best_col);
    if (row_of_col_[best_col] < 0) return best_col;
    i = row_of_col_[best_col];
  }
}

// Keeps every reduced cost non-negative, and those on the new path zero. The end of the path is at distance `length`,
// so the potential of a free column stays 0, which is what makes rectangular problems right.
template <class Cost>
void LsapSolver<Cost>::update_potentials(int64_t row) {
  const Cost length = distance_[scanned_cols_.back()];
  row_potential_[row] = row_potential_[row] + length;
  for (size_t k = 0; k + 1 < scanned_cols_.size(); ++k) {
    const int64_t j = scanned_cols_[k];
    const int64_t i = row_of_col_[j];
    const Cost slack = length - distance_[j];
    row_potential_[i] = row_potential_[i] + slack;
    col_potential_[j] = col_potential_[j] - slack;
  }
}

template <class Cost>
bool LsapSolver<Cost>::solve_wide(const Cost* cost, int64_t m, int64_t n, int64_t* col_of_row) {
  std::fill_n(row_potential_.begin(), m, Cost{});
  std::fill_n(col_potential_.begin(), n, Cost{});
  std::fill_n(row_of_col_.begin(), n, -1);
  std::fill_n(col_of_row, m, -1);
  for (int64_t row = 0; row < m; ++row) {
    int64_t j = shortest_path(cost, n, row);
    if (j < 0) return false;
    update_potentials(row);
    int64_t i;
    do {  // walk back along the path; each row on it hands its column to the row before
      i = parent_[j];
      row_of_col_[j] = i;
      std::swap(col_of_row[i], j);
    } while (i != row);
  }
  return true;
}

template <class Cost>
bool LsapSolver<Cost>::solve(const Cost* cost, int64_t m, int64_t n, int64_t* col_of_row) {
  reserve(m, n);
  if (m <= n) return solve_wide(cost, m, n, col_of_row);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) transposed_[j * m + i] = cost[i * n + j];
  }
  if (!solve_wide(transposed_.data(), n, m, col_of_row_.data())) return false;
  std::copy_n(row_of_col_.begin(), m, col_of_row);
  return true;
}

CostScan scan_costs(const double* cost, int64_t count) {
  CostScan scan{-1, 0};
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(cost[i]) || cost[i] == -forbidden<double>()) return {i, scan.largest};
    if (std::isfinite(cost[i])) scan.largest = std::max(scan.largest, std::abs(cost[i]));
  }
  return scan;
}

template class LsapSolver<double>;
template class LsapSolver<Lexicographic>;

}  // namespace pr1
