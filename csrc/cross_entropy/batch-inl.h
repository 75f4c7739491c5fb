// The positions of a batch in blocks, shared out to threads. Strides and half precision are dealt with here:
// chunks of rows and tiles are staged in cache, as R, scaled and capped.
#if defined(TORCHFAST_CROSS_ENTROPY_BATCH_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_CROSS_ENTROPY_BATCH_INL_H
#undef TORCHFAST_CROSS_ENTROPY_BATCH_INL_H
#else
#define TORCHFAST_CROSS_ENTROPY_BATCH_INL_H
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cross_entropy/call.h"
#include "cross_entropy/chunks-inl.h"
#include "cross_entropy/tiles-inl.h"
#include "memory/parallel.h"
#include "memory/walk-inl.h"

TORCHFAST_KERNELS

using cross_entropy::Call, cross_entropy::Options, cross_entropy::Reduction;

constexpr int64_t kChunk = 1024;     // elements of a row that stay in L1 between its two passes
constexpr int64_t kRowClasses = 64;  // a row with at least so many is worth a walk of its own
constexpr int64_t kTileElements = 8192;

// One thread's memory: a tile, or chunks of a row.
template <class R>
struct Scratch {
  Scratch(int64_t size, bool by_rows, bool probabilities, int64_t positions)
      : z(new R[size]),
        y(new R[probabilities ? size : 0]),
        g(new R[by_rows ? size : 0]),
        own_u(new R[positions]),
        upstream(new R[positions]),
        target(new Int<R>[positions]) {}
  std::unique_ptr<R[]> z, y, g, own_u, upstream;
  std::unique_ptr<Int<R>[]> target;
};

// A call in the form that the passes read: its blocks of positions, decoded targets, staged logits.
template <class T, class R>
struct Batch {
  Batch(const Call& given, const View* gradient)
      : call(given),
        options(call.options),
        class_dim(call.class_dim()),
        classes(call.classes()),
        class_stride(call.logits.stride(class_dim)),
        probabilities(call.probabilities()),
        order(call.logits, logical_order(call.logits, class_dim)),
        of_logits(order, call.logits),
        of_target(order, probabilities ? call.target : call.logits),
        of_gradient(order, gradient ? *gradient : call.logits),
        rows(call.rows()),
        samples(call.sample_weight.as<R>()),
        x(call.logits.as<T>()),
        keep(R(1 - options.label_smoothing)),
        uniform(R(options.label_smoothing / classes)) {
    bool weighted = call.weight || call.alpha;
    class_u.assign(classes, probabilities ? R(1) : uniform);
    if (weighted) own.assign(classes, keep);
    for (const View& factor : {call.weight, call.alpha}) {
      if (!factor) continue;
      int64_t step = factor.elements == 1 ? 0 : 1;
      for (int64_t c = 0; c < classes; ++c) {
        class_u[c] *= factor.as<R>()[c * step];
        own[c] *= factor.as<R>()[c * step];
      }
    }
    if (call.weight) class_weight.assign(call.weight.as<R>(), call.weight.as<R>() + classes);
    kind = probabilities                  ? U::probs
           : options.label_smoothing == 0 ? U::none
           : weighted                     ? U::classes
                                          : U::uniform;
    by_rows = classes >= kRowClasses && class_stride == 1;
    per_block = by_rows ? std::max<int64_t>(1, 16384 / classes)
                        : std::clamp<int64_t>(kTileElements / classes, kLanes, 512) / kLanes * kLanes;
    blocks = (rows + per_block - 1) / per_block;
  }

  // Calls f(first position, number of positions, block, scratch) for each block; scratch.target is decoded.
  template <class F>
  void for_each_block(const F& f) {
    int64_t size = by_rows ? std::min(kChunk, classes) : classes * per_block;
    int64_t grain = std::max<int64_t>(1, kGrainElements / (per_block * classes));
    parallel_for(0, blocks, grain, [&](int64_t from, int64_t to) {
      Scratch<R> scratch(size, by_rows, probabilities, per_block);
      for (int64_t block = from; block < to; ++block) {
        int64_t begin = block * per_block, n = std::min(per_block, rows - begin);
        decode(begin, n, scratch.target.get());
        f(begin, n, block, scratch);
      }
    });
    int64_t i = first_bad.load();
    if (i == INT64_MAX) return;
    int64_t value = with_index_type(call.target, [&](auto* t) { return int64_t(t[i]); });
    throw std::out_of_range("target " + std::to_string(value) + " is out of range: allowed are 0 to " +
                            std::to_string(classes - 1) + " and ignore_index");
  }

  // Decodes the target classes of positions begin .. begin+n-1. Rows of sample weight 0 are ignored; so is
  // an illegal class, once it is noted.
  void decode(int64_t begin, int64_t n, Int<R>* out) {
    if (probabilities) {
      std::fill_n(out, n, kNone);
    } else {
      bool bad = with_index_type(call.target, [&](auto* t) {
        bool any = false;
        for (int64_t j = 0; j < n; ++j) {
          int64_t value = t[begin + j];
          bool legal = uint64_t(value) < uint64_t(classes), counts = value != options.ignore_index;
          out[j] = legal && counts ? Int<R>(value) : kIgnored;
          any |= counts && !legal;
        }
        return any;
      });
      if (bad) note_first_bad(begin, n);
    }
    for (int64_t j = 0; samples && j < n; ++j)
      if (samples[begin + j] == 0) out[j] = kIgnored;
  }
  void note_first_bad(int64_t begin, int64_t n) {
    with_index_type(call.target, [&](auto* t) {
      int64_t i = begin;
      while (int64_t(t[i]) == options.ignore_index || uint64_t(int64_t(t[i])) < uint64_t(classes)) ++i;
      int64_t seen = first_bad.load();
      while (i < seen && !first_bad.compare_exchange_weak(seen, i)) {
      }
    });
  }

  R own_u(Int<R> t) const { return t < 0 ? R(0) : own.empty() ? keep : own[t]; }

  double divisor(int64_t begin, int64_t n, const Int<R>* targets) const {
    if (class_weight.empty() && !samples) {
      int64_t count = 0;
      for (int64_t j = 0; j < n; ++j) count += targets[j] != kIgnored;
      return count;
    }
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (targets[j] == kIgnored) continue;
      double weight = targets[j] >= 0 && !class_weight.empty() ? class_weight[targets[j]] : R(1);
      sum += samples ? weight * samples[begin + j] : weight;
    }
    return sum;
  }

  // ---- Staging: strides and half precision are dealt with here, in cache

  // Gives n values from p, `stride` apart, as R in `buffer`, or p itself if they are dense and R already.
  template <class S>
  static const R* stage(const S* p, int64_t stride, int64_t n, R* buffer) {
    if constexpr (std::is_same_v<S, R>)
      if (stride == 1) return p;
    gather(p, stride, n, buffer);
    return buffer;
  }
  const R* stage_logits(const T* row, int64_t c, int64_t n, R* buffer) const {
    const R* z = stage(row + c * class_stride, class_stride, n, buffer);
    if (!options.transformed()) return z;
    if (z != buffer) std::copy(z, z + n, buffer);
    transform<R>(buffer, n, R(options.logit_scale), R(options.softcap));
    return buffer;
  }
  template <class F>
  auto with_probs(const F& f) const {
    if constexpr (std::is_same_v<R, float>) {
      if (call.target.type == Type::bf16) return f(call.target.as<bf16>());
      if (call.target.type == Type::f16) return f(call.target.as<f16>());
    }
    return f(call.target.as<R>());
  }
  Weights<R> weights(int64_t i, int64_t c, int64_t n, R* buffer) const {
    const R* probs = nullptr;
    if (probabilities) {
      int64_t stride = call.target.stride(class_dim);
      probs =
          with_probs([&](auto* y) { return stage(y + of_target.offset(i) + c * stride, stride, n, buffer); });
    }
    return {class_u.data() + c, probs, keep, uniform};
  }

  // Stages positions i .. i+n-1 of p as [classes][width], with 0 in idle lanes.
  template <class S>
  void stage_tile(const S* p, const Strides& at, int64_t stride, int64_t i, int64_t n, int64_t width,
                  R* tile) const {
    for (int64_t c = 0; c < classes; ++c) std::fill(tile + c * width + n, tile + (c + 1) * width, R(0));
    at.for_each_run(i, n, [&](int64_t offset, int64_t step, int64_t count) {
      for (int64_t c = 0; c < classes; ++c) gather(p + offset + c * stride, step, count, tile + c * width);
      tile += count;
    });
  }
  void unstage_tile(const R* tile, T* out, int64_t stride, int64_t i, int64_t n, int64_t width) const {
    of_gradient.for_each_run(i, n, [&](int64_t offset, int64_t step, int64_t count) {
      for (int64_t c = 0; c < classes; ++c) scatter(tile + c * width, count, out + offset + c * stride, step);
      tile += count;
    });
  }
  Tile<R> tile(int64_t i, int64_t n, Scratch<R>& s) const {
    int64_t width = (n + kLanes - 1) / kLanes * kLanes;
    std::fill(s.target.get() + n, s.target.get() + width, kIgnored);
    stage_tile(x, of_logits, class_stride, i, n, width, s.z.get());
    if (options.transformed())
      transform<R>(s.z.get(), classes * width, R(options.logit_scale), R(options.softcap));
    if (probabilities)
      with_probs(
          [&](auto* y) { stage_tile(y, of_target, call.target.stride(class_dim), i, n, width, s.y.get()); });
    for (int64_t j = 0; !own.empty() && j < width; ++j) s.own_u[j] = own_u(s.target[j]);
    Weights<R> weights{class_u.data(), probabilities ? s.y.get() : nullptr, keep, uniform};
    return {s.z.get(), classes, width, n, weights, s.target.get(), own.empty() ? nullptr : s.own_u.get()};
  }

  static constexpr int64_t kLanes = 16;  // a multiple of every Simd<R>::lanes
  const Call& call;
  const Options& options;
  int64_t class_dim, classes, class_stride;
  bool probabilities;
  Order order;  // of the positions: all dimensions but the classes'
  Strides of_logits, of_target, of_gradient;
  int64_t rows;
  const R* samples;  // sample_weight, or null
  const T* x;
  R keep, uniform;
  std::vector<R> class_u, class_weight, own;  // Weights::classes; w; (1-e) w a
  U kind;
  bool by_rows;
  int64_t per_block, blocks;
  std::atomic<int64_t> first_bad{INT64_MAX};
};

TORCHFAST_END_KERNELS

#endif
