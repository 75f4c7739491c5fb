// What one pass of the kernels over the input is given.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ranking/call.h"

namespace torchfast::ranking {
namespace {

constexpr int kWarpDocuments = 256;
constexpr int kCapacity = 2048;
constexpr int64_t kHuge = 1 << 17;  // longer than two slices, so that a slice has parts of two at most
constexpr int64_t kSlice = 1 << 15;
constexpr int kBlockWarps = 8, kBlockThreads = 32 * kBlockWarps;
constexpr int kSmallGroup = 64;  // documents of one score that one thread goes through
constexpr int kTerms = 16;       // sums that one pass over the input can carry
constexpr int kMetrics = 16;     // metrics that one pass can return
constexpr unsigned kFull = 0xffffffff;

// A sum over the groups: of gains, reciprocal ranks, ... up to a cut-off.
struct Term {
  int kind;   // dcg, mrr, map, hit_rate, or precision for hits
  int64_t k;  // 0 means the query's n_rel
};

struct Metric {
  int kind, term, hits;  // hits is the term that counts hits, for map over hits
  int64_t k;             // as the op takes it
  double* values;        // one a query
};

// A query that several blocks share.
struct Slot {
  int judged, documents, numbers, wrong;
};

struct Pass {
  Call call;
  Term terms[kTerms];
  Metric metrics[kMetrics];
  int term_count, metric_count;
  int capacity;              // judged documents that a team's shared memory holds
  int64_t queries_at_once;   // queries that a block looks at together
  int* illegal;              // not 0 if offsets are no boundaries; null without offsets
  int *ids, *larger, *same;  // one element a document; null where shared memory suffices
  Slot* slots;
};

}  // namespace
}  // namespace torchfast::ranking
