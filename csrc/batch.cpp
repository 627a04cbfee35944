#include "batch.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "pool.h"

namespace pr1 {
namespace {

constexpr int64_t kMostBoxes = 1 << 24;  // an index must be exact as a float
constexpr int64_t kBlock = 16;           // problems a thread takes at a time
constexpr double kDownscale = 0x1p-80;   // exact, and leaves room for any sum

// A workspace that is put away when its thread ends.
struct ThreadWork {
  Work<float> single;
  Work<double> both;
  MatchWork match;
  Buffer<double> widened;
};

ThreadWork& thread_work() {
  thread_local ThreadWork work;
  return work;
}

// Lowers `first` to `problem`; true for problems that may still be the first to fail.
void report(std::atomic<int64_t>& first, int64_t problem) {
  int64_t seen = first.load(std::memory_order_relaxed);
  while (problem < seen && !first.compare_exchange_weak(seen, problem, std::memory_order_relaxed)) {
  }
}

// The problem in float64, scaled down if need be.
Status solve_widened(const CostMatrix& p, double scale, const Kernels& kernels, ThreadWork& work) {
  const int64_t count = p.m * p.n;
  double* costs = work.widened.reserve(count);
  for (int64_t k = 0; k < count; ++k) {
    const double c = p.is_double ? static_cast<const double*>(p.costs)[k] : static_cast<const float*>(p.costs)[k];
    costs[k] = c * scale;
  }
  return kernels.solve_double(costs, p.m, p.n, work.both);
}

template <class T>
void write_pairs(const Work<T>& work, int m, int n, int64_t* rows, int64_t* cols) {
  if (m <= n) {
    for (int i = 0; i < m; ++i) {
      rows[i] = i;
      cols[i] = work.col_of_row.get()[i];
    }
    return;
  }
  for (int i = 0, k = 0; k < n; ++i) {
    const int32_t col = work.row_of_col.get()[i];
    if (col < 0) continue;
    rows[k] = i;
    cols[k++] = col;
  }
}

Status assign_one(const CostMatrix& p, const Kernels& kernels, int64_t* rows, int64_t* cols) {
  if (p.m == 0 || p.n == 0) return Status::kSolved;
  ThreadWork& work = thread_work();
  Status status = Status::kTooLarge;
  if (!p.is_double) {
    status = kernels.solve_float(static_cast<const float*>(p.costs), p.m, p.n, work.single);
    if (status == Status::kSolved) write_pairs(work.single, p.m, p.n, rows, cols);
    if (status == Status::kTooLarge) status = solve_widened(p, 1.0, kernels, work);
    else return status;
  } else {
    status = kernels.solve_double(static_cast<const double*>(p.costs), p.m, p.n, work.both);
    if (status == Status::kTooLarge) status = solve_widened(p, kDownscale, kernels, work);
  }
  if (status == Status::kSolved) write_pairs(work.both, p.m, p.n, rows, cols);
  return status;
}

double cost_at(const CostMatrix& p, int64_t k) {
  return p.is_double ? static_cast<const double*>(p.costs)[k] : static_cast<const float*>(p.costs)[k];
}

std::string explain(const CostMatrix& p) {
  for (int64_t k = 0; k < p.m * p.n; ++k) {
    const double c = cost_at(p, k);
    if (!std::isnan(c) && !(std::isinf(c) && c < 0)) continue;
    const std::string where = "cost[" + std::to_string(k / p.n) + ", " + std::to_string(k % p.n) + "]";
    return where + " is " + (std::isnan(c) ? "NaN" : "-inf") + "; costs must be finite, or +inf to forbid a pair";
  }
  return "every complete assignment holds a forbidden (+inf) pair";
}

}  // namespace

Settings Settings::from_environment() { return {&choose_kernels(), thread_count()}; }

int64_t assignment_offsets(const std::vector<CostMatrix>& problems, int64_t* offsets) {
  offsets[0] = 0;
  for (size_t b = 0; b < problems.size(); ++b) offsets[b + 1] = offsets[b] + std::min(problems[b].m, problems[b].n);
  return offsets[problems.size()];
}

Failure assign_batch(const std::vector<CostMatrix>& problems, const int64_t* offsets, int64_t* rows, int64_t* cols,
                     const Settings& settings) {
  const int64_t batch = problems.size();
  double estimate = 0;
  for (int64_t b = 0; b < batch; ++b) {
    if (std::max(problems[b].m, problems[b].n) >= kMostBoxes) return {b, "a side has 2^24 entries or more"};
    estimate += 100 + 2.0 * problems[b].m * problems[b].n;  // nanoseconds, roughly
  }
  std::atomic<int64_t> first_bad{batch};
  parallel_for(batch, kBlock, estimate, settings.threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end && b < first_bad.load(std::memory_order_relaxed); ++b) {
      const Status status = assign_one(problems[b], *settings.kernels, rows + offsets[b], cols + offsets[b]);
      if (status != Status::kSolved) report(first_bad, b);
    }
  });
  const int64_t bad = first_bad.load();
  return bad == batch ? Failure{} : Failure{bad, explain(problems[bad])};
}

void match_offsets(const BoxBatch& pred, const BoxBatch& gt, int64_t batch, int64_t* offsets, int64_t* table_offsets) {
  offsets[0] = table_offsets[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t m = pred.offsets[b + 1] - pred.offsets[b], n = gt.offsets[b + 1] - gt.offsets[b];
    offsets[b + 1] = offsets[b] + std::min(m, n);
    table_offsets[b + 1] = table_offsets[b] + m * n;
  }
}

Failure match_batch(const BoxBatch& pred, const BoxBatch& gt, const double* sizes, int64_t batch,
                    const MatchWeights& weights, const Settings& settings, const MatchOutput& out) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t most = std::max(pred.offsets[b + 1] - pred.offsets[b], gt.offsets[b + 1] - gt.offsets[b]);
    if (most >= kMostBoxes) return {b, "2^24 boxes or more"};
  }
  std::fill_n(out.ignored, pred.offsets[batch], false);
  std::vector<int64_t> pairs(batch);
  std::atomic<int64_t> first_bad{batch};
  const double estimate = 200.0 * batch + 2.0 * out.table_offsets[batch];
  parallel_for(batch, kBlock, estimate, settings.threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end && b < first_bad.load(std::memory_order_relaxed); ++b) {
      const MatchProblem problem{pred.problem(b), gt.problem(b), sizes[2 * b], sizes[2 * b + 1]};
      const int64_t room = out.offsets[b];
      MatchResult result{out.table + out.table_offsets[b], out.ignored + pred.offsets[b],
                         out.rows + room,                  out.cols + room,
                         out.iou + room,                   0};
      if (settings.kernels->match(problem, weights, thread_work().match, result)) {
        pairs[b] = result.pairs;
      } else {
        report(first_bad, b);
      }
    }
  });
  if (const int64_t bad = first_bad.load(); bad < batch) {
    const BoxList boxes = gt.problem(bad);
    int j = 0;
    while (in_range(boxes.boxes + 4 * static_cast<int64_t>(j))) ++j;
    const std::string box = "ground truth box " + std::to_string(j);
    return {bad, box + " has a coordinate that is NaN, infinite or beyond 1e6 pixels"};
  }
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b) {  // close the gaps that unmatched boxes left
    const int64_t room = out.offsets[b];
    out.offsets[b] = total;
    if (room != total) {
      std::copy_n(out.rows + room, pairs[b], out.rows + total);
      std::copy_n(out.cols + room, pairs[b], out.cols + total);
      std::copy_n(out.iou + room, pairs[b], out.iou + total);
    }
    total += pairs[b];
  }
  out.offsets[batch] = total;
  return {};
}

}  // namespace pr1
