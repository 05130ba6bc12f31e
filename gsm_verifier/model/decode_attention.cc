// Attention of one step of the sampler on CPU: each slot's key and value are put into its own branch,
// in place, and its query looks over its prompt and its branch.
//
// XLA:CPU multiplies with all W positions of every slot and masks; most slots are much younger. Here
// only what is visible is read, and a prompt's keys and values once for all of its slots. The
// letters are those of gsm_verifier/sharding.py. Vectors are the compilers' (GCC and Clang), so that
// a tile of the product stays in registers; -ffast-math isn't needed, and would change the
// process's rounding of small numbers.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Size = int64_t;

#ifdef __AVX512F__
constexpr Size kLanes = 16;
#else
constexpr Size kLanes = 8;
#endif
constexpr Size kVectors = kLanes / 4;  // of a tile of 4 rows: half of the registers
constexpr float kHidden = -1e30f;      // as in attention.py

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Half __attribute__((vector_size(kLanes * sizeof(float) / 2)));
typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));

template <typename T>
T Load(const float* from) { return *from; }
template <>
Vector Load<Vector>(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
void Store(float* to, float x) { *to = x; }
void Store(float* to, Vector x) { *reinterpret_cast<Unaligned*>(to) = x; }

Size Padded(Size size) { return (size + kLanes - 1) / kLanes * kLanes; }

// Caches are of float or, as the model computes, of bfloat16: the upper half of a float's bits.
using Bfloat16 = uint16_t;
typedef Bfloat16 Narrow
    __attribute__((vector_size(kLanes * sizeof(Bfloat16)), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

template <typename T>
T Load(const Bfloat16* from) {
  const uint32_t bits = uint32_t{*from} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
template <>
Vector Load<Vector>(const Bfloat16* from) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Narrow*>(from), Words) << 16);
}
void Put(float* to, float x) { *to = x; }
void Put(Bfloat16* to, float x) {  // which is one already
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  *to = bits >> 16;
}

template <typename E>
struct MatrixOf {
  E* data;
  Size stride;  // between rows
  E* row(Size i) const { return data + i * stride; }
};
using Matrix = MatrixOf<float>;

// R rows and V vectors of columns of y = x m, or of y += x m.
template <typename T, int R, int V, typename E>
void Tile(Matrix x, MatrixOf<E> m, Matrix y, Size inner, bool add) {
  constexpr Size lanes = sizeof(T) / sizeof(float);
  T sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = add ? Load<T>(y.row(r) + v * lanes) : T{};
  for (Size i = 0; i < inner; ++i)
    for (int v = 0; v < V; ++v) {
      const T column = Load<T>(m.row(i) + v * lanes);
      for (int r = 0; r < R; ++r) sum[r][v] += x.row(r)[i] * column;
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) Store(y.row(r) + v * lanes, sum[r][v]);
}

template <int R, typename E>
void Rows(Matrix x, MatrixOf<E> m, Matrix y, Size inner, Size columns, bool add) {
  Size j = 0;
  auto at = [&j](auto a) { return decltype(a){a.data + j, a.stride}; };
  for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes)
    Tile<Vector, R, kVectors>(x, at(m), at(y), inner, add);
  for (; j + kLanes <= columns; j += kLanes) Tile<Vector, R, 1>(x, at(m), at(y), inner, add);
  for (; j < columns; ++j) Tile<float, R, 1>(x, at(m), at(y), inner, add);
}

template <typename E>
void Multiply(Matrix x, MatrixOf<E> m, Matrix y, Size rows, Size inner, Size columns, bool add) {
  for (; rows >= 4; rows -= 4, x.data = x.row(4), y.data = y.row(4))
    Rows<4>(x, m, y, inner, columns, add);
  if (rows == 3) Rows<3>(x, m, y, inner, columns, add);
  if (rows == 2) Rows<2>(x, m, y, inner, columns, add);
  if (rows == 1) Rows<1>(x, m, y, inner, columns, add);
}

float Sum(Vector x) {
  Half a, b;
  std::memcpy(&a, &x, sizeof(a));
  std::memcpy(&b, reinterpret_cast<const char*>(&x) + sizeof(a), sizeof(b));
  a += b;
  float sum = 0;
  for (Size i = 0; i < kLanes / 2; ++i) sum += a[i];
  return sum;
}

// R rows of y = x m', of which each number is a product of rows.
template <int R, typename E>
void RowDots(Matrix x, MatrixOf<E> m, Matrix y, Size rows, Size inner) {
  for (Size j = 0; j < rows; ++j) {
    const E* const row = m.row(j);
    Vector sum[R]{};
    Size i = 0;
    for (; i + kLanes <= inner; i += kLanes) {
      const Vector column = Load<Vector>(row + i);
      for (int r = 0; r < R; ++r) sum[r] += Load<Vector>(x.row(r) + i) * column;
    }
    for (int r = 0; r < R; ++r) {
      float total = Sum(sum[r]);
      for (Size rest = i; rest < inner; ++rest) total += x.row(r)[rest] * Load<float>(row + rest);
      y.row(r)[j] = total;
    }
  }
}

template <typename E>
void Dots(Matrix x, MatrixOf<E> m, Matrix y, Size rows, Size columns, Size inner) {
  for (; rows >= 4; rows -= 4, x.data = x.row(4), y.data = y.row(4))
    RowDots<4>(x, m, y, columns, inner);
  if (rows == 3) RowDots<3>(x, m, y, columns, inner);
  if (rows == 2) RowDots<2>(x, m, y, columns, inner);
  if (rows == 1) RowDots<1>(x, m, y, columns, inner);
}

// e to the x, for x <= 0, within two units in the last place: Cephes' polynomial.
Vector Exp(Vector x) {
  x = x > -87.0f ? x : Vector{} - 87.0f;
  const float shift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const Vector shifted = x * 1.44269504f + shift;
  const Vector n = shifted - shift;
  const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Vector)(((Integers)shifted << 23) + 0x3f800000);
}

float Top(const float* row, Size size, float least) {
  Vector top = Vector{} + least;
  for (Size s = 0; s < size; s += kLanes) {
    const Vector x = Load<Vector>(row + s);
    top = x > top ? x : top;
  }
  for (Size i = 0; i < kLanes; ++i) least = std::max(least, top[i]);
  return least;
}

// Logits to weights, in place; their sum.
float Weigh(float* row, Size size, float top) {
  Vector sum{};
  for (Size s = 0; s < size; s += kLanes) {
    const Vector weight = Exp(Load<Vector>(row + s) - top);
    Store(row + s, weight);
    sum += weight;
  }
  float total = 0;
  for (Size i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

void Hide(float* row, Size from, Size to) {
  if (from < to) std::fill(row + from, row + to, kHidden);
}

template <typename E>
struct Step {
  Size B, T, K, G, H, S, W;
  float *q_BTKGH, *k_BTKH, *v_BTKH;
  E *prompt_k_BKSH, *prompt_v_BKSH, *own_k_BTKSH, *own_v_BTKSH;
  float* out_BTKGH;
  const int32_t *length_B, *age_BT, *window;

  // All slots of prompt b, for key/value head k.
  void Attend(Size b, Size k) const {
    const Size length = std::clamp<Size>(length_B[b], 0, S), prompt = Padded(length), rows = T * G;
    std::vector<float> scratch(rows * H * 2 + (H + rows) * prompt + G * Padded(W) + rows);
    const Matrix q{scratch.data(), H}, y{q.row(rows), H};
    const Matrix k_HS{y.row(rows), prompt}, logits{k_HS.row(H), prompt};
    const Matrix own{logits.row(rows), Padded(W)};
    float* const total = own.row(G);
    const MatrixOf<E> prompt_k{prompt_k_BKSH + (b * K + k) * S * H, H};
    const MatrixOf<E> prompt_v{prompt_v_BKSH + (b * K + k) * S * H, H};

    for (Size t = 0; t < T; ++t)
      std::copy_n(q_BTKGH + ((b * T + t) * K + k) * G * H, G * H, q.row(t * G));
    for (Size s = 0; s < length; ++s)
      for (Size h = 0; h < H; ++h) k_HS.row(h)[s] = Load<float>(prompt_k.row(s) + h);
    Multiply(q, k_HS, logits, rows, H, prompt, false);

    for (Size t = 0; t < T; ++t) {
      const Size slot = (b * T + t) * K + k, age = age_BT[b * T + t];
      const Size reach = *window ? *window : length + age + 1;
      // A slot that is done may have the age W.
      const Size end = std::min(age + 1, W), from = std::max<Size>(age + 1 - reach, 0);
      const Size size = std::max<Size>(end - from, 0);
      if (age < W)
        for (Size h = 0; h < H; ++h) {
          Put(own_k_BTKSH + (slot * W + age) * H + h, k_BTKH[slot * H + h]);
          Put(own_v_BTKSH + (slot * W + age) * H + h, v_BTKH[slot * H + h]);
        }
      const MatrixOf<E> own_k{own_k_BTKSH + (slot * W + from) * H, H};
      const MatrixOf<E> own_v{own_v_BTKSH + (slot * W + from) * H, H};
      Dots(Matrix{q.row(t * G), H}, own_k, own, G, size, H);
      for (Size g = 0; g < G; ++g) {
        float* const shared = logits.row(t * G + g);
        Hide(shared, 0, std::min(length, length + age + 1 - reach));
        Hide(shared, length, prompt);
        Hide(own.row(g), size, Padded(size));
        const float top = Top(own.row(g), Padded(size), Top(shared, prompt, kHidden));
        total[t * G + g] = Weigh(shared, prompt, top) + Weigh(own.row(g), Padded(size), top);
      }
      Multiply(own, own_v, Matrix{y.row(t * G), H}, G, size, H, false);
    }

    Multiply(logits, prompt_v, y, rows, length, H, true);
    for (Size t = 0; t < T; ++t)
      for (Size g = 0; g < G; ++g) {
        float* const out = out_BTKGH + (((b * T + t) * K + k) * G + g) * H;
        for (Size h = 0; h < H; ++h) out[h] = y.row(t * G + g)[h] / total[t * G + g];
      }
  }
};

template <int rank>
using Floats = ffi::Buffer<ffi::F32, rank>;
using Integers0 = ffi::Buffer<ffi::S32, 0>;
using Integers1 = ffi::Buffer<ffi::S32, 1>;
using Integers2 = ffi::Buffer<ffi::S32, 2>;

template <ffi::DataType type>
ffi::Error Run(ffi::ThreadPool pool, Floats<5> q, Floats<4> k, Floats<4> v,
               ffi::Buffer<type, 4> prompt_k, ffi::Buffer<type, 4> prompt_v,
               ffi::Buffer<type, 5> own_k, ffi::Buffer<type, 5> own_v, Integers1 length,
               Integers2 age, Integers0 window, ffi::Result<Floats<5>> out,
               ffi::Result<ffi::Buffer<type, 5>> new_k, ffi::Result<ffi::Buffer<type, 5>> new_v) {
  if (new_k->typed_data() != own_k.typed_data() || new_v->typed_data() != own_v.typed_data())
    return ffi::Error::Internal("the caches must be updated in place");
  const auto d = q.dimensions();
  const Step<ffi::NativeType<type>> step{
                  d[0], d[1], d[2], d[3], d[4], prompt_k.dimensions()[2], own_v.dimensions()[3],
                  q.typed_data(), k.typed_data(), v.typed_data(), prompt_k.typed_data(),
                  prompt_v.typed_data(), own_k.typed_data(), own_v.typed_data(), out->typed_data(),
                  length.typed_data(), age.typed_data(), window.typed_data()};
  // Whoever is free takes the next part. The caller works too and waits for parts begun only, not
  // for helpers to come: it may itself occupy the thread they would need.
  struct Progress {
    std::atomic<Size> taken{0}, done{0};
  };
  const auto progress = std::make_shared<Progress>();
  const Size parts = step.B * step.K;
  const auto work = [step, progress, parts] {
    for (Size part; (part = progress->taken++) < parts; ++progress->done)
      step.Attend(part / step.K, part % step.K);
  };
  for (Size helper = 1; helper < std::min<Size>(pool.num_threads(), parts); ++helper)
    pool.Schedule([work] { work(); });
  work();
  while (progress->done < parts) std::this_thread::yield();
  return ffi::Error::Success();
}

template <ffi::DataType type>
auto Binding() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .template Arg<Floats<5>>()              // q_BTKGH, scaled
      .template Arg<Floats<4>>()              // k_BTKH
      .template Arg<Floats<4>>()              // v_BTKH
      .template Arg<ffi::Buffer<type, 4>>()   // prompt_k_BKSH
      .template Arg<ffi::Buffer<type, 4>>()   // prompt_v_BKSH
      .template Arg<ffi::Buffer<type, 5>>()   // own_k_BTKSH
      .template Arg<ffi::Buffer<type, 5>>()   // own_v_BTKSH
      .template Arg<Integers1>()              // prompt_length_B
      .template Arg<Integers2>()              // age_BT
      .template Arg<Integers0>()              // window, 0 for none
      .template Ret<Floats<5>>()              // out_BTKGH
      .template Ret<ffi::Buffer<type, 5>>()   // own_k_BTKSH
      .template Ret<ffi::Buffer<type, 5>>();  // own_v_BTKSH
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(float32, Run<ffi::F32>, Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(bfloat16, Run<ffi::BF16>, Binding<ffi::BF16>());
