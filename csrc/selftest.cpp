// The matcher without Python, for the sanitizers (CMakeLists.txt, SANITIZE): every instruction set of this machine
// against brute force, in blocks of memory that end where the costs end, then from several threads at once.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "batch.h"
#include "pool.h"

namespace {

using pr1::Settings;

void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "selftest: %s\n", what);
  std::exit(1);
}

struct Answer {
  std::vector<int64_t> rows, cols, offsets;
  std::vector<double> iou, table;  // of a match
  std::vector<bool> ignored;
  pr1::Failure failure;
  bool operator==(const Answer& other) const {
    return rows == other.rows && cols == other.cols && offsets == other.offsets && iou == other.iou &&
           table == other.table && ignored == other.ignored;
  }
};

Answer assign(const std::vector<pr1::CostMatrix>& problems, const Settings& settings) {
  Answer answer;
  answer.offsets.resize(problems.size() + 1);
  const int64_t total = pr1::assignment_offsets(problems, answer.offsets.data());
  answer.rows.resize(total);
  answer.cols.resize(total);
  answer.failure =
      pr1::assign_batch(problems, answer.offsets.data(), answer.rows.data(), answer.cols.data(), settings);
  return answer;
}

// Least total of an (m, n) matrix, m <= n <= 6, over all orders of its columns.
template <class T>
double brute_force(const T* cost, int m, int n) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  double best = std::numeric_limits<double>::infinity();
  do {
    double total = 0;
    for (int i = 0; i < m; ++i) total += cost[i * n + order[i]];
    best = std::min(best, total);
  } while (std::next_permutation(order.begin(), order.end()));
  return best;
}

template <class T>
void check_small(const Settings& settings, std::mt19937& random) {
  for (int round = 0; round < 300; ++round) {
    const int m = random() % 6, n = m + random() % (6 - m), largest = 1 + random() % 20;
    std::vector<T> wide(m * n), tall(m * n);
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        const bool forbid = round % 3 == 0 && random() % 4 == 0;
        tall[j * m + i] = wide[i * n + j] = forbid ? std::numeric_limits<T>::infinity() : T(random() % largest);
      }
    }
    constexpr bool is_double = sizeof(T) == sizeof(double);
    const double best = m ? brute_force(wide.data(), m, n) : 0;
    for (const bool transpose : {false, true}) {
      const pr1::CostMatrix problem{transpose ? tall.data() : wide.data(), is_double, transpose ? n : m,
                                    transpose ? m : n};
      const Answer answer = assign({problem}, settings);
      check((answer.failure.problem < 0) == (best < std::numeric_limits<double>::infinity()), "feasible or not");
      if (answer.failure.problem >= 0) continue;
      double total = 0;
      const T* costs = static_cast<const T*>(problem.costs);
      for (int k = 0; k < m; ++k) total += costs[answer.rows[k] * problem.n + answer.cols[k]];
      check(total == best, "not the least total");
    }
  }
}

// Problems of many sizes, which all must be solved alike by every instruction set and number of threads.
struct Mixture {
  std::vector<std::vector<float>> costs;
  std::vector<pr1::CostMatrix> problems;
  std::vector<double> boxes, sizes;
  std::vector<int64_t> labels, offsets{0};
  std::vector<char> flags;

  explicit Mixture(std::mt19937& random) {
    for (int b = 0; b < 200; ++b) {
      const int m = random() % 71, n = b % 50 ? random() % 71 : 130;
      costs.emplace_back(m * n);
      for (float& c : costs.back()) c = b % 2 ? random() % 10 : random() * 1e-9f;
      problems.push_back({costs.back().data(), false, m, n});
      for (int i = 0; i < m; ++i) {
        const double x = random() % 100, y = random() % 100;
        for (const double v : {x, y, x + random() % 60, y + random() % 60}) boxes.push_back(v);
        labels.push_back(random() % 3);
        flags.push_back(random() % 8 == 0);
      }
      offsets.push_back(labels.size());
      for (int k = 0; k < 2; ++k) sizes.push_back(160);
    }
  }

  Answer match(const pr1::MatchWeights& weights, const Settings& settings) const {
    // Each problem's boxes against those of the next one as ground truth, with ignore flags.
    const pr1::BoxBatch pred{boxes.data(), labels.data(), nullptr, offsets.data()};
    const bool* ignore = reinterpret_cast<const bool*>(flags.data());
    const pr1::BoxBatch gt{boxes.data(), labels.data(), ignore, offsets.data() + 1};
    const int64_t batch = offsets.size() - 2;
    Answer answer;
    answer.offsets.resize(batch + 1);
    std::vector<int64_t> table_offsets(batch + 1);
    pr1::match_offsets(pred, gt, batch, answer.offsets.data(), table_offsets.data());
    answer.rows.resize(answer.offsets[batch]);
    answer.cols.resize(answer.offsets[batch]);
    answer.iou.resize(answer.offsets[batch]);
    answer.table.resize(table_offsets[batch]);
    const auto ignored = std::make_unique<bool[]>(labels.size());
    answer.failure = pr1::match_batch(pred, gt, sizes.data(), batch, weights, settings,
                                      {answer.rows.data(), answer.cols.data(), answer.offsets.data(),
                                       answer.iou.data(), answer.table.data(), table_offsets.data(), ignored.get()});
    answer.rows.resize(answer.offsets[batch]);
    answer.cols.resize(answer.offsets[batch]);
    answer.iou.resize(answer.offsets[batch]);
    answer.ignored.assign(ignored.get(), ignored.get() + labels.size());
    return answer;
  }
};

}  // namespace

int main() {
  std::mt19937 random(1);
  const Mixture mixture(random);
  const pr1::MatchWeights walls{5, 2, 0, true, 0.3}, open{5, 2, 2, false, 0};
  std::vector<Answer> expected;
  for (const char* isa : {"scalar", "avx2", "avx512"}) {
    setenv("PR1_ISA", isa, 1);
    Settings settings;
    try {
      settings = Settings::from_environment();
    } catch (const std::invalid_argument& error) {
      std::printf("%s left out: %s\n", isa, error.what());
      continue;
    }
    check_small<float>(settings, random);
    check_small<double>(settings, random);
    // Two callers at a time: one gets the pool, the other works alone.
    for (const int threads : {1, 2, 4}) {
      settings.threads = threads;
      const auto all = [&] {
        return std::vector<Answer>{assign(mixture.problems, settings), mixture.match(walls, settings),
                                   mixture.match(open, settings)};
      };
      std::vector<Answer> here, there;
      for (int round = 0; round < 5; ++round) {
        std::thread other([&] { there = all(); });
        here = all();
        other.join();
        if (expected.empty()) expected = here;
        check(here == expected && there == expected, "threads or instruction sets disagree");
      }
    }
    std::printf("%s ok\n", isa);
  }
}
