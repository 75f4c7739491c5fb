// memory/buffer.h and sort/radix_sort.h, which know no instruction set, against the standard library.
#include "sort/radix_sort.h"

#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "check.h"
#include "memory/buffer.h"

namespace torchfast {

// A stand-in for torch's threads: one range after the other, the last one first, so that no result may depend
// on an order.
int64_t thread_count() { return 3; }
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*work)(const void*, int64_t, int64_t),
                  const void* context) {
  int64_t ranges = (end - begin + grain - 1) / grain;
  for (int64_t range = ranges; range-- > 0;)
    work(context, begin + range * grain, std::min(end, begin + (range + 1) * grain));
}

void buffers_keep_what_they_are_told_to() {
  Buffer<int> buffer;
  int* first = buffer.need(10);
  std::iota(first, first + 10, 0);
  CHECK(buffer.need(10) == first && buffer.need(3) == first);
  int* larger = buffer.need(11, 10);
  larger[14] = 14;  // half as much again
  CHECK(buffer.need(15) == larger && buffer.get() == larger);
  for (int i = 0; i < 10; ++i) CHECK(buffer[i] == i);
}

void parts_cover_a_range_at_multiples_of_the_step() {
  for (int64_t count : {1, 2, 3, 7})
    for (int64_t step : {1, 8})
      for (int64_t n : {0, 1, 5, 8, 64, 100}) {
        std::vector<int> seen(n);
        std::vector<int> calls(count);
        Parts{count}.for_each_range(n, step, [&](int64_t part, int64_t begin, int64_t end) {
          ++calls[part];
          CHECK(begin <= end && (begin % step == 0 || begin == n) && (end % step == 0 || end == n));
          for (int64_t i = begin; i < end; ++i) ++seen[i];
        });
        CHECK(seen == std::vector<int>(n, 1) && calls == std::vector<int>(count, 1));
      }
}

template <class Score>
void keys_descend_with_the_scores() {
  constexpr Score inf = std::numeric_limits<Score>::infinity(), most = std::numeric_limits<Score>::max();
  constexpr Score tiny = std::numeric_limits<Score>::denorm_min();
  const Score ascending[] = {-inf, -most, -2, -1, -tiny, 0, tiny, 1, std::nextafter(Score(1), inf),
                             most, inf};
  for (const Score& a : ascending)
    for (const Score& b : ascending) CHECK((a < b) == (descending(a) > descending(b)));
  CHECK(descending(Score(-0.0)) == descending(Score(0)));
}

template <class Key>
void check_sorted(int64_t n, const std::function<Key(int64_t)>& key_of) {
  std::vector<Keyed<Key>> given(n);
  for (int64_t i = 0; i < n; ++i) given[i] = {key_of(i), Key(i)};
  std::vector<Keyed<Key>> expected = given;
  std::stable_sort(expected.begin(), expected.end(), [](auto& a, auto& b) { return a.key < b.key; });
  for (int64_t parts : {1, 3}) {
    std::vector<Keyed<Key>> a = given, b(n);
    Buffer<Key> counts;
    const Keyed<Key>* sorted = radix_sort(a.data(), b.data(), n, Parts{parts}, counts);
    CHECK(sorted == a.data() || sorted == b.data());
    for (int64_t i = 0; i < n; ++i) CHECK(sorted[i].key == expected[i].key && sorted[i].id == expected[i].id);
  }
}

template <class Key>
void radix_sort_is_a_stable_sort() {
  constexpr int bits = 8 * sizeof(Key);
  Random random;
  for (int64_t n : {0, 1, 2, 3, 100, 5000, 70000}) {
    check_sorted<Key>(n, [&](int64_t) { return Key(random()); });
    check_sorted<Key>(n, [&](int64_t) { return Key(random.below(3)); });  // mostly ties
    check_sorted<Key>(n, [&](int64_t) { return Key(7); });
    check_sorted<Key>(n, [&](int64_t i) { return Key(i); });
    check_sorted<Key>(n, [&](int64_t i) { return Key(n - i); });
    check_sorted<Key>(n, [&](int64_t) { return Key(random() << (bits - 3)); });
    // The leading bits tell apart too few: the insertions after them stop, and all bits are sorted by.
    check_sorted<Key>(n,
                      [&](int64_t i) { return Key((Key(i == 0) << (bits - 1)) | Key(random.below(1000))); });
    // The leading bits tell apart all but neighbours, which insertion exchanges.
    check_sorted<Key>(n,
                      [&](int64_t i) { return Key((Key(i / 2) << (bits - 17)) | Key(random.below(1000))); });
    check_sorted<Key>(n, [&](int64_t) {
      return Key(
          descending(std::conditional_t<sizeof(Key) == 4, float, double>(std::log(random.below(1000)))));
    });
  }
}

}  // namespace torchfast

int main() {
  using namespace torchfast;
  isa_under_test = "baseline";
  buffers_keep_what_they_are_told_to();
  parts_cover_a_range_at_multiples_of_the_step();
  keys_descend_with_the_scores<float>();
  keys_descend_with_the_scores<double>();
  radix_sort_is_a_stable_sort<uint32_t>();
  radix_sort_is_a_stable_sort<uint64_t>();
  std::puts(isa_under_test);
}
