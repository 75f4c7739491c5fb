// score(q, i) = (((q_0 x_0) + q_1 x_1) + ...) + bias_i, each + a fused multiply-add: a tile of queries x
// items in registers. A lane adds up one score, whatever tile it is in, so that a score has the same bits
// everywhere.
#if defined(TORCHFAST_RETRIEVAL_SCORES_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RETRIEVAL_SCORES_INL_H
#undef TORCHFAST_RETRIEVAL_SCORES_INL_H
#else
#define TORCHFAST_RETRIEVAL_SCORES_INL_H
#endif

#include <algorithm>
#include <cstdint>
#include <limits>

#include "memory/buffer.h"
#include "memory/elements-inl.h"
#include "retrieval/call.h"
#include "simd/vec-inl.h"

TORCHFAST_KERNELS

using retrieval::Embeddings;

// a b + c, rounded once where the instruction set can: whether compilers contract the formula depends on what
// is around it.
template <class R>
TORCHFAST_INLINE Vec<R> multiply_add(Vec<R> a, Vec<R> b, Vec<R> c) {
#if TORCHFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(R) == 4) return _mm512_fmadd_ps(a, b, c);
  if constexpr (sizeof(R) == 8) return _mm512_fmadd_pd(a, b, c);
#elif TORCHFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(R) == 4) return _mm256_fmadd_ps(a, b, c);
  if constexpr (sizeof(R) == 8) return _mm256_fmadd_pd(a, b, c);
#endif
  return a * b + c;
}

// As many sums as the registers hold beside a vector of each of the panel's rows.
template <class R>
struct Tile {
  static constexpr int queries = TORCHFAST_VECTOR_BYTES == 64 ? 8 : 6;
  static constexpr int vectors = TORCHFAST_VECTOR_BYTES == 64 ? 3 : 2;
  static constexpr int items = vectors * Simd<R>::lanes;
};

// A panel holds a tile's items: each dimension of all of them, and then what is added to their scores.
template <class R>
int64_t panel_size(int64_t d) {
  return (d + 1) * Tile<R>::items;
}

// Packs `count` items, of which row_of(j) is the j-th; the scores of the idle lanes become NaN.
template <class R, class RowOf>
void pack(const Embeddings& e, int64_t count, const RowOf& row_of, R* panel) {
  constexpr int items = Tile<R>::items;
  int64_t d = e.items.size(1), stride = e.items.stride(1);
  with_float_type(e.items, [&](auto* x) {
    for (int64_t j = 0; j < count; ++j) {
      auto* row = x + row_of(j) * e.items.stride(0);
      for (int64_t k = 0; k < d; ++k) panel[k * items + j] = R(to_real(row[k * stride]));
    }
  });
  for (int64_t k = 0; k < d; ++k) std::fill(panel + k * items + count, panel + (k + 1) * items, R(0));
  R* bias = panel + d * items;
  std::fill(bias, bias + count, R(0));
  std::fill(bias + count, bias + items, std::numeric_limits<R>::quiet_NaN());
  if (e.bias)
    with_float_type(e.bias, [&](auto* x) {
      for (int64_t j = 0; j < count; ++j) bias[j] = R(to_real(x[row_of(j) * e.bias.stride(0)]));
    });
}

// Copies a query to d contiguous elements.
template <class R>
void widen_query(const Embeddings& e, int64_t query, R* to) {
  with_float_type(e.queries, [&](auto* x) {
    x += query * e.queries.stride(0);
    for (int64_t k = 0; k < e.queries.size(1); ++k) to[k] = R(to_real(x[k * e.queries.stride(1)]));
  });
}

// Writes the scores of a panel's items for so many queries, each query's `stride` after the one before.
template <int queries, class R>
TORCHFAST_INLINE void score_tile(const R* query, int64_t d, const R* panel, R* scores, int64_t stride) {
  constexpr int vectors = Tile<R>::vectors, items = Tile<R>::items, L = Simd<R>::lanes;
  Vec<R> sums[queries][vectors] = {};
  for (int64_t k = 0; k < d; ++k, panel += items) {
    Vec<R> x[vectors];
    for (int v = 0; v < vectors; ++v) x[v] = load<R>(panel + v * L);
    for (int q = 0; q < queries; ++q)
      for (int v = 0; v < vectors; ++v)
        sums[q][v] = multiply_add<R>(splat<R>(query[q * d + k]), x[v], sums[q][v]);
  }
  for (int q = 0; q < queries; ++q)
    for (int v = 0; v < vectors; ++v) store(scores + q * stride + v * L, sums[q][v] + load<R>(panel + v * L));
}

// Memory that begins with a cache line, so that no vector of a panel lies in two.
template <class R>
R* aligned(Buffer<R>& buffer, int64_t n) {
  auto address = reinterpret_cast<uintptr_t>(buffer.need(n + 64 / sizeof(R)));
  return reinterpret_cast<R*>((address + 63) / 64 * 64);
}

template <class R>
void score_listed_as(const Embeddings& e, const int64_t* offsets, const int64_t* ids, int64_t begin,
                     int64_t end, R* scores) {
  constexpr int items = Tile<R>::items;
  int64_t d = e.items.size(1), m = e.items.size(0);
  Buffer<R> panels, rows;
  R *panel = aligned(panels, panel_size<R>(d)), *row = rows.need(d);
  int64_t query = std::upper_bound(offsets, offsets + e.queries.size(0), begin) - offsets - 1;
  alignas(64) R found[items];
  for (int64_t at = begin, widened = -1; at < end;) {
    while (offsets[query + 1] <= at) ++query;
    if (widened != query) widen_query(e, widened = query, row);
    int64_t valid[items], places[items], count = 0;
    for (int64_t stop = std::min(end, offsets[query + 1]); at < stop && count < items; ++at) {
      scores[at] = std::numeric_limits<R>::quiet_NaN();
      if (ids[at] >= 0 && ids[at] < m) valid[count] = ids[at], places[count++] = at;
    }
    pack(e, count, [&](int64_t j) { return valid[j]; }, panel);
    score_tile<1>(row, d, panel, found, items);
    for (int64_t j = 0; j < count; ++j) scores[places[j]] = found[j];
  }
}

void score_listed(const Embeddings& e, const int64_t* offsets, const int64_t* ids, int64_t begin, int64_t end,
                  void* scores) {
  e.is_double() ? score_listed_as(e, offsets, ids, begin, end, static_cast<double*>(scores))
                : score_listed_as(e, offsets, ids, begin, end, static_cast<float*>(scores));
}

TORCHFAST_END_KERNELS

#endif
