// Comparisons of 16-bit numbers, for short rows.
#if defined(TORCHFAST_RANKING_CPU_COARSE_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_COARSE_INL_H
#undef TORCHFAST_RANKING_CPU_COARSE_INL_H
#else
#define TORCHFAST_RANKING_CPU_COARSE_INL_H
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "ranking/cpu/compare-inl.h"

TORCHFAST_KERNELS

constexpr int64_t kShort = 2032;  // documents of a short row: 127 vectors of 16 (see Coarse)

// compare_all for several scores in short rows: all are mapped to 16 bits by a function that nowhere
// decreases, where one sign says larger, smaller or equal. The counts of a score that has its place alone are
// exact; the others are counted again. Half of its time.
#if TORCHFAST_VECTOR_BYTES >= 32
class Coarse {
 public:
  // Counts in larger[j] and equal[j], up to the next multiple of 4, those larger than and equal to score[j].
  // False: it did not, because there are NaN, or scores of earlier rows have shared their places too often.
  TORCHFAST_INLINE bool count(const float* x, int64_t n, const float* score, int64_t scores, int32_t* larger,
                              int32_t* equal) {
    seen_ += scores;
    if (again_ > seen_ / 8 + 64 || !map_all(x, n)) return false;
    for (int64_t j = 0; j < scores; j += 16)
      store(score_ + j, _mm256_permute4x64_epi64(map(score + j, score + j + 8), 0xd8));
    for (int64_t j = 0; j < scores; j += 8) {
      switch ((std::min<int64_t>(scores - j, 8) + 1) / 2) {
        case 1: compare<2>(n, j, larger, equal); break;
        case 2: compare<4>(n, j, larger, equal); break;
        case 3: compare<6>(n, j, larger, equal); break;
        default: compare<8>(n, j, larger, equal);
      }
    }
    if (uint64_t others = not_one<float>(equal, scores))
      count_again(x, n, score, scores, others, larger, equal);
    return true;
  }

 private:
  TORCHFAST_INLINE static void store(int16_t* to, __m256i v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), v);
  }
  TORCHFAST_INLINE __m256i map(__m256 a, __m256 b) const {
    auto whole = [this](__m256 v) __attribute__((always_inline)) {
      __m256 mapped = _mm256_fmadd_ps(v, _mm256_set1_ps(scale_), _mm256_set1_ps(offset_));
      return _mm256_cvtps_epi32(_mm256_min_ps(mapped, _mm256_set1_ps(32767)));  // beyond int: its least
    };
    return _mm256_packs_epi32(whole(a), whole(b));
  }
  TORCHFAST_INLINE __m256i map(const float* a, const float* b) const {
    return map(_mm256_loadu_ps(a), _mm256_loadu_ps(b));
  }

  // The documents, up to a full vector of the smallest; false if there are NaN.
  TORCHFAST_INLINE bool map_all(const float* x, int64_t n) {
    __m256 nan{};
    auto add = [&](__m256 a, __m256 b, int64_t i) __attribute__((always_inline)) {
      nan = _mm256_or_ps(nan, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
      store(document_ + i, map(a, b));
    };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) add(_mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i + 8), i);
    if (i < n) {
      float rest[16];
      if (n < 16) std::fill(std::copy_n(x, n, rest), rest + 16, -INFINITY);
      const float* from = n < 16 ? rest : x + n - 16;
      __m256 lane{0, 1, 2, 3, 4, 5, 6, 7}, first = float(n < 16 ? 0 : i + 16 - n) - __m256{};
      __m256 a = _mm256_loadu_ps(from), b = _mm256_loadu_ps(from + 8), least = -INFINITY - __m256{};
      add(lane < first ? least : a, lane + 8 < first ? least : b, i);
    }
    return _mm256_movemask_ps(nan) == 0;
  }

  template <int scores>
  TORCHFAST_INLINE void compare(int64_t n, int64_t first, int32_t* larger, int32_t* equal) const {
    // Of each word's documents, L larger and S smaller: the low byte is 128 + L - S, the high one -S.
    __m256i s[scores], signs[(scores + 3) / 4 * 4] = {};
    for (int j = 0; j < scores; ++j) {
      s[j] = _mm256_set1_epi16(score_[first + j]);
      signs[j] = _mm256_set1_epi16(128);
    }
    for (int64_t i = 0; i < n; i += 16) {
      __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(document_ + i));
      for (int j = 0; j < scores; ++j) {
        __m256i sign = _mm256_sign_epi16(_mm256_set1_epi16(1), _mm256_subs_epi16(v, s[j]));
        signs[j] = _mm256_add_epi8(signs[j], sign);
      }
    }
    // 128 * 16 + L + 2^14 S
    for (int j = 0; j < scores; ++j) {
      __m256i smaller =
          _mm256_madd_epi16(_mm256_srai_epi16(signs[j], 8), _mm256_set1_epi16(-(1 << 14) - 257));
      signs[j] = _mm256_add_epi32(_mm256_madd_epi16(signs[j], _mm256_set1_epi16(1)), smaller);
    }
    for (int j = 0; j < scores; j += 4) {
      __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(signs[j], signs[j + 1]),
                                         _mm256_hadd_epi32(signs[j + 2], signs[j + 3]));
      __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
      sums = _mm_sub_epi32(sums, _mm_set1_epi32(128 * 16));
      __m128i above = _mm_and_si128(sums, _mm_set1_epi32((1 << 14) - 1));
      __m128i others = _mm_add_epi32(above, _mm_srli_epi32(sums, 14));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(larger + first + j), above);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(equal + first + j),
                       _mm_sub_epi32(_mm_set1_epi32(int32_t((n + 15) / 16 * 16)), others));
    }
  }

  // Those whose bits are set.
  void count_again(const float* x, int64_t n, const float* score, int64_t scores, uint64_t those,
                   int32_t* larger, int32_t* equal) {
    float shared[64];
    int id[64], count = 0, alone = 0;
    for (; those; those &= those - 1) shared[count] = score[id[count] = std::countr_zero(those)], ++count;
    compare_all(x, n, shared, count, [&](int64_t first, auto scores, const Counts<float>* counts) {
      for (int j = 0; j < scores(); ++j) {
        larger[id[first + j]] = int32_t(sum_of(counts[j].larger));
        equal[id[first + j]] = int32_t(sum_of(counts[j].equal));
        alone += equal[id[first + j]] == 1;
      }
    });
    again_ += count;
    if (alone > scores / 4) fit(x, n);
  }

  // Spreads the scores of a row over two thirds of the places.
  void fit(const float* x, int64_t n) {
    Vec<float> low = splat(float(INFINITY)), high = -low;
    for_each_vec<float, 1>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
      Vec<float> v = only_n<float>(load_n<float>(x + i, count), count, x[0]);
      low = ((v < low) & (v > -INFINITY)) ? v : low;
      high = ((v > high) & (v < INFINITY)) ? v : high;
    });
    float least = -max_lanes<float>(-low), most = max_lanes<float>(high);
    float scale = 43690 / (most - least), offset = -scale * (least / 2 + most / 2);
    if (scale > 0 && scale < INFINITY && offset - offset == 0) scale_ = scale, offset_ = offset;
  }

  float scale_ = 1, offset_ = 0;
  int64_t seen_ = 0, again_ = 0;  // scores
  alignas(32) int16_t document_[kShort];
  alignas(32) int16_t score_[64];
};
#endif

TORCHFAST_END_KERNELS

#endif
