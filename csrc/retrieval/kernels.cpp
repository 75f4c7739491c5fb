// The kernels of the retrieval ops in every instruction set, and the choice among them.
#define TORCHFAST_FILE "retrieval/kernels.cpp"
#include "simd/foreach_isa.h"

#include "retrieval/counts-inl.h"

#ifdef TORCHFAST_LAST_ISA
namespace torchfast::retrieval {

void score_listed(const Embeddings& embeddings, const int64_t* offsets, const int64_t* ids, int64_t begin,
                  int64_t end, void* scores) {
  TORCHFAST_DISPATCH(score_listed)(embeddings, offsets, ids, begin, end, scores);
}

void count_block(const Embeddings& embeddings, const Counts& counts, const Block& block) {
  TORCHFAST_DISPATCH(count_block)(embeddings, counts, block);
}

}  // namespace torchfast::retrieval
#endif
