// Linear sum assignment: the shortest augmenting path method of D. F. Crouse, "On implementing 2D rectangular
// assignment algorithms", IEEE Transactions on Aerospace and Electronic Systems 52(4), 2016, pp. 1679-1696, after
// R. Jonker and A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems",
// Computing 38, 1987, pp. 325-340. No Python here.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace pr1 {

// A cost of two ranks: any difference in `first` outweighs every difference in `second`. Counting the illegal pairs in
// `first` finds the cheapest assignment among those with the most legal pairs, without a large constant that would eat
// the precision of the costs. `first` holds small integers, so it is exact.
struct Lexicographic {
  double first = 0;
  double second = 0;
};

inline Lexicographic operator+(Lexicographic a, Lexicographic b) { return {a.first + b.first, a.second + b.second}; }
inline Lexicographic operator-(Lexicographic a, Lexicographic b) { return {a.first - b.first, a.second - b.second}; }
inline bool operator<(Lexicographic a, Lexicographic b) {
  return a.first < b.first || (a.first == b.first && a.second < b.second);
}

template <class Cost>
constexpr Cost forbidden();  // larger than any sum of costs
template <>
constexpr double forbidden<double>() {
  return std::numeric_limits<double>::infinity();
}
template <>
constexpr Lexicographic forbidden<Lexicographic>() {
  return {std::numeric_limits<double>::infinity(), 0};
}

// Solver and its workspace. The workspace grows to the largest problem seen and is reused; one object per thread.
template <class Cost>
class LsapSolver {
 public:
  // cost: row-major (m, n), no NaN, no -inf; +inf forbids a pair. Sums of 2 * min(m, n) costs must not overflow.
  // Writes the column of each row, or -1, to col_of_row[0..m): min(m, n) pairs of least total cost.
  // Returns false, with col_of_row unspecified, when every complete assignment holds a forbidden pair.
  // Equal choices: the shorter side (rows when m == n) is assigned in index order; a shortest path ends in a free
  // column before it passes through a taken one of the same length, and takes the lowest index among equals.
  bool solve(const Cost* cost, int64_t m, int64_t n, int64_t* col_of_row);

 private:
  void reserve(int64_t m, int64_t n);
  bool solve_wide(const Cost* cost, int64_t m, int64_t n, int64_t* col_of_row);
  int64_t shortest_path(const Cost* cost, int64_t n, int64_t row);
  void update_potentials(int64_t row);

  std::vector<Cost> transposed_;
  std::vector<Cost> row_potential_, col_potential_;  // u, v: cost - u - v >= 0, and = 0 on assigned pairs
  std::vector<Cost> distance_;                       // of each column from the row being assigned, in reduced costs
  std::vector<int64_t> parent_;                      // the row before each column on its shortest path
  std::vector<int64_t> row_of_col_, col_of_row_;     // -1: free
  std::vector<char> scanned_;                        // the column's distance is final
  std::vector<int64_t> scanned_cols_;                // in order of distance; the last one is the end of the path
};

// What a cost matrix holds, found in one pass.
struct CostScan {
  int64_t bad;     // index of the first NaN or -inf, or -1
  double largest;  // largest magnitude of the finite costs
};
CostScan scan_costs(const double* cost, int64_t count);

extern template class LsapSolver<double>;
extern template class LsapSolver<Lexicographic>;

}  // namespace pr1
