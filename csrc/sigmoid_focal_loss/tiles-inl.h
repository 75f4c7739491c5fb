// The elements in tiles that fit in L1, in the memory order of the output: a pass for the losses, one for the
// gradient, and one for both. A tile is read where it lies if it is dense there and of the type of the
// mathematics, else it is gathered first. Integer targets become a tile of values; so do class ids, whose
// one-hot matrix never exists.
#if defined(TORCHFAST_SIGMOID_FOCAL_LOSS_TILES_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_SIGMOID_FOCAL_LOSS_TILES_INL_H
#undef TORCHFAST_SIGMOID_FOCAL_LOSS_TILES_INL_H
#else
#define TORCHFAST_SIGMOID_FOCAL_LOSS_TILES_INL_H
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "memory/parallel.h"
#include "memory/walk-inl.h"
#include "sigmoid_focal_loss/formula-inl.h"

TORCHFAST_KERNELS

using sigmoid_focal_loss::Call, sigmoid_focal_loss::Reduction, sigmoid_focal_loss::Total;

constexpr int64_t kTile = 1024;    // elements that stay in L1 between gathering and use
constexpr int64_t kBlock = 16384;  // their losses are one term of the sum, however many threads there are

// ---- A tile ----------------------------------------------------------------------------------

// What a kernel reads of a tile; absent operands are null.
template <class R>
struct Tile {
  const R *z, *y, *weight, *pos_weight, *upstream;
  const R* counts;  // 0 where the element does not count
  bool is_weighted() const { return weight || pos_weight || upstream || counts; }
};

template <bool hard, bool weighted, class R>
TORCHFAST_INLINE auto factors(const Tile<R>& t, const Formula<R>& k, int64_t i, auto count) {
  Vec<R> y = load_n<R>(t.y + i, count), one = splat<R>(1), both = one, pos_weight = one;
  if constexpr (weighted) {
    if (t.weight) both = load_n<R>(t.weight + i, count);
    if (t.upstream) both = both * load_n<R>(t.upstream + i, count);
    if (t.counts) both = load_n<R>(t.counts + i, count) != 0 ? both : splat<R>(0);
    if (t.pos_weight) pos_weight = load_n<R>(t.pos_weight + i, count);
  }
  auto weigh = [&](Vec<R> factor, Vec<R> by)
                   __attribute__((always_inline)) { return weighted ? times<R>(both, factor * by) : factor; };
  if constexpr (hard) {
    IntVec<R> positive = y != 0;
    return Hard<R>{positive, weigh(positive ? splat(k.a1) : splat(k.b1), positive ? pos_weight : one)};
  } else {
    return Soft<R>{weigh(y * k.a1 + k.a0, pos_weight), weigh((R(1) - y) * k.b1 + k.b0, one)};
  }
}

// Writes the losses to `out` (or null) and returns their sum.
template <Mode mode, bool hard, bool weighted, class R>
double tile_forward(const Tile<R>& t, const Formula<R>& k, int64_t n, R* out) {
  Vec<R> sum{};
  for_each_vec<R, 1>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    Vec<R> loss = loss_of<mode, R>(load_n<R>(t.z + i, count), factors<hard, weighted>(t, k, i, count), k);
    if (out) store_n<R>(out + i, loss, count);
    sum += only_n<R>(loss, count, R(0));
  });
  return sum_lanes<R>(sum);
}

template <Mode mode, bool hard, bool weighted, class R>
void tile_backward(const Tile<R>& t, const Formula<R>& k, int64_t n, R* out) {
  for_each_vec<R, 1>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    auto f = factors<hard, weighted>(t, k, i, count);
    store_n<R>(out + i, gradient_of<mode, R>(load_n<R>(t.z + i, count), f, k), count);
  });
}

// Both at once: they share an exponential, a logarithm and powers. `scaled` is k times the upstream gradient.
template <Mode mode, bool hard, bool weighted, class R>
double tile_both(const Tile<R>& t, const Formula<R>& k, const Formula<R>& scaled, int64_t n, R* out) {
  Vec<R> sum{};
  for_each_vec<R, 1>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    Vec<R> z = load_n<R>(t.z + i, count);
    Vec<R> loss = loss_of<mode, R>(z, factors<hard, weighted>(t, k, i, count), k);
    sum += only_n<R>(loss, count, R(0));
    store_n<R>(out + i, gradient_of<mode, R>(z, factors<hard, weighted>(t, scaled, i, count), k), count);
  });
  return sum_lanes<R>(sum);
}

// Calls f(mode, hard, weighted). Double precision is for checking, not for speed: it has one kernel a mode.
template <class R, class F>
void with_kernel(const Tile<R>& t, const Formula<R>& k, bool hard, const F& f) {
  constexpr bool fast = std::is_same_v<R, float>;
  auto with_mode = [&](auto mode) {
    auto with_target = [&](auto hard) {
      if (fast && !t.is_weighted())
        f(mode, hard, std::bool_constant<!fast>{});
      else
        f(mode, hard, std::true_type{});
    };
    fast&& hard ? with_target(std::bool_constant<fast>{}) : with_target(std::false_type{});
  };
  switch (k.mode) {
    case Mode::bce: return with_mode(std::integral_constant<Mode, Mode::bce>{});
    case Mode::focal: return with_mode(std::integral_constant<Mode, Mode::focal>{});
    case Mode::asymmetric: return with_mode(std::integral_constant<Mode, Mode::asymmetric>{});
  }
}

// ---- The call in tiles -----------------------------------------------------------------------

// One thread's memory, for what has to be gathered.
template <class R>
struct Scratch {
  R z[kTile], y[kTile], weight[kTile], pos_weight[kTile], upstream[kTile], counts[kTile], out[kTile];
  int64_t ids[kTile], classes[kTile];
  uint8_t mask[kTile];
};

template <class R>
class Tiles {
 public:
  // The leader, which is dense or the logits, gives the order of the walk.
  Tiles(const Call& of, const View& leader, const View& upstream = {})
      : numel(of.logits.elements),
        blocks((numel + kBlock - 1) / kBlock),
        call_(of),
        order_(of.logits, memory_order(leader)),
        rows_(order_),
        z_(order_, of.logits) {
    int64_t last = call_.logits.dims - 1;
    bool integer = is_integer(call_.target.type);
    form_ = call_.class_ids() ? Form::class_ids : integer ? Form::integers : Form::values;
    hard_ = !is_floating(call_.target.type) && call_.options.label_smoothing == 0;
    if (form_ == Form::class_ids) {
      lowest_ = -1;
      highest_ = call_.logits.size(last) - 1;
      if (order_.dims.back() == last)
        rows_.drop_last();
      else
        classes_.emplace(order_, [&](int64_t d) { return int64_t(d == last); });
    }
    if (integer)
      ids_.emplace(rows_, call_.target);
    else
      y_.emplace(order_, call_.target);
    if (call_.weight) weight_.emplace(order_, call_.weight);
    if (call_.pos_weight) pos_weight_.emplace(order_, call_.pos_weight);
    if (call_.mask) mask_.emplace(order_, call_.mask);
    if (upstream) upstream_.emplace(order_, upstream);
  }

  // Calls f(first element, number of elements, block, scratch) for each tile, over threads.
  template <class F>
  void for_each(const F& f) {
    parallel_for(0, blocks, kGrainElements / kBlock, [&](int64_t from, int64_t to) {
      auto scratch = std::make_unique_for_overwrite<Scratch<R>>();
      for (int64_t block = from; block < to; ++block) {
        int64_t end = std::min(numel, (block + 1) * kBlock);
        for (int64_t i = block * kBlock; i < end; i += kTile) f(i, std::min(kTile, end - i), block, *scratch);
      }
    });
    if (bad_) throw_first_bad();
  }

  Tile<R> read(int64_t i, int64_t n, Scratch<R>& s) {
    bool all_count = read_counts(i, n, s);
    return {z_.read(i, n, s.z),
            form_ == Form::values ? read(y_, i, n, s.y) : s.y,
            read(weight_, i, n, s.weight),
            read(pos_weight_, i, n, s.pos_weight),
            read(upstream_, i, n, s.upstream),
            all_count ? nullptr : s.counts};
  }
  // Counts the elements of a tile that are neither masked nor ignored; of its tensors only those are read
  // that say so.
  int64_t count(int64_t i, int64_t n, Scratch<R>& s) {
    return read_counts(i, n, s) ? n : n - std::count(s.counts, s.counts + n, R(0));
  }
  bool is_hard() const { return hard_; }
  bool some_may_not_count() const { return mask_ || ids_; }

  const int64_t numel, blocks;

 private:
  enum class Form { values, integers, class_ids };  // values: floats or bool

  template <class Operand, class To>
  static const To* read(const std::optional<Operand>& operand, int64_t i, int64_t n, To* buffer) {
    return operand ? operand->read(i, n, buffer) : nullptr;
  }

  // Integer targets become s.y. Returns true if all elements of the tile count; else s.counts says which do.
  bool read_counts(int64_t i, int64_t n, Scratch<R>& s) {
    const uint8_t* mask = read(mask_, i, n, s.mask);
    for (int64_t j = 0; mask && j < n; ++j) s.counts[j] = mask[j];
    if (form_ == Form::integers) return decode(mask, i, n, s);
    if (form_ == Form::class_ids) return classes_ ? one_hot(mask, i, n, s) : one_hot_rows(mask, i, n, s);
    return !mask;
  }

  // ---- Integer targets: each returns true if all of the tile count

  bool skipped(int64_t id) const { return id == call_.options.ignore_index || id < lowest_ || id > highest_; }

  // Leaves out elements begin .. end-1: an error unless id is ignore_index or all of them are masked.
  void skip(int64_t id, const uint8_t* mask, int64_t begin, int64_t end, Scratch<R>& s) {
    std::fill(s.counts + begin, s.counts + end, R(0));
    auto is_set = [](uint8_t bit) { return bit != 0; };
    if (id != call_.options.ignore_index && (!mask || std::any_of(mask + begin, mask + end, is_set)))
      bad_ = true;
  }

  bool decode(const uint8_t* mask, int64_t i, int64_t n, Scratch<R>& s) {
    const int64_t *ids = ids_->read(i, n, s.ids), ignored = call_.options.ignore_index;
    int64_t others = 0;
    for (int64_t j = 0; j < n; ++j) {
      s.y[j] = R(int32_t(ids[j]));
      others |= (ids[j] & ~int64_t(1)) | -int64_t(ids[j] == ignored);
    }
    if (others == 0) return !mask;
    if (!mask) std::fill(s.counts, s.counts + n, R(1));
    for (int64_t j = 0; j < n; ++j)
      if (skipped(ids[j])) skip(ids[j], mask, j, j + 1, s);
    return false;
  }

  // Writes the one-hot matrix of class ids. Rows lie one after the other, and one element of each is not 0.
  bool one_hot_rows(const uint8_t* mask, int64_t i, int64_t n, Scratch<R>& s) {
    int64_t classes = highest_ + 1, row = i / classes, rows = (i + n - 1) / classes - row + 1;
    const int64_t* ids = ids_->read(row, rows, s.ids);
    bool all_count = !mask;
    std::fill(s.y, s.y + n, R(0));
    for (int64_t begin = row * classes - i; begin < n; begin += classes) {  // relative to the tile
      int64_t id = *ids++;
      if (!skipped(id)) {
        if (uint64_t(begin + id) < uint64_t(n) && id >= 0) s.y[begin + id] = R(1);
        continue;
      }
      if (all_count) std::fill(s.counts, s.counts + n, R(1));
      all_count = false;
      skip(id, mask, std::max<int64_t>(begin, 0), std::min(begin + classes, n), s);
    }
    return all_count;
  }

  // Writes the one-hot matrix where the classes of a row are not adjacent.
  bool one_hot(const uint8_t* mask, int64_t i, int64_t n, Scratch<R>& s) {
    const int64_t* ids = ids_->read(i, n, s.ids);
    int64_t* to = s.classes;
    classes_->for_each_run(i, n, [&](int64_t first, int64_t stride, int64_t count) {
      for (int64_t j = 0; j < count; ++j) *to++ = first + j * stride;
    });
    if (!mask) std::fill(s.counts, s.counts + n, R(1));
    for (int64_t j = 0; j < n; ++j) {
      s.y[j] = R(ids[j] == s.classes[j]);
      if (skipped(ids[j])) skip(ids[j], mask, j, j + 1, s);
    }
    return false;
  }

  // Names the first bad target in the order of the elements, not in that of the memory or of the threads.
  void throw_first_bad() const {
    Order order(call_.logits, logical_order(call_.logits));
    Operand<int64_t> targets(order, call_.target);
    std::optional<Operand<uint8_t>> masks;
    if (call_.mask) masks.emplace(order, call_.mask);
    auto s = std::make_unique_for_overwrite<Scratch<R>>();
    for (int64_t i = 0; i < numel; i += kTile) {
      int64_t n = std::min(kTile, numel - i);
      const int64_t* ids = targets.read(i, n, s->ids);
      const uint8_t* mask = masks ? masks->read(i, n, s->mask) : nullptr;
      for (int64_t j = 0; j < n; ++j) {
        if (!skipped(ids[j]) || ids[j] == call_.options.ignore_index || (mask && !mask[j])) continue;
        throw std::out_of_range("target " + std::to_string(ids[j]) + " is out of range: allowed are " +
                                (form_ == Form::integers ? "0, 1" : "-1 to " + std::to_string(highest_)) +
                                " and ignore_index");
      }
    }
  }

  const Call& call_;
  Order order_, rows_;  // rows_ lacks the classes if those of a row are adjacent
  Operand<R> z_;
  Form form_;
  bool hard_;
  int64_t lowest_ = 0, highest_ = 1;  // integers that are allowed
  std::optional<Operand<R>> y_, weight_, pos_weight_, upstream_;
  std::optional<Operand<int64_t>> ids_;
  std::optional<Operand<uint8_t>> mask_;
  std::optional<Strides> classes_;  // gives an element's class, as if that were an offset
  std::atomic<bool> bad_{false};
};

// ---- Passes: the output is the leader of the walk ----------------------------------------------

// Counts the elements of a tile that are neither masked nor ignored.
template <class R>
int64_t counted(const Tile<R>& tile, int64_t n) {
  return tile.counts ? n - std::count(tile.counts, tile.counts + n, R(0)) : n;
}

inline Total total(const std::vector<Total>& parts) {
  Total sum;
  for (const Total& part : parts) sum.loss += part.loss, sum.counted += part.counted;
  return sum;
}

template <class R>
Total losses(const Call& call, const View& each_loss) {
  R* out = each_loss.writable<R>();
  Tiles<R> tiles(call, each_loss ? each_loss : call.logits);
  Formula<R> k(call.options, 1);
  std::vector<Total> parts(tiles.blocks);
  tiles.for_each([&](int64_t i, int64_t n, int64_t block, Scratch<R>& s) {
    Tile<R> tile = tiles.read(i, n, s);
    with_kernel(tile, k, tiles.is_hard(), [&](auto mode, auto hard, auto weighted) {
      parts[block].loss += tile_forward<mode(), hard(), weighted()>(tile, k, n, out ? out + i : nullptr);
    });
    parts[block].counted += counted(tile, n);
  });
  return total(parts);
}

template <class T, class R>
void gradients(const Call& call, double factor, const View& upstream, const View& gradient) {
  T* to = gradient.writable<T>();
  Tiles<R> tiles(call, gradient, upstream);
  Formula<R> k(call.options, factor);
  tiles.for_each([&](int64_t i, int64_t n, int64_t, Scratch<R>& s) {
    Tile<R> tile = tiles.read(i, n, s);
    R* out = s.out;
    if constexpr (std::is_same_v<T, R>) out = to + i;
    with_kernel(tile, k, tiles.is_hard(), [&](auto mode, auto hard, auto weighted) {
      tile_backward<mode(), hard(), weighted()>(tile, k, n, out);
    });
    if constexpr (!std::is_same_v<T, R>) convert<R>(out, to + i, n);
  });
}

// Both in one walk, with the same bits. The mean's divisor comes first: where elements may not count, that is
// a walk of its own.
template <class T, class R>
Total losses_and_gradients(const Call& call, double upstream, const View& gradient) {
  T* to = gradient.writable<T>();
  Tiles<R> tiles(call, gradient);
  std::vector<Total> parts(tiles.blocks);
  bool mean = call.options.reduction == Reduction::mean, first = mean && tiles.some_may_not_count();
  if (first)
    tiles.for_each([&](int64_t i, int64_t n, int64_t block, Scratch<R>& s) {
      parts[block].counted += tiles.count(i, n, s);
    });
  R divisor = !mean ? R(1) : R(first ? total(parts).counted : tiles.numel);
  double factor = divisor == 0 ? 0 : 1 / double(divisor) * R(upstream);
  if (memory_order(gradient) != memory_order(call.logits)) {  // their sum would be of another order
    gradients<T, R>(call, factor, {}, gradient);
    return losses<R>(call, {});
  }
  Formula<R> k(call.options, 1), scaled(call.options, factor);
  tiles.for_each([&](int64_t i, int64_t n, int64_t block, Scratch<R>& s) {
    Tile<R> tile = tiles.read(i, n, s);
    R* out = s.out;
    if constexpr (std::is_same_v<T, R>) out = to + i;
    with_kernel(tile, k, tiles.is_hard(), [&](auto mode, auto hard, auto weighted) {
      parts[block].loss += tile_both<mode(), hard(), weighted()>(tile, k, scaled, n, out);
    });
    if (!first) parts[block].counted += counted(tile, n);
    if constexpr (!std::is_same_v<T, R>) convert<R>(out, to + i, n);
  });
  return total(parts);
}

Total all_losses(const Call& call, const View& each_loss) {
  return with_logits_type(call.logits, [&](auto, auto r) { return losses<decltype(r)>(call, each_loss); });
}

void all_gradients(const Call& call, double factor, const View& upstream, const View& gradient) {
  with_logits_type(call.logits, [&](auto t, auto r) {
    gradients<decltype(t), decltype(r)>(call, factor, upstream, gradient);
  });
}

Total all_losses_and_gradients(const Call& call, double upstream, const View& gradient) {
  return with_logits_type(call.logits, [&](auto t, auto r) {
    return losses_and_gradients<decltype(t), decltype(r)>(call, upstream, gradient);
  });
}

TORCHFAST_END_KERNELS

#endif
