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
  int64_t query_stride;  // from one dense row to the next; for flat documents the same as stride
  int64_t stride;
  Type type;

  // Points to the elements of query i of dense rows, or to those from document i on of flat ones.
  TORCHFAST_ANYWHERE const char* from(int64_t i) const { return data + i * query_stride * size_of(type); }
};

// A call of the op; absent tensors are null.
struct Call {
  Elements preds, target, mask;
  const int64_t *larger, *equal, *candidates;  // ranks that are known: then there are no preds
  Elements unretrieved;                        // targets of the documents that were not retrieved
  const int64_t* offsets;                      // where flat queries begin: queries + 1
  const int64_t* lengths;
  const int64_t* num_relevant;
  const int64_t* unretrieved_offsets;
  int64_t queries, width;                    // width is 0 for flat documents
  int64_t documents, unretrieved_documents;  // of all queries
  int64_t metrics;
  const int64_t *kinds, *ks;  // one a metric, in the host's memory
  Options options;
  double* values;  // metrics x queries
  bool* empty;     // 2 x queries
};

// Fills in values and empty, on the CPU.
void rank_on_cpu(const Call& call);

// The same from the ranks of the documents that `target` lists, query q's from offsets[q] on.
void evaluate_on_cpu(const Call& call);

}  // namespace torchfast::ranking
