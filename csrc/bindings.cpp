// Python's view of csrc/. pr1/matcher.py checks types and shapes and is the only caller; here the values are checked,
// the GIL is released around each batch, and a bad problem becomes a ValueError that names it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "lsap.h"
#include "match.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;  // bound with noconvert: the caller passes the exact dtype

// Twice the number of pairs times this stays finite; larger costs are solved scaled by a power of two, which is exact.
constexpr double kLargestUnscaled = 1e290;
constexpr double kDownscale = 0x1p-80;

struct Failure {
  int64_t problem = -1;  // -1: none
  std::string what;
};

void raise_if_failed(const Failure& failure) {
  if (failure.problem >= 0) throw py::value_error("problem " + std::to_string(failure.problem) + ": " + failure.what);
}

std::vector<int64_t> running_sum(const std::vector<int64_t>& counts) {
  std::vector<int64_t> offsets(counts.size() + 1, 0);
  for (size_t i = 0; i < counts.size(); ++i) offsets[i + 1] = offsets[i] + counts[i];
  return offsets;
}

template <class T>
Array<T> to_array(const std::vector<T>& values) {
  return Array<T>(values.size(), values.data());
}

std::string name_bad_cost(double value, int64_t index, int64_t n) {
  const std::string where = "cost[" + std::to_string(index / n) + ", " + std::to_string(index % n) + "]";
  return where + " is " + (std::isnan(value) ? "NaN" : "-inf") + "; costs must be finite, or +inf to forbid a pair";
}

// costs: all problems one after another, row-major; shapes: (B, 2). Returns (rows, cols, offsets).
py::tuple assign_batch(const Array<double>& costs, const Array<int64_t>& shapes) {
  const int64_t batch = shapes.shape(0);
  const int64_t* shape = shapes.data();
  std::vector<int64_t> counts(batch);
  for (int64_t b = 0; b < batch; ++b) counts[b] = std::min(shape[2 * b], shape[2 * b + 1]);
  const std::vector<int64_t> offsets = running_sum(counts);
  Array<int64_t> rows(offsets[batch]), cols(offsets[batch]);
  int64_t* row_out = rows.mutable_data();
  int64_t* col_out = cols.mutable_data();
  const double* cost = costs.data();
  Failure failure;
  {
    py::gil_scoped_release release;
    pr1::LsapSolver<double> solver;
    std::vector<int64_t> col_of_row;
    std::vector<double> scaled;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t m = shape[2 * b], n = shape[2 * b + 1];
      const pr1::CostScan scan = pr1::scan_costs(cost, m * n);
      if (scan.bad >= 0) {
        failure = {b, name_bad_cost(cost[scan.bad], scan.bad, n)};
        break;
      }
      const double* solved = cost;
      if (scan.largest > kLargestUnscaled) {
        scaled.resize(m * n);
        std::transform(cost, cost + m * n, scaled.begin(), [](double c) { return c * kDownscale; });
        solved = scaled.data();
      }
      col_of_row.resize(m);
      if (!solver.solve(solved, m, n, col_of_row.data())) {
        failure = {b, "every complete assignment holds a forbidden (+inf) pair"};
        break;
      }
      for (int64_t i = 0; i < m; ++i) {
        if (col_of_row[i] < 0) continue;
        *row_out++ = i;
        *col_out++ = col_of_row[i];
      }
      cost += m * n;
    }
  }
  raise_if_failed(failure);
  return py::make_tuple(rows, cols, to_array(offsets));
}

// One side of a batch of matching problems.
struct BoxBatch {
  Array<double> boxes;
  Array<int64_t> labels, offsets;
  std::optional<Array<bool>> ignore;

  pr1::BoxList problem(int64_t b) const {
    const int64_t start = offsets.data()[b];
    const bool* flags = ignore ? ignore->data() + start : nullptr;
    return {boxes.data() + 4 * start, labels.data() + start, flags, offsets.data()[b + 1] - start};
  }
};

py::tuple match_batch(const BoxBatch& pred, const BoxBatch& gt, const Array<double>& sizes,
                      const pr1::MatchWeights& weights) {
  const int64_t batch = sizes.shape(0);
  std::vector<int64_t> room(batch), table_sizes(batch), pairs(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t m = pred.problem(b).count, n = gt.problem(b).count;
    room[b] = std::min(m, n);
    table_sizes[b] = m * n;
  }
  const std::vector<int64_t> room_offsets = running_sum(room), table_offsets = running_sum(table_sizes);
  std::vector<int64_t> rows(room_offsets[batch]), cols(room_offsets[batch]);
  std::vector<double> iou(room_offsets[batch]);
  Array<double> table(table_offsets[batch]);
  double* table_out = table.mutable_data();
  int64_t total = 0;
  Failure failure;
  {
    py::gil_scoped_release release;
    pr1::Matcher matcher;
    for (int64_t b = 0; b < batch; ++b) {
      const pr1::BoxList p = pred.problem(b), g = gt.problem(b);
      const int64_t bad = pr1::find_bad_box(g);
      if (bad >= 0) {
        const std::string box = "ground truth box " + std::to_string(bad);
        failure = {b, box + " has a coordinate that is NaN, infinite or beyond 1e6 pixels"};
        break;
      }
      double* problem_table = table_out + table_offsets[b];
      pairs[b] = matcher.match(p, g, sizes.data()[2 * b], sizes.data()[2 * b + 1], weights, problem_table,
                               rows.data() + total, cols.data() + total);
      for (int64_t k = total; k < total + pairs[b]; ++k) iou[k] = problem_table[rows[k] * g.count + cols[k]];
      total += pairs[b];
    }
  }
  raise_if_failed(failure);
  rows.resize(total);
  cols.resize(total);
  iou.resize(total);
  return py::make_tuple(to_array(rows), to_array(cols), to_array(running_sum(pairs)), to_array(iou), table,
                        to_array(table_offsets));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Batched assignment and box matching. Called through pr1.matcher.";
  m.def("assign_batch", &assign_batch, py::arg("costs").noconvert(), py::arg("shapes").noconvert());
  py::class_<BoxBatch>(m, "BoxBatch")
      .def(py::init<Array<double>, Array<int64_t>, Array<int64_t>, std::optional<Array<bool>>>(),
           py::arg("boxes").noconvert(), py::arg("labels").noconvert(), py::arg("offsets").noconvert(),
           py::arg("ignore").noconvert());
  py::class_<pr1::MatchWeights>(m, "MatchWeights")
      .def(py::init<double, double, double, bool, double>(), py::arg("l1"), py::arg("giou"), py::arg("cls"),
           py::arg("forbid_other_class"), py::arg("min_iou"));
  m.def("match_batch", &match_batch);
}
