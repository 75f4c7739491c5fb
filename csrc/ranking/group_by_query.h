// Documents of unsorted queries, put in order: where each query begins, and which document comes where.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "memory/buffer.h"
#include "memory/parallel.h"
#include "sort/radix_sort.h"

namespace torchfast::ranking {

// Finds where the ids of n documents change; id_at(i) must ascend with i.
template <class IdAt>
class Boundaries {
 public:
  Boundaries(int64_t n, const Parts& parts, const IdAt& id_at)
      : n_(n), parts_(parts), id_at_(id_at), first_(parts.count + 1) {
    parts_.for_each_range(n_, 1, [&](int64_t part, int64_t begin, int64_t end) {
      int64_t count = 0;
      for (int64_t i = begin; i < end; ++i) count += begins(i);
      first_[part + 1] = count;
    });
    for (int64_t part = 0; part < parts_.count; ++part) first_[part + 1] += first_[part];
  }
  int64_t queries() const { return first_.back(); }

  // offset has room for queries() + 1 numbers, id for queries().
  void write(int64_t* offset, int64_t* id) const {
    parts_.for_each_range(n_, 1, [&](int64_t part, int64_t begin, int64_t end) {
      int64_t to = first_[part];
      for (int64_t i = begin; i < end; ++i)
        if (begins(i)) offset[to] = i, id[to++] = id_at_(i);
    });
    offset[queries()] = n_;
  }

 private:
  bool begins(int64_t i) const { return i == 0 || id_at_(i) != id_at_(i - 1); }

  int64_t n_;
  Parts parts_;
  IdAt id_at_;
  std::vector<int64_t> first_;  // the first query that begins in each part
};

// The documents by ascending id, those of the same id in their order. Key has room for the ids' differences
// and for n.
template <class Key>
class SortedIds {
 public:
  SortedIds(const int64_t* id, int64_t n, int64_t least, const Parts& parts) : least_(least) {
    Keyed<Key>* all = elements_.need(2 * n);
    parts.for_each_range(n, 1, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) all[i] = {Key(uint64_t(id[i]) - uint64_t(least)), Key(i)};
    });
    Buffer<Key> counts;
    sorted_ = radix_sort(all, all + n, n, parts, counts);
  }
  int64_t document(int64_t i) const { return int64_t(sorted_[i].id); }
  int64_t id(int64_t i) const { return int64_t(uint64_t(sorted_[i].key) + uint64_t(least_)); }

 private:
  int64_t least_;
  Buffer<Keyed<Key>> elements_;
  const Keyed<Key>* sorted_;
};

}  // namespace torchfast::ranking
