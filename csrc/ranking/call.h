// What the kernels of the ranking metrics take, those of the CPU and those of CUDA. Definitions and
// reference: torchfast/metrics/ranking/.
#pragma once

#include <cstdint>

#include "memory/view.h"
#include "ranking/metrics.h"

namespace torchfast::ranking {

// A tensor with an element per document. Strides count elements.
struct Elements {
  const char* data;      // null where an optional tensor is absent
  int64_t query_stride;  // of dense rows; of flat documents the same as stride
  int64_t stride;
  Type type;

  // Those of query i of dense rows; of flat ones, those from document i on.
  TORCHFAST_ANYWHERE const char* from(int64_t i) const { return data + i * query_stride * size_of(type); }
};

// A call of the op; absent tensors are null.
struct Call {
  Elements preds, target, mask;
  Elements unretrieved;    // targets that were not retrieved, of all queries
  const int64_t* offsets;  // of flat documents, queries + 1
  const int64_t* lengths;
  const int64_t* num_relevant;
  const int64_t* unretrieved_offsets;
  int64_t queries, width;                    // width 0 where flat
  int64_t documents, unretrieved_documents;  // of all queries
  int64_t metrics;
  const int64_t *kinds, *ks;  // of each metric, in the host's memory
  Options options;
  double* values;  // metrics x queries
  bool* empty;     // 2 x queries
};

// Fills in values and empty, on the CPU.
void rank_on_cpu(const Call& call);

}  // namespace torchfast::ranking
