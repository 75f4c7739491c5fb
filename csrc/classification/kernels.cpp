// The kernels of the classification metrics in every instruction set, and the choice among them.
#define TORCHFAST_FILE "classification/kernels.cpp"
#include "simd/foreach_isa.h"

#include "classification/keys-inl.h"
#include "classification/labels-inl.h"
#include "classification/predict-inl.h"

#ifdef TORCHFAST_LAST_ISA
namespace torchfast::classification {

void predict(const ClassCall& a, int64_t begin, int64_t end, int64_t* predicted, int64_t* rank) {
  TORCHFAST_DISPATCH(predict_rows)(a, begin, end, predicted, rank);
}

template <class N>
void add_labels(const LabelCall& a, int64_t begin, int64_t end, LabelSums<N>& sums) {
  TORCHFAST_DISPATCH(add_label_rows<N>)(a, begin, end, sums);
}
template void add_labels(const LabelCall&, int64_t, int64_t, LabelSums<int64_t>&);
template void add_labels(const LabelCall&, int64_t, int64_t, LabelSums<double>&);

template <class Key>
bool keys_of(const AreaCall& a, int64_t k, int64_t begin, int64_t end, Keyed<Key>* elements,
             uint8_t* labels) {
  return TORCHFAST_DISPATCH(sort_keys<Key>)(a, k, begin, end, elements, labels);
}
template bool keys_of(const AreaCall&, int64_t, int64_t, int64_t, Keyed<uint32_t>*, uint8_t*);
template bool keys_of(const AreaCall&, int64_t, int64_t, int64_t, Keyed<uint64_t>*, uint8_t*);

}  // namespace torchfast::classification
#endif
