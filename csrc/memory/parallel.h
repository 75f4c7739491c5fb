// Work shared out to the threads of torch's pool, without torch's headers: torch/parallel.cpp has the way
// there.
#pragma once

#include <algorithm>
#include <cstdint>

namespace torchfast {

constexpr int64_t kGrainElements = 32768;  // less than this is not worth waking a thread

int64_t thread_count();
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*work)(const void*, int64_t, int64_t),
                  const void* context);

// Calls f(from, to) for ranges that make up begin .. end; all but the last have `grain` elements or more.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  parallel_for(
      begin, end, grain,
      [](const void* context, int64_t from, int64_t to) { (*static_cast<const F*>(context))(from, to); }, &f);
}

// Work on one query or curve, shared out to threads where it is huge.
struct Parts {
  int64_t count = 1;
  template <class F>
  void for_each(const F& f) const {
    if (count == 1) return f(int64_t{0});
    parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t part = from; part < to; ++part) f(part);
    });
  }
  // Calls f(part, begin, end) for each part; the boundaries are multiples of `step`.
  template <class F>
  void for_each_range(int64_t n, int64_t step, const F& f) const {
    int64_t each = (n / count + step) / step * step;
    for_each([&](int64_t part) { f(part, std::min(n, part * each), std::min(n, (part + 1) * each)); });
  }
};

}  // namespace torchfast
