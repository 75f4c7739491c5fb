// What the CUDA kernels of the ranking metrics take: plain pointers, for ranking.cu knows no torch.
#pragma once

#include <cstddef>

#include "../ranking.h"

namespace torchfast::ranking {

// Of scores and targets.
enum Type : int { u8, i8, i16, i32, i64, f16, bf16, f32, f64 };  // bool is u8
TORCHFAST_FORMULA constexpr int size_of(Type type) {
  return type <= i8 ? 1 : type == i16 || type == f16 || type == bf16 ? 2 : type == i32 || type == f32 ? 4 : 8;
}

// An element per document, on the GPU. Strides count elements.
struct Elements {
  const char* data;
  int64_t query_stride;  // of dense rows; of flat documents the same as stride
  int64_t stride;
  Type type;
};

// A call of the op; absent tensors are null.
struct Call {
  Elements preds, target, mask;
  Elements others;         // targets that were not retrieved, of all queries
  const int64_t* offsets;  // of flat documents, queries + 1
  const int64_t* lengths;
  const int64_t* num_relevant;
  const int64_t* other_offsets;
  int64_t queries, width;              // width 0 where flat
  int64_t documents, other_documents;  // of all queries
  Options options;
  double* values;  // metrics x queries
  bool* empty;     // 2 x queries
};

// Bytes of device memory that `launch` works in, not initialised.
size_t working_bytes(const Call& call);

// Starts the kernels, or says why not.
const char* launch(const Call& call, const int64_t* kinds, const int64_t* ks, int64_t metrics, void* working,
                   void* stream);

}  // namespace torchfast::ranking
