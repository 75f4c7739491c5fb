// Ranking metrics on CUDA GPUs. Definitions and reference: torchfast/metrics/ranking/.
//
// As on the CPU, the metrics depend on the ranks of the judged documents (target > 0) alone. A team of
// threads finds them, sorts them by score, looks up every document's place among them, and so counts the
// documents in front of each and tied with it: scores and targets are read once, no document is sorted
// or moved. The team is
//   a warp              for queries of up to kWarpDocuments,
//   a block             for longer ones,
//   blocks of kSlice    for those longer than kHuge, in four kernels: find, sort, locate, evaluate.
// Judged documents that do not fit in shared memory (kCapacity) are sorted by one block in global memory
// (radix sort of their places, three ints a document, set aside where a query could be so long); so a huge
// query with very many of them keeps one block busy for long.
//
// Counts are integers, sums of doubles have a fixed order: results are the same in every run. One thread
// alone walks through a tie group for mrr, hit_rate and map over hits, as far as the cut-off.
//
// Plain CUDA, which tests/kernels/cuda_emulator also compiles for the CPU.
#include <algorithm>

#include "ranking/cuda/kernels.cuh"
#include "ranking/cuda/launch.h"

namespace torchfast::ranking {
namespace {

// Returns the most documents that a query can have, unretrieved ones included.
int64_t longest(const Call& c) { return (c.offsets ? c.documents : c.width) + c.unretrieved_documents; }

int64_t slots_of(const Call& c) {
  return (c.offsets ? c.documents : c.width) > kHuge ? c.documents / kHuge + 1 : 0;
}

struct Working {
  int64_t slots_at, lists_at, list, bytes;
  explicit Working(const Call& c)
      : slots_at(c.offsets || c.unretrieved_offsets ? 16 : 0),
        lists_at(slots_at + slots_of(c) * int64_t(sizeof(Slot))),
        list(longest(c) > kCapacity ? c.documents + c.unretrieved_documents : 0),
        bytes(lists_at + 3 * list * int64_t(sizeof(int))) {}
};

class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
                  const Arguments&... arguments) {
    if (error_ != cudaSuccess || blocks == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(std::min<int64_t>(blocks, INT32_MAX)));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    error_ = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  void clear(void* memory, int64_t bytes) {
    if (error_ == cudaSuccess && bytes > 0) error_ = cudaMemsetAsync(memory, 0, bytes, stream_);
  }
  const char* problem() const { return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_); }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

int power_of_2_from(int64_t n) {
  int power = 2;  // so that keys of 4 or 8 bytes and three ints each fill a multiple of 8 bytes
  while (power < n) power *= 2;
  return power;
}

template <class U>
void launch_pass(Pass p, Launcher& launch) {
  const Call& c = p.call;
  const int64_t most = longest(c), least = c.offsets ? 0 : c.width, slots = slots_of(c);
  auto list = [&] { return list_bytes(p.capacity, sizeof(Key<U>)); };
  if (least <= kWarpDocuments) {
    p.capacity = power_of_2_from(std::min<int64_t>(most, kWarpDocuments));
    constexpr int teams = kWarpTeams<U>;
    launch(rank_short<U>, std::min<int64_t>((c.queries + teams - 1) / teams, 1 << 16), 32 * teams,
           teams * (sizeof(Shared<1>) + list()), p);
  }
  p.capacity = power_of_2_from(std::min<int64_t>(most, kCapacity));
  const size_t shared = sizeof(Shared<kBlockWarps>) + list();
  if (most > kWarpDocuments && least <= kHuge) {
    p.queries_at_once = std::min<int64_t>(std::max<int64_t>(c.queries >> 12, 1), kBlockThreads);
    int64_t blocks = (c.queries + p.queries_at_once - 1) / p.queries_at_once;
    launch(rank_long<U>, blocks, kBlockThreads, shared, p);
  }
  if (slots > 0) {
    int64_t slices = (c.documents + kSlice - 1) / kSlice;
    launch.clear(p.slots, slots * int64_t(sizeof(Slot)));
    launch(find_in_slice, slices, kBlockThreads, 0, p);
    launch(sort_slot<U>, slots, kBlockThreads, shared, p);
    launch(locate_in_slice<U>, slices, kBlockThreads, shared, p);
    launch(evaluate_slot<U>, slots, kBlockThreads, shared, p);
  }
}

// Returns the number of the term, which is added if it is new.
int term_of(Pass& p, int kind, int64_t k) {
  for (int t = 0; t < p.term_count; ++t)
    if (p.terms[t].kind == kind && p.terms[t].k == k) return t;
  p.terms[p.term_count] = {kind, k};
  return p.term_count++;
}

void add_metric(Pass& p, int64_t kind, int64_t k, double* values) {
  int64_t cut = kind == r_precision ? 0 : k > 0 ? k : kNoCut;
  bool own = kind == dcg || kind == mrr || kind == map || kind == hit_rate;
  int term = term_of(p, int(kind == ndcg ? dcg : own ? kind : precision), cut);
  bool over_hits = kind == map && p.call.options.map_denominator == hits;
  p.metrics[p.metric_count++] = {int(kind), term, over_hits ? term_of(p, precision, cut) : 0, k, values};
}

}  // namespace

size_t working_bytes(const Call& call) { return size_t(Working(call).bytes); }

const char* launch(const Call& call, void* working, void* stream) {
  if (call.queries == 0) return nullptr;
  Launcher launch(static_cast<cudaStream_t>(stream));
  const Working plan(call);
  char* memory = static_cast<char*>(working);
  Pass pass{};
  pass.call = call;
  if (plan.slots_at > 0) {
    pass.illegal = reinterpret_cast<int*>(memory);
    launch.clear(pass.illegal, sizeof(int));
    auto check = [&](const int64_t* offsets, int64_t total) {
      if (offsets)
        launch(check_boundaries, std::min<int64_t>((call.queries + 255) / 256, 4096), 256, 0, offsets,
               call.queries, total, pass.illegal);
    };
    check(call.offsets, call.documents);
    check(call.unretrieved_offsets, call.unretrieved_documents);
  }
  pass.slots = reinterpret_cast<Slot*>(memory + plan.slots_at);
  if (plan.list > 0) {
    pass.ids = reinterpret_cast<int*>(memory + plan.lists_at);
    pass.larger = pass.ids + plan.list;
    pass.same = pass.larger + plan.list;
  }
  for (int64_t m = 0; m < call.metrics; ++m) {
    add_metric(pass, call.kinds[m], call.ks[m], call.values + m * call.queries);
    if (m + 1 < call.metrics && pass.metric_count < kMetrics && pass.term_count + 2 <= kTerms) continue;
    switch (size_of(call.preds.type)) {
      case 2: launch_pass<uint16_t>(pass, launch); break;
      case 4: launch_pass<uint32_t>(pass, launch); break;
      default: launch_pass<uint64_t>(pass, launch);
    }
    pass.metric_count = pass.term_count = 0;
  }
  return launch.problem();
}

}  // namespace torchfast::ranking
