// Linear sum assignment: one problem, one thread, no Python.
//
// Shortest augmenting paths with a warm start, after R. Jonker and A. Volgenant, "A shortest augmenting path algorithm
// for dense and sparse linear assignment problems", Computing 38, 1987, pp. 325-340; rectangular as in D. F. Crouse,
// "On implementing 2D rectangular assignment algorithms", IEEE Transactions on Aerospace and Electronic Systems 52(4),
// 2016, pp. 1679-1696. The algorithm is solve.h, compiled once per instruction set by kernels.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace pr1 {

enum class Status {
  kSolved,
  kBadCost,     // a NaN or -inf
  kInfeasible,  // every complete assignment holds a forbidden (+inf) pair
  kTooLarge,    // sums of these costs overflow T, or (float) would round costs that are whole numbers
};

// Room for at least as many values as were asked for last; 64-byte aligned. Grows, never shrinks; contents are lost.
template <class T>
class Buffer {
 public:
  T* reserve(int64_t count) {
    if (count > room_) {
      room_ = count + count / 2;
      data_.reset(static_cast<T*>(::operator new(room_ * sizeof(T), std::align_val_t(64))));
    }
    return data_.get();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t room_ = 0;
};

// Workspace of the solver, kept from problem to problem; one per thread. k = min(m, n) rows after the transposition
// that makes a problem no taller than wide, s = max(m, n) rounded up to whole vectors.
template <class T>
struct Work {
  Buffer<T> cost;                                   // (k, s), filled up with +inf
  Buffer<T> potential;                              // (s,) v: a row's pair attains the row's least cost - v
  Buffer<T> distance, working, parent;              // (s,) of one search
  Buffer<T> scanned_distance;                       // (k,)
  Buffer<int32_t> row_of_col, col_of_row;           // (s,), (k,); -1: free
  Buffer<int32_t> free_rows, scanned;               // (k,) lists
  Buffer<uint64_t> free_cols;                       // bit j % 64 of word j / 64
};

// cost: row-major (m, n), +inf forbids a pair; m and n below 2^24. The answer lies in work.col_of_row when m <= n, else
// in work.row_of_col with rows and columns exchanged; see col_of below.
template <class T>
using Solve = Status (*)(const T* cost, int m, int n, Work<T>& work);

// The column of row i of an (m, n) problem just solved, or -1.
template <class T>
int32_t col_of(const Work<T>& work, int m, int n, int i) {
  return m <= n ? work.col_of_row.get()[i] : work.row_of_col.get()[i];
}

}  // namespace pr1
