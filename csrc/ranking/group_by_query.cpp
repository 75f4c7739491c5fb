// The op torchfast::group_by_query on the CPU: its checks and its outputs.
#include "ranking/group_by_query.h"

#include <tuple>

#include "torch/tensor.h"

namespace torchfast::ranking {
namespace {

template <class IdAt>
std::tuple<Tensor, Tensor> boundaries(const Tensor& like, int64_t n, const Parts& parts, const IdAt& id_at) {
  Boundaries found(n, parts, id_at);
  Tensor offsets = new_empty(like, {found.queries() + 1}, ScalarType::Long);
  Tensor ids = new_empty(like, {found.queries()}, ScalarType::Long);
  found.write(output_of(offsets).writable<int64_t>(), output_of(ids).writable<int64_t>());
  return {offsets, ids};
}

template <class Key>
std::tuple<Tensor, Tensor, Tensor> group_unsorted(const Tensor& indexes, const int64_t* id, int64_t n,
                                                  int64_t least, const Parts& parts) {
  SortedIds<Key> sorted(id, n, least, parts);
  Tensor order = new_empty(indexes, {n}, ScalarType::Long);
  int64_t* to = output_of(order).writable<int64_t>();
  parts.for_each_range(n, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = sorted.document(i);
  });
  auto [offsets, ids] = boundaries(indexes, n, parts, [&](int64_t i) { return sorted.id(i); });
  return {order, offsets, ids};
}

std::tuple<Tensor, Tensor, Tensor> group_by_query(Tensor given, bool skip_sorted) {
  STD_TORCH_CHECK(given.dim() == 1 && given.scalar_type() == ScalarType::Long,
                  "indexes must be one-dimensional and int64");
  Tensor indexes = as_contiguous(given, ScalarType::Long);
  const int64_t *id = view_of(indexes).as<int64_t>(), n = indexes.numel();
  Parts parts{n < kGrainElements ? 1 : thread_count()};
  if (skip_sorted && std::is_sorted(id, id + n)) {
    auto [offsets, ids] = boundaries(indexes, n, parts, [=](int64_t i) { return id[i]; });
    return {new_empty(indexes, {0}, ScalarType::Long), offsets, ids};
  }
  if (n == 0) return group_unsorted<uint32_t>(indexes, id, 0, 0, parts);
  auto [least, most] = std::minmax_element(id, id + n);
  bool small = uint64_t(*most) - uint64_t(*least) <= UINT32_MAX && n <= UINT32_MAX;
  return small ? group_unsorted<uint32_t>(indexes, id, n, *least, parts)
               : group_unsorted<uint64_t>(indexes, id, n, *least, parts);
}

}  // namespace
}  // namespace torchfast::ranking

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("group_by_query", TORCH_BOX(&torchfast::ranking::group_by_query));
}
