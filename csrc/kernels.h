// The compiled instruction sets and the choice among them.
#pragma once

#include "lsap.h"
#include "match.h"

namespace pr1 {

struct Kernels {
  const char* name;
  Solve<float> solve_float;
  Solve<double> solve_double;
  MatchOne match;
};

// The best that this machine runs, or the one that the environment variable PR1_ISA names (avx512, avx2, scalar).
// Throws std::invalid_argument if that is unknown or cannot run here.
const Kernels& choose_kernels();

}  // namespace pr1
