// Python's view of csrc/. pr1/matcher.py checks types and shapes and is the only caller; here the values are checked,
// the GIL is released around each batch, and a bad problem becomes a ValueError that names it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "batch.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;  // bound with noconvert: the caller passes the exact dtype

void raise_if_failed(const pr1::Failure& failure) {
  if (failure.problem >= 0) throw py::value_error("problem " + std::to_string(failure.problem) + ": " + failure.what);
}

pr1::CostMatrix matrix(const py::array& costs, int first_axis) {
  const bool is_double = py::isinstance<py::array_t<double>>(costs);
  return {costs.data(), is_double, costs.shape(first_axis), costs.shape(first_axis + 1)};
}

// Returns (rows, cols, offsets).
py::tuple assign(const std::vector<pr1::CostMatrix>& problems) {
  Array<int64_t> offsets(problems.size() + 1);
  const int64_t total = pr1::assignment_offsets(problems, offsets.mutable_data());
  Array<int64_t> rows(total), cols(total);
  int64_t *row_out = rows.mutable_data(), *col_out = cols.mutable_data();
  const int64_t* starts = offsets.data();
  const pr1::Settings settings = pr1::Settings::from_environment();
  pr1::Failure failure;
  {
    py::gil_scoped_release release;
    failure = pr1::assign_batch(problems, starts, row_out, col_out, settings);
  }
  raise_if_failed(failure);
  return py::make_tuple(rows, cols, offsets);
}

// stack: (B, m, n) C-contiguous float32 or float64.
py::tuple assign_stack(const py::array& stack) {
  std::vector<pr1::CostMatrix> problems(stack.shape(0), matrix(stack, 1));
  const int64_t step = stack.shape(1) * stack.shape(2) * stack.itemsize();
  for (size_t b = 0; b < problems.size(); ++b) {
    problems[b].costs = static_cast<const char*>(problems[b].costs) + b * step;
  }
  return assign(problems);
}

// list: (m, n) C-contiguous float32 or float64 arrays.
py::tuple assign_list(const std::vector<py::array>& list) {
  std::vector<pr1::CostMatrix> problems;
  problems.reserve(list.size());
  for (const py::array& costs : list) problems.push_back(matrix(costs, 0));
  return assign(problems);
}

// One side of a batch of matching problems.
struct BoxBatch {
  Array<double> boxes;
  Array<int64_t> labels, offsets;
  std::optional<Array<bool>> ignore;

  pr1::BoxBatch view() const {
    return {boxes.data(), labels.data(), ignore ? ignore->data() : nullptr, offsets.data()};
  }
};

// Returns the fields of pr1.matcher.Match.
py::tuple match_batch(const BoxBatch& pred, const BoxBatch& gt, const Array<double>& sizes,
                      const pr1::MatchWeights& weights) {
  const int64_t batch = sizes.shape(0);
  const pr1::BoxBatch p = pred.view(), g = gt.view();
  Array<int64_t> offsets(batch + 1), table_offsets(batch + 1);
  pr1::match_offsets(p, g, batch, offsets.mutable_data(), table_offsets.mutable_data());
  const int64_t room = offsets.data()[batch];
  Array<int64_t> rows(room), cols(room);
  Array<double> iou(room), table(table_offsets.data()[batch]);
  Array<bool> ignored(pred.boxes.shape(0));
  const pr1::MatchOutput out{rows.mutable_data(), cols.mutable_data(),  offsets.mutable_data(),      iou.mutable_data(),
                             table.mutable_data(), table_offsets.data(), ignored.mutable_data()};
  const double* size = sizes.data();
  const pr1::Settings settings = pr1::Settings::from_environment();
  pr1::Failure failure;
  {
    py::gil_scoped_release release;
    failure = pr1::match_batch(p, g, size, batch, weights, settings, out);
  }
  raise_if_failed(failure);
  const py::slice used(0, offsets.data()[batch], 1);
  return py::make_tuple(rows[used], cols[used], offsets, iou[used], table, table_offsets, ignored);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Batched assignment and box matching. Called through pr1.matcher.";
  m.def("assign_stack", &assign_stack);
  m.def("assign_list", &assign_list);
  m.def("settings", [] {
    const pr1::Settings s = pr1::Settings::from_environment();
    return py::make_tuple(s.kernels->name, s.threads);
  });
  py::class_<BoxBatch>(m, "BoxBatch")
      .def(py::init<Array<double>, Array<int64_t>, Array<int64_t>, std::optional<Array<bool>>>(),
           py::arg("boxes").noconvert(), py::arg("labels").noconvert(), py::arg("offsets").noconvert(),
           py::arg("ignore").noconvert());
  py::class_<pr1::MatchWeights>(m, "MatchWeights")
      .def(py::init<double, double, double, bool, double>(), py::arg("l1"), py::arg("giou"), py::arg("cls"),
           py::arg("forbid_other_class"), py::arg("min_iou"));
  m.def("match_batch", &match_batch);
}
