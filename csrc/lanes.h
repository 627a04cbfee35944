// A vector of T and its operations, for one instruction set. Included by kernels.cpp once per set, inside the namespace
// and the target region of that set (hence no include guard); PR1_BITS is 512, 256 or 0 (one value at a time).
//
// W values a vector; V the vector; M the result of a comparison; bits(M) has bit i set where lane i is true; below(n)
// is true for the first n lanes; lane(i, b) for value i, i < 64, of a row that vector b of the row holds. Every set
// does the same additions, multiplications and divisions in the same order, so all give the same result to the last
// bit.

template <class T>
struct Lanes;

#if PR1_BITS == 512

// Written out, because GCC 12.2 may spill a mask that is used as an integer with kmovb or kmovw, which write 8 or 16
// bits, and read 64 bits back; so the integer is made here, and is what is spilled.
PR1_INLINE uint64_t mask_bits(__mmask16 m) {
  uint64_t bits;
  asm("kmovw %1, %k0" : "=r"(bits) : "k"(m));
  return bits;
}
PR1_INLINE uint64_t mask_bits(__mmask8 m) {
  uint64_t bits;
  asm("kmovb %1, %k0" : "=r"(bits) : "k"(m));
  return bits;
}

template <>
struct Lanes<float> {
  static constexpr int W = 16;
  using V = __m512;
  using M = __mmask16;
  static V set1(float x) { return _mm512_set1_ps(x); }
  static float first(V a) { return _mm512_cvtss_f32(a); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(below(n), p); }
  static V abs(V a) { return _mm512_abs_ps(a); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static M lt(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static M eq(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static M not_gt(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NGT_UQ); }  // true of a NaN
  static V select(M m, V yes, V no) { return _mm512_mask_blend_ps(m, no, yes); }
  static uint64_t bits(M m) { return mask_bits(m); }
  static M lane(int i, int b) { return static_cast<M>(uint64_t{1} << i >> (b * W)); }
  static M below(int n) { return static_cast<M>(n >= 16 ? 0xffff : (1u << n) - 1); }
  static V min_of_all(V a) {  // in every lane
    const __m256 b = _mm256_min_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_min_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_min_ps(c, _mm_permute_ps(c, 0x4e));
    return _mm512_broadcastss_ps(_mm_min_ps(c, _mm_permute_ps(c, 0xb1)));
  }
};

template <>
struct Lanes<double> {
  static constexpr int W = 8;
  using V = __m512d;
  using M = __mmask8;
  static V set1(double x) { return _mm512_set1_pd(x); }
  static double first(V a) { return _mm512_cvtsd_f64(a); }
  static V load(const double* p) { return _mm512_loadu_pd(p); }
  static V load_part(const double* p, int n) { return _mm512_maskz_loadu_pd(below(n), p); }
  static void store(double* p, V a) { _mm512_storeu_pd(p, a); }
  static void store_part(double* p, int n, V a) { _mm512_mask_storeu_pd(p, below(n), a); }
  static V add(V a, V b) { return _mm512_add_pd(a, b); }
  static V sub(V a, V b) { return _mm512_sub_pd(a, b); }
  static V mul(V a, V b) { return _mm512_mul_pd(a, b); }
  static V div(V a, V b) { return _mm512_div_pd(a, b); }
  static V abs(V a) { return _mm512_abs_pd(a); }
  static V min(V a, V b) { return _mm512_min_pd(a, b); }
  static V max(V a, V b) { return _mm512_max_pd(a, b); }
  static M lt(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
  static M eq(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
  static M not_gt(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_NGT_UQ); }
  static M same(const int64_t* p, int64_t x) {
    return _mm512_cmpeq_epi64_mask(_mm512_loadu_si512(p), _mm512_set1_epi64(x));
  }
  static V select(M m, V yes, V no) { return _mm512_mask_blend_pd(m, no, yes); }
  static uint64_t bits(M m) { return mask_bits(m); }
  static M lane(int i, int b) { return static_cast<M>(uint64_t{1} << i >> (b * W)); }
  static M below(int n) { return static_cast<M>(n >= 8 ? 0xff : (1u << n) - 1); }
  static V min_of_all(V a) {
    const __m256d b = _mm256_min_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
    const __m128d c = _mm_min_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
    return _mm512_broadcastsd_pd(_mm_min_pd(c, _mm_permute_pd(c, 1)));
  }
};

#elif PR1_BITS == 256

template <>
struct Lanes<float> {
  static constexpr int W = 8;
  using V = __m256;
  using M = __m256;
  static V set1(float x) { return _mm256_set1_ps(x); }
  static float first(V a) { return _mm256_cvtss_f32(a); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load_part(const float* p, int n) { return _mm256_maskload_ps(p, _mm256_castps_si256(below(n))); }
  static V abs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static M lt(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static M eq(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static M not_gt(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_NGT_UQ); }
  static V select(M m, V yes, V no) { return _mm256_blendv_ps(no, yes, m); }
  static uint64_t bits(M m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
  static __m256i iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static M lane(int i, int b) {
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(iota(), _mm256_set1_epi32(i - b * W)));
  }
  static M below(int n) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), iota())); }
  static V min_of_all(V a) {
    __m128 b = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_min_ps(b, _mm_permute_ps(b, 0x4e));
    return _mm256_broadcastss_ps(_mm_min_ps(b, _mm_permute_ps(b, 0xb1)));
  }
};

template <>
struct Lanes<double> {
  static constexpr int W = 4;
  using V = __m256d;
  using M = __m256d;
  static V set1(double x) { return _mm256_set1_pd(x); }
  static double first(V a) { return _mm256_cvtsd_f64(a); }
  static V load(const double* p) { return _mm256_loadu_pd(p); }
  static V load_part(const double* p, int n) { return _mm256_maskload_pd(p, _mm256_castpd_si256(below(n))); }
  static void store(double* p, V a) { _mm256_storeu_pd(p, a); }
  static void store_part(double* p, int n, V a) { _mm256_maskstore_pd(p, _mm256_castpd_si256(below(n)), a); }
  static V add(V a, V b) { return _mm256_add_pd(a, b); }
  static V sub(V a, V b) { return _mm256_sub_pd(a, b); }
  static V mul(V a, V b) { return _mm256_mul_pd(a, b); }
  static V div(V a, V b) { return _mm256_div_pd(a, b); }
  static V abs(V a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }
  static V min(V a, V b) { return _mm256_min_pd(a, b); }
  static V max(V a, V b) { return _mm256_max_pd(a, b); }
  static M lt(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_LT_OQ); }
  static M eq(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_EQ_OQ); }
  static M not_gt(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_NGT_UQ); }
  static M same(const int64_t* p, int64_t x) {
    const __m256i labels = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(labels, _mm256_set1_epi64x(x)));
  }
  static V select(M m, V yes, V no) { return _mm256_blendv_pd(no, yes, m); }
  static uint64_t bits(M m) { return static_cast<unsigned>(_mm256_movemask_pd(m)); }
  static __m256i iota() { return _mm256_setr_epi64x(0, 1, 2, 3); }
  static M lane(int i, int b) {
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(iota(), _mm256_set1_epi64x(i - b * W)));
  }
  static M below(int n) { return _mm256_castsi256_pd(_mm256_cmpgt_epi64(_mm256_set1_epi64x(n), iota())); }
  static V min_of_all(V a) {
    const __m128d b = _mm_min_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm256_broadcastsd_pd(_mm_min_pd(b, _mm_permute_pd(b, 1)));
  }
};

#else

template <class T>
struct Lanes {
  static constexpr int W = 1;
  using V = T;
  using M = bool;
  static V set1(T x) { return x; }
  static T first(V a) { return a; }
  static V load(const T* p) { return *p; }
  static V load_part(const T* p, int) { return *p; }
  static void store(T* p, V a) { *p = a; }
  static void store_part(T* p, int, V a) { *p = a; }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V abs(V a) { return a < 0 ? -a : a; }
  static V min(V a, V b) { return a < b ? a : b; }
  static V max(V a, V b) { return a > b ? a : b; }
  static M lt(V a, V b) { return a < b; }
  static M eq(V a, V b) { return a == b; }
  static M not_gt(V a, V b) { return !(a > b); }
  static M same(const int64_t* p, int64_t x) { return *p == x; }
  static V select(M m, V yes, V no) { return m ? yes : no; }
  static uint64_t bits(M m) { return m; }
  static M lane(int i, int b) { return i == b; }
  static M below(int n) { return n > 0; }
  static V min_of_all(V a) { return a; }
};

#endif
