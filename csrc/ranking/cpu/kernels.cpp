// Ranking metrics on the CPU, in every instruction set, and the choice among them.
//
// The metrics depend on the ranks of the documents that are judged (target > 0) alone, and a rank is a
// number of larger scores. Per query, the cheapest of three ways to them:
//   count-inl.h   few judged documents: compare every document with each of them, chunk by chunk in L1
//   sort-inl.h    many: sort all documents (radix sort); or, if only the first k ranks of a long row matter,
//                 those from the k-th score up
// Each finds the groups of tied documents exactly; ranking/metrics.h turns these into the metrics. In
// of_ranks-inl.h the ranks come from elsewhere: those of a catalogue, which csrc/retrieval counts.
#define TORCHFAST_FILE "ranking/cpu/kernels.cpp"
#include "simd/foreach_isa.h"

#include "ranking/cpu/of_ranks-inl.h"
#include "ranking/cpu/queries-inl.h"

#ifdef TORCHFAST_LAST_ISA
namespace torchfast::ranking {

void rank_on_cpu(const Call& call) { TORCHFAST_DISPATCH(rank_queries)(call); }
void evaluate_on_cpu(const Call& call) { TORCHFAST_DISPATCH(evaluate_queries)(call); }

}  // namespace torchfast::ranking
#endif
