// The op torchfast::ranking_metrics on the CPU.
#include "ranking/op.h"

namespace torchfast::ranking {
namespace {

void run(const Call& call, const Tensor&) { rank_on_cpu(call); }

}  // namespace
}  // namespace torchfast::ranking

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("ranking_metrics", TORCH_BOX(&torchfast::ranking::ranking_metrics<torchfast::ranking::run>));
}
