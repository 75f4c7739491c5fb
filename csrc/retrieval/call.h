// What the kernels of the retrieval ops take. Definitions and reference: torchfast/metrics/retrieval/.
#pragma once

#include <cstdint>

#include "memory/view.h"

namespace torchfast::retrieval {

// The embeddings, [n, d] and [m, d], and what is added to an item's scores, [m], where the view is not
// absent.
struct Embeddings {
  View queries, items, bias;

  // True if scores are doubles; else they are floats.
  bool is_double() const { return queries.type == Type::f64 || items.type == Type::f64; }
};

// The queries that walk over the items together, and the items they walk over.
struct Block {
  int64_t query_begin, query_end, item_begin, item_end;
};

// The scores that are compared with those of the items: query i's begin at offsets[i]. The results are zero
// at first.
struct Counts {
  const int64_t* offsets;
  const void* scores;
  int64_t *larger, *equal;
};

constexpr int64_t kBlockBytes = 1 << 19;   // of a block's queries
constexpr int64_t kBlockListed = 1 << 14;  // scores of a block of several queries

// Writes the scores of the listed items begin .. end-1. An id out of range scores NaN.
void score_listed(const Embeddings& embeddings, const int64_t* offsets, const int64_t* ids, int64_t begin,
                  int64_t end, void* scores);

// Adds the numbers of the block's items to the results. Several blocks may do so at once.
void count_block(const Embeddings& embeddings, const Counts& counts, const Block& block);

}  // namespace torchfast::retrieval
