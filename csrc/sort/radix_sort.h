// Radix sort of pairs of a key and an id, for the metrics that rank.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <utility>
#include <vector>

#include "memory/buffer.h"
#include "memory/parallel.h"

namespace torchfast {

// Maps scores to unsigned integers of the opposite order, and both zeros to the same one.
inline uint32_t descending(float score) {
  auto bits = std::bit_cast<uint32_t>(score + 0.0f);
  return bits >> 31 ? bits : ~bits & 0x7fffffff;
}
inline uint64_t descending(double score) {
  auto bits = std::bit_cast<uint64_t>(score + 0.0);
  return bits >> 63 ? bits : ~bits & 0x7fffffffffffffff;
}

template <class Key>
struct Keyed {
  Key key;
  Key id;
};

// Sorts by bits low .. low + bits - 1 of the key; returns a or b, whichever holds the result.
template <class Key>
Keyed<Key>* sort_by_bits(Keyed<Key>* a, Keyed<Key>* b, int64_t n, int low, int bits, const Parts& parts,
                         Buffer<Key>& counts) {
  constexpr int kDigit = 12;  // bits, whose counters fit in L1
  int passes = (bits + kDigit - 1) / kDigit, digit = (bits + passes - 1) / passes;
  int64_t values = int64_t{1} << digit;
  counts.need(parts.count * values);
  for (int pass = 0; pass < passes; ++pass) {
    int shift = low + pass * digit;
    auto value = [=](const Keyed<Key>& x) { return (x.key >> shift) & Key(values - 1); };
    parts.for_each_range(n, 1, [&](int64_t part, int64_t begin, int64_t end) {
      Key* count = counts.get() + part * values;
      std::fill_n(count, values, 0);
      for (int64_t i = begin; i < end; ++i) ++count[value(a[i])];
    });
    Key total = 0;
    for (int64_t v = 0; v < values; ++v)
      for (int64_t part = 0; part < parts.count; ++part)
        total += std::exchange(counts[part * values + v], total);
    parts.for_each_range(n, 1, [&](int64_t part, int64_t begin, int64_t end) {
      Key* to = counts.get() + part * values;
      for (int64_t i = begin; i < end; ++i) b[to[value(a[i])]++] = a[i];
    });
    std::swap(a, b);
  }
  return a;
}

// Sorts what is nearly sorted already. Returns false if it is not, and sorting stopped.
template <class Key>
bool sort_by_insertion(Keyed<Key>* a, int64_t n) {
  int64_t moves = 4 * n;
  for (int64_t i = 1; i < n && moves > 0; ++i) {
    Keyed<Key> x = a[i];
    int64_t to = i;
    for (; to > 0 && a[to - 1].key > x.key; --to) a[to] = a[to - 1];
    a[to] = x;
    moves -= i - to;
  }
  return moves > 0;
}

// Sorts by the key, ascending and stable; returns a or b, whichever holds the result. The leading bits
// that tell most keys apart come first: few pairs of neighbours are then left to exchange.
template <class Key>
Keyed<Key>* radix_sort(Keyed<Key>* a, Keyed<Key>* b, int64_t n, const Parts& parts, Buffer<Key>& counts) {
  std::vector<Key> differing_in(parts.count);
  parts.for_each_range(n, 1, [&](int64_t part, int64_t begin, int64_t end) {
    Key differing = 0;
    for (int64_t i = begin; i < end; ++i) differing |= a[i].key ^ a[0].key;
    differing_in[part] = differing;
  });
  Key differing = 0;
  for (Key of_part : differing_in) differing |= of_part;
  if (differing == 0) return a;
  int low = std::countr_zero(differing), high = int(std::bit_width(differing));
  int leading = std::min(high - low, int(std::bit_width(uint64_t(n))) + 8);
  Keyed<Key>* sorted = sort_by_bits(a, b, n, high - leading, leading, parts, counts);
  if (leading == high - low || sort_by_insertion(sorted, n)) return sorted;
  return sort_by_bits(sorted, sorted == a ? b : a, n, low, high - low, parts, counts);
}

}  // namespace torchfast
