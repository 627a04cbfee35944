// Compiles lanes.h, solve.h and tile.h for each instruction set. Nothing but the functions between push and pop may use
// its instructions: per-file compiler flags would leak them into inline functions of the standard library, which the
// linker shares with files that run everywhere. So every header is included before.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#define PR1_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define PR1_X86 1
#include <immintrin.h>
#if !defined(__clang__)
// _mm512_undefined_ps of the compiler's own headers is uninitialized on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

namespace pr1 {

#define PR1_BITS 0
namespace in_scalar {
#include "lanes.h"
#include "solve.h"
#include "tile.h"
}  // namespace in_scalar
#undef PR1_BITS

#if PR1_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,lzcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,lzcnt")
#endif
#define PR1_BITS 256
namespace in_avx2 {
#include "lanes.h"
#include "solve.h"
#include "tile.h"
}  // namespace in_avx2
#undef PR1_BITS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,bmi,bmi2,lzcnt"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,bmi,bmi2,lzcnt")
#endif
#define PR1_BITS 512
namespace in_avx512 {
#include "lanes.h"
#include "solve.h"
#include "tile.h"
}  // namespace in_avx512
#undef PR1_BITS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // PR1_X86

namespace {

const Kernels kScalar{"scalar", in_scalar::solve<float>, in_scalar::solve<double>, in_scalar::match_one};
#if PR1_X86
const Kernels kAvx2{"avx2", in_avx2::solve<float>, in_avx2::solve<double>, in_avx2::match_one};
const Kernels kAvx512{"avx512", in_avx512::solve<float>, in_avx512::solve<double>, in_avx512::match_one};

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
const Kernels kAvx2{"avx2", nullptr, nullptr, nullptr}, kAvx512{"avx512", nullptr, nullptr, nullptr};
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

}  // namespace

const Kernels& choose_kernels() {
  static const bool avx2 = has_avx2(), avx512 = has_avx512();
  const char* forced = std::getenv("PR1_ISA");
  if (!forced || !*forced) return avx512 ? kAvx512 : avx2 ? kAvx2 : kScalar;
  const std::string name = forced;
  if (name == "scalar") return kScalar;
  if (name != "avx2" && name != "avx512") {
    throw std::invalid_argument("PR1_ISA=" + name + " is unknown; it takes avx512, avx2 or scalar");
  }
  if (!(name == "avx2" ? avx2 : avx512)) {
    throw std::invalid_argument("PR1_ISA=" + name + ": this machine does not run it; unset it or use PR1_ISA=scalar");
  }
  return name == "avx2" ? kAvx2 : kAvx512;
}

}  // namespace pr1
