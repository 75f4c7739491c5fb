// Comparisons by looking documents up among the judged ones' scores.
#if defined(TORCHFAST_RANKING_CPU_SEARCH_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_SEARCH_INL_H
#undef TORCHFAST_RANKING_CPU_SEARCH_INL_H
#else
#define TORCHFAST_RANKING_CPU_SEARCH_INL_H
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "ranking/cpu/compare-inl.h"

TORCHFAST_KERNELS

// compare_all for 9 to 31 scores in rows that are worth it: each document's place among the scores is found
// in four or five steps, by lookups in registers; places are bytes, and compared 32 at a time. Half of the
// comparisons.
#if TORCHFAST_VECTOR_BYTES == 64
class Search {
 public:
  static bool serves(int64_t scores, int64_t documents) {
    return scores > 8 && scores < 32 && documents > 2 * kChunk;
  }

  Search(const float* score, int64_t count) : count_(count) {
    for (int64_t j = 0; j < count; ++j) order_[j] = int8_t(j);
    auto ascending = [=](int a, int b) {
      return score[a] < score[b] || (score[a] == score[a] && score[b] != score[b]);
    };
    std::sort(order_, order_ + count, ascending);
    std::fill_n(sorted_, 32, NAN);
    for (int64_t j = 0; j < count; ++j) sorted_[j] = score[order_[j]];
  }

  // Whether so few documents have had one of the scores that they could be counted one by one.
  bool is_worth_it() const { return hits_ <= seen_ / 16; }

  void add(const float* x, int64_t n) { count_ < 16 ? add_chunk<1>(x, n) : add_chunk<2>(x, n); }

  // Adds what was counted to larger[j] and equal[j] of the j-th score.
  void take(int32_t* larger, int32_t* equal) const {
    for (int64_t j = 0; j < count_; ++j) {
      larger[order_[j]] += int32_t(larger_[j]);
      int64_t first = j;  // of the same score
      while (first > 0 && sorted_[first - 1] == sorted_[j]) --first;
      equal[order_[j]] += int32_t(equal_[first]);
    }
  }

 private:
  template <int tables>
  void add_chunk(const float* x, int64_t n) {
    constexpr int kAtOnce = 4;  // vectors: what one waits for, another does
    alignas(64) uint8_t place[kChunk];
    const __m512 low = _mm512_loadu_ps(sorted_), high = _mm512_loadu_ps(sorted_ + 16);
    auto look_up = [&](__m512i at) __attribute__((always_inline)) {
      return tables == 1 ? _mm512_permutexvar_ps(at, low) : _mm512_permutex2var_ps(low, at, high);
    };
    auto find = [&](auto vectors, int64_t i) __attribute__((always_inline)) {
      __m512 v[vectors()];
      __m512i p[vectors()];
      for (int k = 0; k < vectors(); ++k)
        v[k] = _mm512_loadu_ps(x + i + 16 * k), p[k] = _mm512_setzero_si512();
#pragma GCC unroll 5
      for (int step = 8 * tables; step > 0; step /= 2)
        for (int k = 0; k < vectors(); ++k) {
          __m512 middle = look_up(_mm512_or_si512(p[k], _mm512_set1_epi32(step - 1)));
          __mmask16 beyond = _mm512_cmp_ps_mask(middle, v[k], _CMP_LT_OQ);
          p[k] = _mm512_mask_or_epi32(p[k], beyond, p[k], _mm512_set1_epi32(step));
        }
      uint64_t equal = 0;
      for (int k = 0; k < vectors(); ++k) {
        equal |= uint64_t(_mm512_cmp_ps_mask(look_up(p[k]), v[k], _CMP_EQ_OQ)) << (16 * k);
        _mm_store_si128(reinterpret_cast<__m128i*>(place + i + 16 * k), _mm512_cvtepi32_epi8(p[k]));
      }
      hits_ += std::popcount(equal);
      for (; equal; equal &= equal - 1) ++equal_[place[i + std::countr_zero(equal)]];
    };
    int64_t i = 0;
    for (; i + 16 * kAtOnce <= n; i += 16 * kAtOnce) find(std::integral_constant<int, kAtOnce>{}, i);
    for (; i < n; i += 16) find(std::integral_constant<int, 1>{}, i);
    seen_ += n;

    int64_t end = (n + 31) / 32 * 32;
    std::fill(place + n, place + end, 0);
    for (int j = 0; j < count_; j += 8) {
      __m256i more[8] = {};
      for (i = 0; i < end; i += 32) {
        __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i*>(place + i));
        for (int k = 0; k < 8; ++k)
          more[k] = _mm256_sub_epi8(more[k], _mm256_cmpgt_epi8(places, _mm256_set1_epi8(int8_t(j + k))));
      }
      for (int k = 0; k < 8; ++k) {  // at most kChunk / 32 in a byte
        __m256i sums = _mm256_sad_epu8(more[k], _mm256_setzero_si256());
        larger_[j + k] += sum_of((typename Narrow<double>::I)sums);
      }
    }
  }

  int64_t count_, seen_ = 0, hits_ = 0;
  int8_t order_[32];
  float sorted_[32];
  int64_t larger_[32] = {}, equal_[32] = {};
};
#endif

TORCHFAST_END_KERNELS

#endif
