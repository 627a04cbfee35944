#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

namespace pr1 {
namespace {

constexpr int kMostByDefault = 16;

int cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(CPU_COUNT(&set), 1);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// 0: not a number from 1 to 1024.
int parse_count(const char* text) {
  char* end;
  const long value = std::strtol(text, &end, 10);
  return *text && !*end && value >= 1 && value <= 1024 ? static_cast<int>(value) : 0;
}

class Pool {
 public:
  explicit Pool(pid_t owner) : owner_(owner) {}
  pid_t owner() const { return owner_; }

  // False if another call has the pool.
  bool run(int64_t count, int64_t block, int helpers, const std::function<void(int64_t, int64_t)>& work) {
    std::unique_lock<std::mutex> call(call_, std::try_to_lock);
    if (!call.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; spawned_ < helpers; ++spawned_) std::thread(&Pool::serve, this, spawned_).detach();
      } catch (const std::system_error&) {  // no more threads to be had: those there are will do
      }
      work_ = &work;
      count_ = count;
      block_ = block;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = std::min(helpers, spawned_);
      running_ = wanted_;
      ++round_;
    }
    wake_.notify_all();
    drain(work);
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void drain(const std::function<void(int64_t, int64_t)>& work) {
    for (int64_t begin; (begin = next_.fetch_add(block_, std::memory_order_relaxed)) < count_;) {
      work(begin, std::min(begin + block_, count_));
    }
  }

  void serve(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (index >= wanted_) continue;
      const auto& work = *work_;
      lock.unlock();
      drain(work);
      lock.lock();
      if (--running_ == 0) idle_.notify_one();
    }
  }

  const pid_t owner_;
  std::mutex call_;   // held for the whole of one call
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, idle_;
  const std::function<void(int64_t, int64_t)>* work_ = nullptr;
  int64_t count_ = 0, block_ = 1;  // constant while running_ > 0
  int spawned_ = 0, wanted_ = 0, running_ = 0;
  uint64_t round_ = 0;
  std::atomic<int64_t> next_{0};
};

// The pool of this process. Never destroyed: its threads may outlive static objects. After fork() the parent's threads
// do not exist and its locks may be held for ever, so the child leaves that pool alone and makes another.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* pool = current.load(std::memory_order_acquire);
  const pid_t self = getpid();
  while (!pool || pool->owner() != self) {
    Pool* fresh = new Pool(self);
    if (current.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
  }
  return *pool;
}

}  // namespace

int thread_count() {
  if (const char* own = std::getenv("PR1_THREADS"); own && *own) {
    if (const int count = parse_count(own)) return count;
    throw std::invalid_argument(std::string("PR1_THREADS=") + own + " must be a number from 1 to 1024");
  }
  if (const char* omp = std::getenv("OMP_NUM_THREADS")) {
    if (const int count = parse_count(omp)) return count;
  }
  return std::min(cores(), kMostByDefault);
}

void parallel_for(int64_t count, int64_t block, double estimate, int threads,
                  const std::function<void(int64_t, int64_t)>& work) {
  // A few large problems must not all land in one block.
  if (estimate > 0) block = std::clamp<int64_t>(static_cast<int64_t>(count * kBlockNanoseconds / estimate), 1, block);
  const int64_t blocks = (count + block - 1) / block;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, blocks)) - 1;
  if (helpers > 0 && estimate >= kWorthThreads && pool().run(count, block, helpers, work)) return;
  if (count) work(0, count);
}

}  // namespace pr1
