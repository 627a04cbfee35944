// Threads that live as long as the process and share out the problems of a batch. No Python.
#pragma once

#include <cstdint>
#include <functional>

namespace pr1 {

// The environment's answer to how many threads a batch may use: PR1_THREADS, else OMP_NUM_THREADS (which torchrun
// sets), else the cores this process may run on, at most 16. Throws std::invalid_argument if PR1_THREADS is no number
// from 1 to 1024.
int thread_count();

// Calls work(begin, end) over [0, count) in blocks of at most `block`, on up to `threads` threads, the caller being one of
// them, and returns when all is done. `work` must not throw. Work that takes less than about kWorthThreads nanoseconds
// (`estimate`) stays on the calling thread, since waking others takes as long; so does a call made while another one
// has the pool. A process made by fork() gets threads of its own.
constexpr double kWorthThreads = 2e5;
constexpr double kBlockNanoseconds = 2e4;  // a block is no longer than this, unless one item is
void parallel_for(int64_t count, int64_t block, double estimate, int threads,
                  const std::function<void(int64_t, int64_t)>& work);

}  // namespace pr1
