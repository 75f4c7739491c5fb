// retrieval/scores-inl.h: a score in any lane of any tile has the bits of the plain loop.
#define TORCHFAST_FILE "retrieval.cpp"
#include "simd/foreach_isa.h"

#ifndef RETRIEVAL_CPP_ONCE
#define RETRIEVAL_CPP_ONCE
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#endif

#include "retrieval/scores-inl.h"

TORCHFAST_KERNELS

template <class R>
R uneven(Random& random) {
  return R(random.below(1 << 24)) / R(1 << 22) - 2;
}

// Compilers make one instruction of the last line, or two, as they do of vectors.
template <class R>
R add_product(R a, R b, R c) {
  if (TORCHFAST_VECTOR_BYTES > 16) return std::fma(a, b, c);
  return a * b + c;
}

template <class R>
void a_score_has_the_same_bits_in_every_lane(Type type) {
  constexpr int queries = Tile<R>::queries, items = Tile<R>::items;
  Random random;
  for (int64_t d : {0, 1, 2, 7, 64, 129}) {
    std::vector<R> query(queries * d), item(2 * items * d), bias(items);
    for (R& x : query) x = uneven<R>(random);
    for (R& x : item) x = uneven<R>(random);
    for (R& x : bias) x = uneven<R>(random);
    int64_t item_sizes[] = {items, d},
            item_strides[] = {2, 2 * items};  // every second column of [d, 2 items]
    int64_t bias_sizes[] = {items}, bias_strides[] = {1};
    Embeddings e{{}, {item.data(), type, 2, items * d, item_sizes, item_strides}, {}};
    for (bool biased : {false, true}) {
      if (biased) e.bias = {bias.data(), type, 1, items, bias_sizes, bias_strides};
      for (int64_t count : {1, items - 1, items}) {
        std::vector<R> panel(panel_size<R>(d)), scores(queries * items), alone(items);
        pack(e, count, [&](int64_t j) { return items - 1 - j; }, panel.data());
        score_tile<queries>(query.data(), d, panel.data(), scores.data(), items);
        for (int64_t q = 0; q < queries; ++q) {
          score_tile<1>(query.data() + q * d, d, panel.data(), alone.data(), items);
          for (int64_t j = 0; j < items; ++j) {
            R expected = 0;
            for (int64_t k = 0; k < d; ++k)
              expected = add_product(query[q * d + k], item[2 * items * k + 2 * (items - 1 - j)], expected);
            if (biased && j < count) expected += bias[items - 1 - j];
            R found = scores[q * items + j];
            CHECK(j < count ? std::memcmp(&found, &expected, sizeof(R)) == 0 : std::isnan(found));
            CHECK(std::memcmp(&found, &alone[j], sizeof(R)) == 0);
          }
        }
      }
    }
  }
}

void run() {
  a_score_has_the_same_bits_in_every_lane<float>(Type::f32);
  a_score_has_the_same_bits_in_every_lane<double>(Type::f64);
}

TORCHFAST_END_KERNELS

#ifdef TORCHFAST_LAST_ISA
int main() { RUN_IN_EVERY_ISA(run); }
#endif
