// memory/walk-inl.h against plain nested loops.
#define TORCHFAST_FILE "walk.cpp"
#include "simd/foreach_isa.h"

#ifndef WALK_CPP_ONCE
#define WALK_CPP_ONCE
#include <algorithm>
#include <numeric>
#include <vector>

#include "check.h"
#include "memory/view.h"

// A shape, and a tensor of it whose dimensions lie in memory in any order; odd ones have gaps or are
// expanded.
struct Tensor {
  Tensor(Random& random, const std::vector<int64_t>& shape, bool odd) : sizes(shape), strides(shape.size()) {
    std::vector<size_t> order(shape.size());
    std::iota(order.begin(), order.end(), size_t{0});
    bool permuted = random.below(2);
    for (size_t d = order.size(); permuted && d > 1; --d) std::swap(order[d - 1], order[random.below(d)]);
    int64_t step = odd ? 1 + random.below(3) : 1;
    for (size_t d = order.size(); d-- > 0;) {
      bool expanded = odd && random.below(4) == 0;
      strides[order[d]] = expanded ? 0 : step;
      if (!expanded) step *= shape[order[d]] + (odd ? random.below(3) : 0);
    }
    memory = step;
  }
  torchfast::View view(void* data, torchfast::Type type) const {
    int64_t elements = 1;
    for (int64_t size : sizes) elements *= size;
    return {data, type, int64_t(sizes.size()), elements, sizes.data(), strides.data()};
  }
  // Offsets of all elements, by a loop for each dimension of `order`.
  std::vector<int64_t> offsets(const std::vector<int64_t>& order) const {
    std::vector<int64_t> found{0};
    for (int64_t d : order) {
      std::vector<int64_t> more;
      for (int64_t offset : found)
        for (int64_t i = 0; i < sizes[d]; ++i) more.push_back(offset + i * strides[d]);
      found = more;
    }
    return found;
  }

  std::vector<int64_t> sizes, strides;
  int64_t memory;  // elements that it spans
};

inline std::vector<int64_t> any_shape(Random& random) {
  std::vector<int64_t> shape(random.below(5));
  for (int64_t& size : shape) size = 1 + random.below(6);
  return shape;
}
#endif

#include "memory/walk-inl.h"

TORCHFAST_KERNELS

void runs_cover_the_elements_in_order() {
  Random random;
  for (int trial = 0; trial < 2000; ++trial) {
    std::vector<int64_t> shape = any_shape(random);
    Tensor leader(random, shape, trial % 2), other(random, shape, trial % 3);
    std::vector<int64_t> order = memory_order(leader.view(nullptr, Type::f32));
    for (const Tensor& tensor : {leader, other}) {
      std::vector<int64_t> expected = tensor.offsets(order);
      View view = tensor.view(nullptr, Type::f32);
      Strides strides(Order(view, order), view);
      int64_t elements = int64_t(expected.size());
      int64_t from = random.below(elements), n = 1 + random.below(elements - from), at = from;
      strides.for_each_run(from, n, [&](int64_t offset, int64_t stride, int64_t count) {
        CHECK(count > 0 && at + count <= from + n);
        for (int64_t i = 0; i < count; ++i) CHECK(expected[at++] == offset + i * stride);
      });
      CHECK(at == from + n);
      std::vector<int64_t> counted(elements);
      std::iota(counted.begin(), counted.end(), 0);
      CHECK(strides.is_dense() == (expected == counted));
    }
  }
}

// A tensor without gaps is one run in the order of its memory, however its dimensions are permuted.
void a_permuted_dense_tensor_is_one_run() {
  Random random;
  for (int trial = 0; trial < 500; ++trial) {
    Tensor tensor(random, any_shape(random), false);
    View view = tensor.view(nullptr, Type::f32);
    CHECK(Strides(Order(view, memory_order(view)), view).is_dense());
  }
}

template <class To, class From>
void operands_read(Type type, From (*make)(int64_t)) {
  Random random;
  for (int trial = 0; trial < 300; ++trial) {
    Tensor tensor(random, any_shape(random), trial % 2);
    std::vector<From> data(tensor.memory);
    std::vector<To> values(tensor.memory), buffer;
    for (int64_t i = 0; i < tensor.memory; ++i) data[i] = make(i), values[i] = element_as<To>(data[i]);
    View view = tensor.view(data.data(), type);
    std::vector<int64_t> order = logical_order(view), expected = tensor.offsets(order);
    Operand<To> operand(Order(view, order), view);
    int64_t from = random.below(view.elements), n = 1 + random.below(view.elements - from);
    buffer.resize(n);
    const To* read = operand.read(from, n, buffer.data());
    for (int64_t i = 0; i < n; ++i) CHECK(read[i] == values[expected[from + i]]);
  }
}

// All dimensions but one in their own order, as the losses over classes walk.
void positions_are_those_of_nested_loops() {
  Random random;
  for (int trial = 0; trial < 1000; ++trial) {
    std::vector<int64_t> shape = any_shape(random);
    if (shape.empty()) continue;
    int64_t skip = random.below(shape.size());
    Tensor tensor(random, shape, trial % 2);
    View view = tensor.view(nullptr, Type::f32);
    std::vector<int64_t> order = logical_order(view, skip), expected = tensor.offsets(order);
    CHECK(int64_t(order.size()) == view.dims - 1);
    Strides strides(Order(view, order), view);
    for (size_t i = 0; i < expected.size(); ++i) CHECK(strides.offset(i) == expected[i]);
  }
}

template <class To>
void scattered_elements_are_gathered_again() {
  for (int64_t stride : {1, 2, 5}) {
    float values[40], back[40];
    To memory[200] = {};
    for (int i = 0; i < 40; ++i) values[i] = float(i) - 7;
    scatter(values, 40, memory, stride);
    gather(memory, stride, 40, back);
    for (int i = 0; i < 40; ++i) CHECK(back[i] == values[i]);
  }
}

void run() {
  runs_cover_the_elements_in_order();
  a_permuted_dense_tensor_is_one_run();
  operands_read<float, float>(Type::f32, [](int64_t i) { return float(i); });
  operands_read<float, f16>(Type::f16, [](int64_t i) { return f16{uint16_t(0x3c00 + i % 0x1000)}; });
  operands_read<float, bf16>(Type::bf16, [](int64_t i) { return bf16{uint16_t(0x3f80 + i % 0x1000)}; });
  operands_read<float, uint8_t>(Type::boolean, [](int64_t i) { return uint8_t(i % 3 == 0); });
  operands_read<uint8_t, uint8_t>(Type::boolean, [](int64_t i) { return uint8_t(i % 3 == 0); });
  operands_read<int64_t, int8_t>(Type::i8, [](int64_t i) { return int8_t(i); });
  operands_read<int64_t, uint16_t>(Type::u16, [](int64_t i) { return uint16_t(i * 257); });
  operands_read<int64_t, int64_t>(Type::i64, [](int64_t i) { return i - (int64_t{1} << 40); });
  positions_are_those_of_nested_loops();
  scattered_elements_are_gathered_again<float>();
  scattered_elements_are_gathered_again<bf16>();
  scattered_elements_are_gathered_again<f16>();
}

TORCHFAST_END_KERNELS

#ifdef TORCHFAST_LAST_ISA
int main() { RUN_IN_EVERY_ISA(run); }
#endif
