// How the kernels see tensors: their elements' types, as template arguments.
//
// No include guard: the contents are compiled once per instruction set, in its namespace.

namespace torchfast::TORCHFAST_ISA {
namespace {

inline bool is_integer(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Long:
    case ScalarType::Int:
    case ScalarType::Short:
    case ScalarType::Char:
    case ScalarType::Byte:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64: return true;
    default: return false;
  }
}

// Of logits, scores and predictions.
inline bool is_score(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

template <class R>
constexpr ScalarType real_type = std::is_same_v<R, float> ? ScalarType::Float : ScalarType::Double;

template <class R>
const R* data(const Tensor& x) {
  return static_cast<const R*>(x.const_data_ptr());
}

// Dtypes that a kernel does not read end here, whatever the checks before it have let through: torch has
// many, and more with each release.
[[noreturn]] inline void refuse_dtype(const char* allowed) {
  throw std::invalid_argument(std::string("a tensor must be of ") + allowed);
}

// Calls f with the data of integers as a pointer to their own type.
template <class F>
auto with_index_type(const Tensor& x, const F& f) {
  const void* p = x.const_data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Int: return f(static_cast<const int32_t*>(p));
    case ScalarType::Short: return f(static_cast<const int16_t*>(p));
    case ScalarType::Char: return f(static_cast<const int8_t*>(p));
    case ScalarType::Byte: return f(static_cast<const uint8_t*>(p));
    case ScalarType::UInt16: return f(static_cast<const uint16_t*>(p));
    case ScalarType::UInt32: return f(static_cast<const uint32_t*>(p));
    case ScalarType::Long:
    case ScalarType::UInt64: return f(static_cast<const int64_t*>(p));  // large values are negative here
    default: refuse_dtype("an integer dtype");
  }
}

constexpr const char* kFloats = "float32, bfloat16, float16 or float64";

// The same for floats.
template <class F>
auto with_float_type(const Tensor& x, const F& f) {
  const void* p = x.const_data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(static_cast<const float*>(p));
    case ScalarType::BFloat16: return f(static_cast<const bf16*>(p));
    case ScalarType::Half: return f(static_cast<const f16*>(p));
    case ScalarType::Double: return f(static_cast<const double*>(p));
    default: refuse_dtype(kFloats);
  }
}

template <class F>
auto with_logits_type(const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::BFloat16: return f(bf16{}, float{});
    case ScalarType::Half: return f(f16{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    default: refuse_dtype(kFloats);
  }
}

}  // namespace
}  // namespace torchfast::TORCHFAST_ISA
