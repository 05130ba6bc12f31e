// What XLA:CPU makes slow programs of. Attention that computes what is visible only, where XLA
// multiplies with everything and masks; draws, for which XLA runs over all logits five times; and
// products of bfloat16 by tiles (AMX), whose results XLA writes as floats before it rounds them, or
// computes a loss or an activation of them.
//
// `Decode` is one step of the sampler: each slot's key and value are put into its own branch's page,
// in place, and its query looks over its prompt, read once for all of its slots, and its branch.
// `Whole` is rows of trees of sequences that see themselves, forwards and backwards. `Draw`
// draws a token of each slot's logits. Where there are tiles, `Product` is one of two matrices, or of
// one with two and what a gate lets through of these, and `CrossEntropy` the loss of a product.
//
// Attention in bfloat16 multiplies pairs of numbers where the processor can, which rounds weights,
// and scaled queries of the sampler, to bfloat16; its instruction takes subnormal numbers for 0. Where
// it has tiles (AMX), they multiply, but for what each slot of the sampler has of its own: that is
// too few rows, and waits for memory.
//
// The letters are those of gsm_verifier/sharding.py. Vectors are the compilers' (GCC and Clang), so
// that a tile of the product stays in registers; -ffast-math isn't needed, and would change the
// process's rounding of small numbers.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES
#endif

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
typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));
#if defined(__AVX512F__)
constexpr Integers kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
constexpr Integers kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7};
#endif
typedef int32_t UnalignedIntegers
    __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4), may_alias));

template <typename T>
T Load(const float* from) { return *from; }
template <>
Vector Load<Vector>(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
void Store(float* to, float x) { *to = x; }
void Store(float* to, Vector x) { *reinterpret_cast<Unaligned*>(to) = x; }

Size Padded(Size size) { return (size + kLanes - 1) / kLanes * kLanes; }

// Queries, keys and values are of float or of bfloat16: the upper half of a float's bits.
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
#ifdef __AVX512F__  // of which GCC makes two halves
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Narrow*>(from), Words) << 16);
#endif
}
void Put(float* to, float x) { *to = x; }
void Put(Bfloat16* to, float x) {  // rounded to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  *to = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;  // or a NaN might become 0
}

// Two numbers that follow each other along the inner dimension of a product. Processors that have
// instructions for bfloat16 multiply and add up both at once, in the time of one float.
struct Pair {
  Bfloat16 first, second;
};
static_assert(sizeof(Pair) == 2 * sizeof(Bfloat16));
struct Bits {  // of as many pairs as a vector has lanes
  Vector of;
};
#ifdef __AVX512BF16__
template <typename E>
using Factor = std::conditional_t<std::is_same_v<E, Bfloat16>, Pair, float>;
void MultiplyAdd(Vector& sum, Pair x, Bits column) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)column.of);
}
void MultiplyAdd(Vector& sum, Bits x, Bits column) {
  sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x.of, (__m512bh)column.of);
}
#else
template <typename E>
using Factor = float;
#endif
void MultiplyAdd(float& sum, Pair x, Pair column) {
  sum += Load<float>(&x.first) * Load<float>(&column.first);
  sum += Load<float>(&x.second) * Load<float>(&column.second);
}
template <typename T, typename X>
void MultiplyAdd(T& sum, X x, T column) { sum += x * column; }

template <typename T, typename E>
T Column(const E* from) { return Load<T>(from); }
template <typename T>
auto Column(const Pair* from) {
  if constexpr (std::is_same_v<T, float>)
    return *from;
  else
    return Bits{Load<Vector>(reinterpret_cast<const float*>(from))};
}

// The numbers at one place of two rows: pairs across them.
struct Two {
  const Bfloat16 *row, *next;
  Two operator+(Size columns) const { return {row + columns, next + columns}; }
};
#ifdef __AVX512BF16__
// Numbers 0 16 1 17 ... of 32.
__m512i Interleaved(__m512i x) {
  const __m512i order = _mm512_add_epi32((__m512i)kLaneNumbers,
                                         _mm512_slli_epi32((__m512i)(kLaneNumbers + 16), 16));
  return _mm512_permutexvar_epi16(order, x);
}

template <typename T>
auto Column(Two from) {
  if constexpr (std::is_same_v<T, float>) {
    return Pair{*from.row, *from.next};
  } else {
    const auto load = [](const Bfloat16* at) { return _mm256_loadu_si256((const __m256i*)at); };
    return Bits{(Vector)Interleaved(
        _mm512_inserti64x4(_mm512_castsi256_si512(load(from.row)), load(from.next), 1))};
  }
}
#endif

Bfloat16 Narrowed(Bfloat16 x) { return x; }
Bfloat16 Narrowed(float x) {
  Bfloat16 narrow;
  Put(&narrow, x);
  return narrow;
}

// Numbers as factors of products, X: how many of the inner dimension one holds, and how they are
// made of floats or of bfloat16.
template <typename X>
struct Factors {
  static constexpr Size kPer = std::is_same_v<X, Pair> ? 2 : 1;

  static Size Count(Size size) { return (size + kPer - 1) / kPer; }

  // Where the inner dimension goes along a vector.
  static void Along(Vector x, X* to) {
#ifdef __AVX512BF16__
    if constexpr (kPer == 2) {
      const __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
      return std::memcpy(to, &narrow, sizeof(narrow)), void();
    }
#endif
    if constexpr (kPer == 1) Store(to, x);
  }

  // And where it goes across as many vectors as a factor holds numbers.
  static void Across(const Vector* x, X* to) {
#ifdef __AVX512BF16__
    if constexpr (kPer == 2) {
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
      return Store(reinterpret_cast<float*>(to), (Vector)Interleaved((__m512i)both));
    }
#endif
    if constexpr (kPer == 1) Store(to, *x);
  }

  // Where the inner dimension goes along the numbers.
  template <typename From>
  static void Along(const From* from, Size size, X* to) {
    if constexpr (kPer == 1) {
      for (Size i = 0; i < size; ++i) to[i] = Load<float>(from + i);
    } else {
      Bfloat16* const numbers = reinterpret_cast<Bfloat16*>(to);
      for (Size i = 0; i < size; ++i) numbers[i] = Narrowed(from[i]);
      if (size % 2) numbers[size] = 0;
    }
  }

  // Where it goes across rows of them; after the last there is none.
  template <typename From>
  static void Across(const From* from, const From* next, Size size, X* to) {
    if constexpr (kPer == 1) {
      Along(from, size, to);
    } else if (next) {
      for (Size i = 0; i < size; ++i) to[i] = {Narrowed(from[i]), Narrowed(next[i])};
    } else {
      for (Size i = 0; i < size; ++i) to[i] = {Narrowed(from[i]), 0};
    }
  }
};

template <typename E>
struct MatrixOf {
  E* data;
  Size stride;  // between rows
  E* row(Size i) const { return data + i * stride; }
  E& at(Size i, Size j) const { return row(i)[j]; }
  void skip(Size rows) { data = row(rows); }
  MatrixOf from(Size column) const { return {data + column, stride}; }
};
using Matrix = MatrixOf<float>;

// A matrix that with each row asks for as many bytes of what is needed next: that may lie anywhere,
// and the processor would wait for it. What lies after it is nobody's harm.
template <typename M>
struct Ahead {
  M m;
  const char* next;
  Size bytes;
  auto row(Size i) const {
    for (Size at = 0; at < bytes; at += 64)
      __builtin_prefetch(next + i * bytes + at, 0, 2);  // into the second cache
    return m.row(i);
  }
  Ahead from(Size column) const { return {m.from(column), next, bytes}; }
};

// Rows as they lie in memory, so many, whose factors are across two of them each.
struct Twos {
  const Bfloat16* data;
  Size stride, count;
  Two row(Size i) const {
    const Bfloat16* const first = data + 2 * i * stride;
    return {first, 2 * i + 1 < count ? first + stride : first};  // of nothing else: that may be NaN
  }
  Twos from(Size column) const { return {data + column, stride, count}; }
};

// Matrices of zeros that live as long as it does.
template <typename E>
struct Room {
  std::vector<std::unique_ptr<E[]>> all;
  MatrixOf<E> operator()(Size rows, Size stride) {
    E* const data = all.emplace_back(new E[rows * stride]).get();
    std::memset(data, 0, rows * stride * sizeof(E));  // a vector of pairs would set one by one
    return {data, stride};
  }
};

// Of rows(i), so many of so many numbers, the factors across them, [count / kPer, size].
template <typename X, typename Rows>
MatrixOf<X> Across(Rows rows, Size count, Size size, MatrixOf<X> to) {
  constexpr Size per = Factors<X>::kPer;
  for (Size i = 0; i < count; i += per) {
    for (Size k = 0; k < per; ++k) __builtin_prefetch(rows(i + k + 16));  // they may lie apart
    Factors<X>::Across(rows(i), i + 1 < count ? rows(i + 1) : nullptr, size, to.row(i / per));
  }
  return to;
}

// And along them, [count, size / kPer].
template <typename X, typename Rows>
MatrixOf<X> Along(Rows rows, Size count, Size size, MatrixOf<X> to) {
  for (Size i = 0; i < count; ++i) Factors<X>::Along(rows(i), size, to.row(i));
  return to;
}

// Lanes i and i ^ bit exchanged.
Vector Exchange(Vector x, int bit) {
#ifdef __clang__
  Vector y;
  for (int i = 0; i < kLanes; ++i) y[i] = x[i ^ bit];
  return y;
#else
  return __builtin_shuffle(x, kLaneNumbers ^ bit);
#endif
}

// Rows of as many numbers as a vector has lanes become columns: two rows change the lanes that have
// a bit of the one for those that don't have it of the other, bit by bit.
void Transpose(Vector* x) {
#pragma GCC unroll 16
  for (int bit = 1; bit < kLanes; bit *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & bit) continue;
      const Vector a = x[i], b = x[i | bit];
      const Integers has = (kLaneNumbers & bit) != 0;
      x[i] = has ? Exchange(b, bit) : a;
      x[i | bit] = has ? b : Exchange(a, bit);
    }
}

// So many rows, at most kLanes, as columns.
template <typename X>
void Turn(MatrixOf<X> from, Size rows, Size size, MatrixOf<X> to) {
  static_assert(sizeof(X) == sizeof(float));
  const auto numbers = [](X* at) { return reinterpret_cast<float*>(at); };
  Size j = 0;
  for (; rows == kLanes && j + kLanes <= size; j += kLanes) {
    Vector x[kLanes];
    for (Size i = 0; i < kLanes; ++i) x[i] = Load<Vector>(numbers(from.row(i) + j));
    Transpose(x);
    for (Size i = 0; i < kLanes; ++i) Store(numbers(to.row(j + i)), x[i]);
  }
  for (; j < size; ++j)
    for (Size i = 0; i < rows; ++i) to.at(j, i) = from.at(i, j);
}

// Of rows(i) the factors along them, transposed, [size / kPer, count].
template <typename X, typename Rows>
MatrixOf<X> Turned(Rows rows, Size count, Size size, MatrixOf<X> to) {
  const Size factors = Factors<X>::Count(size);
  std::vector<X> some(kLanes * factors);
  for (Size from = 0; from < count; from += kLanes) {
    const Size few = std::min(kLanes, count - from);
    for (Size i = 0; i < few; ++i) Factors<X>::Along(rows(from + i), size, &some[i * factors]);
    Turn<X>({some.data(), factors}, few, factors, to.from(from));
  }
  return to;
}

// And the factors across them, transposed, [size, count / kPer].
template <typename X, typename Rows>
MatrixOf<X> AcrossTurned(Rows rows, Size count, Size size, MatrixOf<X> to) {
  constexpr Size per = Factors<X>::kPer;
  std::vector<X> some(kLanes * size);
  for (Size from = 0; from < count; from += kLanes * per) {
    const Size left = std::min(kLanes * per, count - from);
    const MatrixOf<X> across{some.data(), size};
    Across<X>([&](Size i) { return rows(from + i); }, left, size, across);
    Turn<X>(across, Factors<X>::Count(left), size, to.from(from / per));
  }
  return to;
}

// Of a tile, [rows, columns], the factors along its rows; of floats it is they.
template <typename X>
MatrixOf<X> TileAlong(Matrix tile, Size rows, Size columns, X* to) {
  if constexpr (std::is_same_v<X, float>) return tile;
  const Size stride = Factors<X>::Count(columns);
  return Along<X>([=](Size i) { return tile.row(i); }, rows, columns, {to, stride});
}

// R rows and V vectors of columns of y = x m, or of y += x m.
template <typename T, int R, int V, typename X, typename M>
void Tile(X x, M m, Matrix y, Size inner, bool add) {
  constexpr Size lanes = sizeof(T) / sizeof(float);
  T sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = add ? Load<T>(y.row(r) + v * lanes) : T{};
  for (Size i = 0; i < inner; ++i) {
    const auto row = m.row(i);
    for (int v = 0; v < V; ++v) {
      const auto column = Column<T>(row + v * lanes);
      for (int r = 0; r < R; ++r) MultiplyAdd(sum[r][v], x.at(r, i), column);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) Store(y.row(r) + v * lanes, sum[r][v]);
}

// All rows of so many columns, which stay in the processor's nearest cache meanwhile.
template <typename T, int V, typename X, typename M>
void Columns(X x, M m, Matrix y, Size rows, Size inner, bool add) {
  for (; rows >= 4; rows -= 4, x.skip(4), y.skip(4)) Tile<T, 4, V>(x, m, y, inner, add);
  if (rows == 3) Tile<T, 3, V>(x, m, y, inner, add);
  if (rows == 2) Tile<T, 2, V>(x, m, y, inner, add);
  if (rows == 1) Tile<T, 1, V>(x, m, y, inner, add);
}

#ifdef TILES
constexpr Size kTile = 16;  // rows of at most 16 floats or pairs

// May the process use the processor's tiles (AMX)? Linux wants to be asked.
bool HasTiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool has = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return has;
}

// Tiles 0 to 3 are y's, two by two, 4 and 5 x's, 6 and 7 m's.
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  Shapes(Size y_rows, Size inner, Size columns) {
    for (int tile = 0; tile < 8; ++tile) {
      bytes[tile] = 4 * (tile == 4 || tile == 5 ? inner : columns);
      rows[tile] = tile < 6 ? y_rows : inner;
    }
  }
};

// Rows whose factors are read as tiles: from one row of a tile to the next, from a tile to the next
// along the rows, and to those of the next 16 rows.
struct Tiled {
  const Pair* data;
  Size stride, along, below;
};
Tiled Lying(MatrixOf<Pair> x) { return {x.data, x.stride, kTile, kTile * x.stride}; }

// R and V tiles of y = x m, or of y += x m. While tiles multiply, `meanwhile` is called once for each
// of the inner dimension's, to do what waits for none of them.
//
// x passes once, where m's factors are read again for the next rows: it is asked for as a stream, so
// that it doesn't drive these out of the nearest cache.
template <int R, int V, typename Meanwhile>
void Block(Tiled x, MatrixOf<Pair> m, Matrix y, Size inner, bool add, Meanwhile meanwhile) {
  const Size x_bytes = x.stride * sizeof(Pair), m_bytes = m.stride * sizeof(Pair);
  const Size y_bytes = y.stride * sizeof(float);
  const auto at = [&](Size r, Size v) { return y.row(r * kTile) + v * kTile; };
  if (add) {
    _tile_loadd(0, at(0, 0), y_bytes);
    if constexpr (V == 2) _tile_loadd(1, at(0, 1), y_bytes);
    if constexpr (R == 2) _tile_loadd(2, at(1, 0), y_bytes);
    if constexpr (R == 2 && V == 2) _tile_loadd(3, at(1, 1), y_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (Size i = 0; i < inner; i += kTile, x.data += x.along) {
    _tile_stream_loadd(4, x.data, x_bytes);
    _tile_loadd(6, m.row(i), m_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (V == 2) {
      _tile_loadd(7, m.row(i) + kTile, m_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    meanwhile();
    if constexpr (R == 2) {
      _tile_stream_loadd(5, x.data + x.below, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (R == 2 && V == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, at(0, 0), y_bytes);
  if constexpr (V == 2) _tile_stored(1, at(0, 1), y_bytes);
  if constexpr (R == 2) _tile_stored(2, at(1, 0), y_bytes);
  if constexpr (R == 2 && V == 2) _tile_stored(3, at(1, 1), y_bytes);
}

// work() with tiles of such sizes.
template <typename Work>
void InTiles(Size rows, Size inner, Size columns, Work work) {
  const Shapes shapes(rows, inner, columns);
  asm volatile("" ::"r"(&shapes) : "memory");  // GCC doesn't know what is read by what follows
  _tile_loadconfig(&shapes);
  work();
  _tile_release();
  asm volatile("" ::: "memory");  // nor that it writes
}

// What is whole tiles of so many, and what is left: where they begin, and sizes.
std::array<std::pair<Size, Size>, 2> Parts(Size size) {
  const Size whole = size / kTile * kTile;
  return {{{0, whole}, {whole, size - whole}}};
}

// Each size is one of whole tiles, or less than one.
void Blocks(MatrixOf<Pair> x, MatrixOf<Pair> m, Matrix y, Size rows, Size inner, Size columns,
            bool add) {
  InTiles(std::min(rows, kTile), std::min(inner, kTile), std::min(columns, kTile), [=] {
    for (Size j = 0; j < columns; j += 2 * kTile) {
      const bool two = j + kTile < columns;
      for (Size r = 0; r < rows; r += 2 * kTile) {
        const Tiled some = Lying({x.row(r), x.stride});
        const Matrix to{y.row(r) + j, y.stride};
        const auto block = [=](auto rows, auto columns) {
          Block<rows(), columns()>(some, m.from(j), to, inner, add, [] {});
        };
        constexpr std::integral_constant<int, 1> one;
        constexpr std::integral_constant<int, 2> both;
        if (r + kTile < rows)
          two ? block(both, both) : block(both, one);
        else
          two ? block(one, both) : block(one, one);
      }
    }
  });
}

// So that which rows stand beside a row can't change its numbers, tiles multiply all of them.
void MultiplyInTiles(MatrixOf<Pair> x, MatrixOf<Pair> m, Matrix y, Size rows, Size inner,
                     Size columns, bool add) {
  for (const auto& [i, inners] : Parts(inner))
    for (const auto& [r, some] : Parts(rows))
      for (const auto& [j, few] : Parts(columns))
        if (inners && some && few)
          Blocks({x.row(r) + i, x.stride}, {m.row(i) + j, m.stride}, {y.row(r) + j, y.stride}, some,
                 inners, few, add || i > 0);
}
#endif

template <typename X, typename M>
void Multiply(X x, M m, Matrix y, Size rows, Size inner, Size columns, bool add) {
#ifdef TILES
  if constexpr (std::is_same_v<X, MatrixOf<Pair>> && std::is_same_v<M, X>)
    if (HasTiles()) return MultiplyInTiles(x, m, y, rows, inner, columns, add);
#endif
  Size j = 0;
  const auto columns_of = [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    for (; j + V * kLanes <= columns; j += V * kLanes)
      Columns<Vector, V>(x, m.from(j), y.from(j), rows, inner, add);
  };
  columns_of(std::integral_constant<int, kVectors>{});
  columns_of(std::integral_constant<int, kVectors * 3 / 4>{});
  columns_of(std::integral_constant<int, kVectors / 2>{});
  columns_of(std::integral_constant<int, 1>{});
  for (; j < columns; ++j) Columns<float, 1>(x, m.from(j), y.from(j), rows, inner, add);
}

float Sum(Vector x) {
  for (int bit = kLanes / 2; bit; bit /= 2) x += Exchange(x, bit);
  return x[0];
}

// The sums of as many vectors as a vector has lanes, which they leave their place for: two become
// one whose lanes with the bit are the second's, until there is one.
Vector Sums(Vector* x) {
#pragma GCC unroll 16
  for (int bit = 1, count = kLanes / 2; count; bit *= 2, count /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) {
      const Vector a = x[2 * i], b = x[2 * i + 1];
      x[i] = ((kLaneNumbers & bit) != 0 ? b : a) + Exchange((kLaneNumbers & bit) != 0 ? a : b, bit);
    }
  return x[0];
}

// R rows of y = x m', of which each number is a product of rows. Whole vectors are written: up to
// kLanes - 1 numbers past the last.
template <int R, typename X, typename M>
void RowDots(MatrixOf<X> x, M m, Matrix y, Size rows, Size inner) {
  const Size whole = inner / kLanes * kLanes;
  for (Size j = 0; j < rows; j += kLanes) {
    const Size count = std::min(kLanes, rows - j);
    Vector sums[R][kLanes];
    for (Size i = 0; i < kLanes; ++i) {
      Vector sum[R]{};
      if (i < count) {
        const auto row = m.row(j + i);
        for (Size h = 0; h < whole; h += kLanes) {
          const auto column = Column<Vector>(row + h);
          for (int r = 0; r < R; ++r) MultiplyAdd(sum[r], Column<Vector>(x.row(r) + h), column);
        }
      }
      for (int r = 0; r < R; ++r) sums[r][i] = sum[r];
    }
    for (int r = 0; r < R; ++r) {
      Store(y.row(r) + j, Sums(sums[r]));
      for (Size i = 0; i < count; ++i)
        for (Size h = whole; h < inner; ++h)
          MultiplyAdd(y.at(r, j + i), x.at(r, h), Column<float>(m.row(j + i) + h));
    }
  }
}

template <typename X, typename M>
void Dots(MatrixOf<X> x, M m, Matrix y, Size rows, Size columns, Size inner) {
  for (; rows >= 4; rows -= 4, x.skip(4), y.skip(4)) RowDots<4>(x, m, y, columns, inner);
  if (rows == 3) RowDots<3>(x, m, y, columns, inner);
  if (rows == 2) RowDots<2>(x, m, y, columns, inner);
  if (rows == 1) RowDots<1>(x, m, y, columns, inner);
}

template <typename E>
float Dot(const E* a, const E* b, Size size) {
  Vector sum{};
  Size i = 0;
  for (; i + kLanes <= size; i += kLanes) sum += Load<Vector>(a + i) * Load<Vector>(b + i);
  float total = Sum(sum);
  for (; i < size; ++i) total += Load<float>(a + i) * Load<float>(b + i);
  return total;
}

// e to the x, for x <= 0, within two units in the last place: Cephes' polynomial. Below -87, where
// there are no more floats of full precision, it is what it is there; NaN stays NaN.
Vector Exp(Vector x) {
  x = x < -87.0f ? Vector{} - 87.0f : x;
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

// The same, but what a weight of full precision can't be is none: it must never be drawn.
Vector Weight(Vector x) { return x < -87.0f ? Vector{} : Exp(x); }

float Top(Vector x) {
  float top = x[0];
  for (Size i = 1; i < kLanes; ++i) top = std::max(top, x[i]);
  return top;
}

float Top(const float* row, Size size, float least) {
  Vector top = Vector{} + least;
  for (Size s = 0; s < size; s += kLanes) {
    const Vector x = Load<Vector>(row + s);
    top = x > top ? x : top;
  }
  return Top(top);
}

// Logits to weights, as factors, maybe in place; their sum.
template <typename X>
float Weigh(const float* row, Size size, float top, X* to) {
  Vector sum{};
  for (Size s = 0; s < size; s += kLanes) {
    const Vector weight = Exp(Load<Vector>(row + s) - top);
    Factors<X>::Along(weight, to + s / Factors<X>::kPer);
    sum += weight;
  }
  return Sum(sum);
}

void Hide(float* row, Size from, Size to) {
  if (from < to) std::fill(row + from, row + to, kHidden);
}

constexpr Size kSlots = 64;  // of a prompt, worked on together

// Where factors are pairs, scaled queries and weights are rounded to bfloat16.
template <typename E, typename X>
struct Decode {
  static constexpr bool kPairs = std::is_same_v<X, Pair>;

  Size U, T, K, G, H, P, S, Z, W, J;
  float scale;
  const E *q_UTKGH, *k_UTKH, *v_UTKH, *prompt_k_UPKSH, *prompt_v_UPKSH;
  E *own_k_UZKWH, *own_v_UZKWH, *out_UTKGH;
  const int32_t *length_UP, *prompt_UT, *age_UT, *table_UTJ, *window;

  // Slot t of a pool has all pages it needs up to its age; one that is done may have the age J * W.
  bool Runs(Size u, Size t) const {
    const Size slot = u * T + t, last = age_UT[slot] / W, prompt = prompt_UT[slot];
    const int32_t* const table = table_UTJ + slot * J;
    return prompt >= 0 && prompt < P && last < J &&
           std::all_of(table, table + last + 1, [this](Size page) { return page >= 0 && page < Z; });
  }

  // Where in the pages that is which slot t of a pool has at a position, of head k.
  Size Place(Size u, Size t, Size k, Size at) const {
    const Size page = table_UTJ[(u * T + t) * J + at / W];
    return (((u * Z + page) * K + k) * W + at % W) * H;
  }

  // work(where its keys or values lie, how many, which of the slot's they are) of each page from a
  // position to another.
  template <typename Work>
  void Pages(Size u, Size t, Size k, Size from, Size to, Work work) const {
    for (Size at = from, end; at < to; at = end) {
      end = std::min((at / W + 1) * W, to);
      work(Place(u, t, k, at), end - at, at - from);
    }
  }

  // The first of its own positions that slot t of a pool sees.
  Size First(Size u, Size t) const {
    return *window ? std::max<Size>(age_UT[u * T + t] + 1 - *window, 0) : 0;
  }

  // The most slots that have one prompt.
  Size Crowd() const {
    std::vector<Size> slots(U * P);
    for (Size i = 0; i < U * T; ++i)
      if (prompt_UT[i] >= 0 && prompt_UT[i] < P) ++slots[i / T * P + prompt_UT[i]];
    return *std::max_element(slots.begin(), slots.end());
  }

  // Factors of keys or values of a page, which aren't moved: along each, or across them.
  auto Keys(Size place) const {
    if constexpr (kPairs)
      return MatrixOf<const Pair>{reinterpret_cast<const Pair*>(own_k_UZKWH + place), H / 2};
    else
      return MatrixOf<const E>{own_k_UZKWH + place, H};
  }
  auto Values(Size place, Size count) const {
    if constexpr (kPairs)
      return Twos{own_v_UZKWH + place, H, count};
    else
      return MatrixOf<const E>{own_v_UZKWH + place, H};
  }

  // Slots that are left out get 0.
  void Blank(Size u, Size k) const {
    for (Size t = 0; t < T; ++t)
      if (!Runs(u, t)) std::fill_n(out_UTKGH + ((u * T + t) * K + k) * G * H, G * H, E{});
  }

  // Of one of the prompts a part of its slots, kSlots of them, for key/value head k.
  void operator()(Size b, Size k, Size part) const {
    const Size u = b / P, p = b % P;
    if (p == 0 && part == 0) Blank(u, k);
    std::vector<Size> slots;
    for (Size t = 0, seen = 0; t < T; ++t)
      if (prompt_UT[u * T + t] == p && Runs(u, t) && seen++ / kSlots == part) slots.push_back(t);
    const Size count = slots.size(), rows = count * G;
    if (!count) return;
    const Size length = std::clamp<Size>(length_UP[b], 0, S), prompt = Padded(length);
    const auto in_prompt = [&](const E* from) {
      return [=, at = from + (b * K + k) * S * H](Size s) { return at + s * H; };
    };
    const auto count_of = Factors<X>::Count;
    Room<float> floats;
    Room<X> factors;
    const Matrix y = floats(rows, H), logits = floats(rows, prompt);
    const Matrix own = floats(G, Padded(J * W) + kLanes), total = floats(rows, 1);
    const Matrix scaled = Along<float>(
        [&](Size row) { return q_UTKGH + (((u * T + slots[row / G]) * K + k) * G + row % G) * H; },
        rows, H, floats(rows, H));
    for (Size i = 0; i < rows * H; ++i) scaled.data[i] *= scale;
    const Size pairs = kPairs ? rows : 0;
    const MatrixOf<X> tile = factors(pairs, count_of(std::max(prompt, Padded(W))));
    const MatrixOf<X> q = TileAlong<X>(scaled, rows, H, factors(pairs, count_of(H)).data);
    const MatrixOf<X> k_HS =
        Turned<X>(in_prompt(prompt_k_UPKSH), length, H, factors(count_of(H), prompt));
    Multiply(q, k_HS, logits, rows, count_of(H), prompt, false);

    for (Size i = 0; i < count; ++i) {
      const Size t = slots[i], slot = (u * T + t) * K + k, age = age_UT[u * T + t];
      const Size reach = *window ? *window : length + age + 1;
      const Size from = First(u, t), size = age + 1 - from;
      const Size place = Place(u, t, k, age);
      std::copy_n(k_UTKH + slot * H, H, own_k_UZKWH + place);
      std::copy_n(v_UTKH + slot * H, H, own_v_UZKWH + place);
      // The next slot's are asked for meanwhile, as many.
      const Size next = slots[std::min(i + 1, count - 1)], next_age = age_UT[u * T + next];
      const auto ahead = [&](auto m, const E* from, Size at, Size rows) {
        const E* const theirs = from + Place(u, next, k, std::min(at, next_age));
        const Size bytes = rows * H * sizeof(E);
        return Ahead<decltype(m)>{m, reinterpret_cast<const char*>(theirs), bytes};
      };
      Pages(u, t, k, from, age + 1, [&](Size keys, Size positions, Size at) {
        Dots(MatrixOf<X>{q.row(i * G), q.stride}, ahead(Keys(keys), own_k_UZKWH, from + at, 1),
             own.from(at), G, positions, count_of(H));
      });
      for (Size g = 0; g < G; ++g) {
        float* const shared = logits.row(i * G + g);
        Hide(shared, 0, std::min(length, length + age + 1 - reach));
        Hide(shared, length, prompt);
        Hide(own.row(g), size, Padded(size));
        const float top = Top(own.row(g), Padded(size), Top(shared, prompt, kHidden));
        *total.row(i * G + g) =
            Weigh(shared, prompt, top, shared) + Weigh(own.row(g), Padded(size), top, own.row(g));
      }
      Pages(u, t, k, from, age + 1, [&](Size values, Size positions, Size at) {
        Multiply(TileAlong<X>(own.from(at), G, positions, tile.data),
                 ahead(Values(values, positions), own_v_UZKWH, from + at, Factors<X>::kPer),
                 Matrix{y.row(i * G), H}, G, count_of(positions), H, at > 0);
      });
    }

    const MatrixOf<X> v_SH =
        Across<X>(in_prompt(prompt_v_UPKSH), length, H, factors(count_of(prompt), H));
    const MatrixOf<X> weights = TileAlong<X>(logits, rows, prompt, tile.data);
    Multiply(weights, v_SH, y, rows, count_of(length), H, true);
    for (Size i = 0; i < count; ++i)
      for (Size g = 0; g < G; ++g) {
        E* const out = out_UTKGH + (((u * T + slots[i]) * K + k) * G + g) * H;
        const float sum = *total.row(i * G + g);
        for (Size h = 0; h < H; ++h) Put(out + h, y.row(i * G + g)[h] / sum);
      }
  }
};

constexpr Size kQueries = 16;  // positions whose queries are worked on together

// Rows of T positions, each of which is seen by itself and by those after it that are before its
// end, if their place in the sequence is less than a window after its own. Their queries, keys,
// values, results, and of all the gradients are [B, T, K, G or 1, H].
//
// Where factors are pairs, weights and their gradients are rounded to bfloat16 too.
template <typename E, typename X>
struct Whole {
  static constexpr Size kPer = Factors<X>::kPer;
#ifdef TILES
  // Backwards more: each time the gradients of all that they see are read and written, which is most
  // of the work of tiles.
  static constexpr Size kBack = (kPer == 2 ? 2 : 1) * kQueries;
#else
  static constexpr Size kBack = kQueries;
#endif

  Size B, T, K, G, H;
  float scale;
  const E *q_BTKGH, *k_BTKH, *v_BTKH;
  const int32_t *end_BT, *position_BT;
  const int32_t* window;  // 0: there is none
  E* out_BTKGH;
  float* log_total_BTKG;  // logarithm of the sum of the weights
  const E* d_out_BTKGH;
  E *d_q_BTKGH, *d_k_BTKH, *d_v_BTKH;

  Size Place(Size b, Size t, Size k) const { return (b * T + t) * K + k; }

  static Size Count(Size size) { return Factors<X>::Count(size); }

  // A row's positions of one head.
  auto Positions(const E* from_BTKH, Size b, Size k) const {
    return [=](Size t) { return from_BTKH + Place(b, t, k) * H; };
  }

  // And its queries, or what is like them, from position t on.
  auto Queries(const E* from_BTKGH, Size b, Size k, Size t) const {
    return [=](Size row) { return from_BTKGH + (Place(b, t + row / G, k) * G + row % G) * H; };
  }

  void Write(Matrix from_HT, E* to_BTKH, Size b, Size k) const {
    std::vector<float> some(kLanes * H);
    for (Size t = 0; t < T; t += kLanes) {
      for (Size h = 0; h < H; h += kLanes)
        Turn<float>({from_HT.row(h) + t, from_HT.stride}, std::min(kLanes, H - h), kLanes,
                    {some.data() + h, H});
      for (Size i = 0; i < std::min(kLanes, T - t); ++i)
        for (Size h = 0; h < H; ++h) Put(to_BTKH + Place(b, t + i, k) * H + h, some[i * H + h]);
    }
  }

  void WriteQueries(Matrix from, E* to_BTKGH, Size b, Size k, Size t, Size count) const {
    for (Size i = 0; i < count; ++i)
      for (Size at = 0; at < G * H; ++at)
        Put(to_BTKGH + Place(b, t + i, k) * G * H + at, from.row(i * G)[at]);
  }

  // Between rows of [H, T]. Were it a power of two, all rows would compete for the same few lines of
  // the processor's cache.
  Size Stride() const { return Padded(T) + 16; }

  struct Run {
    Size from, size;  // of positions
    Size column;      // where it begins among the columns of a tile
  };

  // Who sees a row's positions, which are filled up by some that nobody sees; and of each vector of
  // them what one of them at least has.
  struct Seen {
    std::vector<int32_t> end, position, last_end, last_position;
    int32_t reach;  // of the window; all, if there is none

    Integers operator()(Size t, Size s) const {
      const auto load = [s](const std::vector<int32_t>& from) -> Integers {
        return *reinterpret_cast<const UnalignedIntegers*>(&from[s]);
      };
      const Integers at = kLaneNumbers + int32_t(s);
      const Integers seen = (at == int32_t(t)) | ((at < int32_t(t)) & (load(end) > int32_t(t)));
      return seen & (position[t] - load(position) < reach);
    }
  };

  Seen SeenOf(Size b) const {
    const Size padded = Padded(T);
    Seen seen{{}, {}, {}, {}, *window ? *window : INT32_MAX};
    const auto fill = [&](const int32_t* row, std::vector<int32_t>& each, std::vector<int32_t>& last) {
      each.assign(row, row + T);
      each.resize(padded);
      for (Size s = 0; s < padded; s += kLanes)
        last.push_back(*std::max_element(&each[s], &each[s] + kLanes));
    };
    fill(end_BT + b * T, seen.end, seen.last_end);
    fill(position_BT + b * T, seen.position, seen.last_position);
    return seen;
  }

  // What any of the queries may see, in whole vectors; and the columns they take.
  Size Runs(const Seen& seen, Size t, Size count, std::vector<Run>& runs) const {
    const int32_t* const positions = &seen.position[t];
    const int32_t beyond = *std::min_element(positions, positions + count) - seen.reach;
    runs.clear();
    Size columns = 0;
    for (Size s = 0; s < t + count; s += kLanes) {
      const Size i = s / kLanes;
      if (s + kLanes <= t && seen.last_end[i] <= t) continue;
      if (seen.last_position[i] <= beyond) continue;
      if (runs.empty() || runs.back().from + runs.back().size != s) runs.push_back({s, 0, columns});
      runs.back().size += std::min(kLanes, T - s);
      columns += kLanes;
    }
    return columns;
  }

  // q k' of the runs, and where that isn't seen, what no weight comes of; and the highest of each
  // query by lanes.
  void Logits(const Seen& seen, Size t, Size count, const std::vector<Run>& runs, MatrixOf<X> q,
              MatrixOf<X> k_HT, Matrix logits, Vector* tops) const {
    std::fill_n(tops, count * G, Vector{} + kHidden);
    for (const auto& [from, size, column] : runs) {
      Multiply(q, MatrixOf<X>{k_HT.data + from, k_HT.stride},
               Matrix{logits.data + column, logits.stride}, count * G, Count(H), Padded(size),
               false);
      for (Size i = 0; i < count; ++i)
        for (Size s = 0; s < size; s += kLanes) {
          const Integers visible = seen(t + i, from + s);
          for (Size g = 0; g < G; ++g) {
            float* const at = logits.row(i * G + g) + column + s;
            const Vector logit = visible ? scale * Load<Vector>(at) : Vector{} + kHidden;
            Vector& top = tops[i * G + g];
            top = logit > top ? logit : top;
            Store(at, logit);
          }
        }
    }
  }

  Size Tiles() const { return (T + kQueries - 1) / kQueries; }

  // Of row b, key/value head k, every so manieth tile of queries from one on.
  void Forwards(Size b, Size k, Size first, Size every) const {
    const Size rows = kQueries * G, padded = Padded(T);
    Room<float> floats;
    Room<X> factors;
    const MatrixOf<X> v_TH =
        Across<X>(Positions(v_BTKH, b, k), T, H, factors(Count(padded), H));
    const MatrixOf<X> k_HT = Turned<X>(Positions(k_BTKH, b, k), T, H, factors(Count(H), Stride()));
    const MatrixOf<X> q = factors(rows, Count(H)), tile = factors(kPer == 1 ? 0 : rows, Count(padded));
    const Matrix y = floats(rows, H), all_logits = floats(rows, padded);
    std::vector<float> totals(rows);
    std::vector<Vector> tops(rows);
    std::vector<Run> runs;
    const Seen seen = SeenOf(b);
    for (Size t = first * kQueries; t < T; t += every * kQueries) {
      const Size count = std::min(kQueries, T - t), columns = Runs(seen, t, count, runs);
      const Matrix logits{all_logits.data, columns};
      Along<X>(Queries(q_BTKGH, b, k, t), count * G, H, q);
      MatrixOf<X> weights{tile.data, Count(columns)};
      if constexpr (kPer == 1) weights = logits;
      Logits(seen, t, count, runs, q, k_HT, logits, tops.data());
      std::fill_n(y.data, count * G * H, 0.0f);
      for (Size row = 0; row < count * G; ++row) {
        const float top = Top(tops[row]);
        totals[row] = Weigh(logits.row(row), columns, top, weights.row(row));
        log_total_BTKG[Place(b, t + row / G, k) * G + row % G] = top + std::log(totals[row]);
      }
      for (const auto& [from, size, column] : runs)
        Multiply(MatrixOf<X>{weights.data + column / kPer, weights.stride},
                 MatrixOf<X>{v_TH.row(from / kPer), H}, y, count * G, Count(size), H, true);
      for (Size row = 0; row < count * G; ++row)
        for (Size h = 0; h < H; ++h) y.at(row, h) /= totals[row];
      WriteQueries(y, out_BTKGH, b, k, t, count);
    }
  }

  // The same of all queries, back: the weights are computed anew.
  void Backwards(Size b, Size k) const {
    const Size rows = kBack * G, padded = Padded(T);
    Room<float> floats;
    Room<X> factors;
    const auto keys = Positions(k_BTKH, b, k), values = Positions(v_BTKH, b, k);
    const MatrixOf<X> k_TH = Across<X>(keys, T, H, factors(Count(padded), H));
    const MatrixOf<X> k_HT = Turned<X>(keys, T, H, factors(Count(H), Stride()));
    const MatrixOf<X> v_HT = Turned<X>(values, T, H, factors(Count(H), Stride()));
    const MatrixOf<X> q = factors(rows, Count(H)), d_out = factors(rows, Count(H));
    const MatrixOf<X> q_turned = factors(H, Count(rows)), d_out_turned = factors(H, Count(rows));
    const auto tile = [&] { return factors(kPer == 1 ? 0 : Count(rows), padded).data; };
    X *const tile_along = tile(), *const tile_across = tile(), *const tile_weights = tile();
    const Matrix d_k_HT = floats(H, Stride()), d_v_HT = floats(H, Stride()), d_q = floats(rows, H);
    const Matrix all_weights = floats(rows, padded), all_d_logits = floats(rows, padded);
    std::vector<Vector> tops(rows);
    std::vector<Run> runs;
    const Seen seen = SeenOf(b);
    for (Size t = 0; t < T; t += kBack) {
      const Size count = std::min(kBack, T - t), columns = Runs(seen, t, count, runs);
      const Size used = count * G;
      const Matrix weights{all_weights.data, columns}, d_logits{all_d_logits.data, columns};
      const auto queries = Queries(q_BTKGH, b, k, t), outs = Queries(out_BTKGH, b, k, t);
      const auto d_outs = Queries(d_out_BTKGH, b, k, t);
      Along<X>(queries, used, H, q);
      Along<X>(d_outs, used, H, d_out);
      AcrossTurned<X>(queries, used, H, q_turned);
      AcrossTurned<X>(d_outs, used, H, d_out_turned);
      Logits(seen, t, count, runs, q, k_HT, weights, tops.data());
      for (const auto& [from, size, column] : runs)
        Multiply(d_out, MatrixOf<X>{v_HT.data + from, v_HT.stride},
                 Matrix{d_logits.data + column, columns}, used, Count(H), Padded(size), false);
      MatrixOf<X> d_along{tile_along, Count(columns)}, d_across{tile_across, columns};
      MatrixOf<X> weights_across{tile_weights, columns};
      if constexpr (kPer == 1) d_along = d_across = d_logits, weights_across = weights;
      for (Size row = 0; row < used; row += kPer) {
        const Size few = std::min(kPer, used - row);
        float log_total[kPer], mean[kPer];  // of the weights' gradients, by the weights
        for (Size i = 0; i < few; ++i) {
          log_total[i] = log_total_BTKG[Place(b, t + (row + i) / G, k) * G + (row + i) % G];
          mean[i] = Dot(outs(row + i), d_outs(row + i), H);
        }
        for (Size s = 0; s < columns; s += kLanes) {
          Vector weight[kPer]{}, d_logit[kPer]{};
          for (Size i = 0; i < few; ++i) {
            weight[i] = Exp(Load<Vector>(weights.row(row + i) + s) - log_total[i]);
            const Vector d_weight = Load<Vector>(d_logits.row(row + i) + s) - mean[i];
            d_logit[i] = scale * weight[i] * d_weight;
            Factors<X>::Along(d_logit[i], d_along.row(row + i) + s / kPer);
          }
          Factors<X>::Across(d_logit, d_across.row(row / kPer) + s);
          Factors<X>::Across(weight, weights_across.row(row / kPer) + s);
        }
      }
      std::fill_n(d_q.data, used * H, 0.0f);
      for (const Run& run : runs) {
        Multiply(MatrixOf<X>{d_along.data + run.column / kPer, d_along.stride},
                 MatrixOf<X>{k_TH.row(run.from / kPer), H}, d_q, used, Count(run.size), H, true);
        Multiply(q_turned, d_across.from(run.column), d_k_HT.from(run.from), H, Count(used),
                 Padded(run.size), true);
        Multiply(d_out_turned, weights_across.from(run.column), d_v_HT.from(run.from), H,
                 Count(used), Padded(run.size), true);
      }
      WriteQueries(d_q, d_q_BTKGH, b, k, t, count);
    }
    Write(d_k_HT, d_k_BTKH, b, k);
    Write(d_v_HT, d_v_BTKH, b, k);
  }
};

constexpr Size kBlock = 64;  // of the vocabulary

// R slots' tokens, each by one uniform number, and the logarithm of the sum of the exponentials of a
// slot's logits. Blocks first and then a block's members: as `inverse_cdf` in decode.py, which says
// why.
struct Draw {
  Size R, V, text_size;
  float coldness;  // 1 / temperature; 0 takes the likeliest
  const float *logits_RV, *uniform_R;
  int32_t* token_R;
  float* log_total_R;

  // Of weights, the last one that begins at or before a target; what of the target is left.
  static std::pair<Size, float> Pick(const float* weights, Size count, float target) {
    Size found = 0;
    float before = 0, begins = 0;
    for (Size i = 0; i < count && before <= target; before += weights[i++])
      if (weights[i] > 0) found = i, begins = before;
    return {found, target - begins};
  }

  void operator()(Size r, Size) const {
    const float* const logits = logits_RV + r * V;
    const Size whole = text_size / kBlock * kBlock;
    float rest_of[kBlock];
    std::fill_n(rest_of, kBlock, -INFINITY);
    std::copy(logits + whole, logits + text_size, rest_of);
    const auto block_of = [&](Size j) { return j * kBlock < whole ? logits + j * kBlock : rest_of; };
    const float top = Top(rest_of, kBlock, Top(logits, whole, -INFINITY));
    std::vector<float> mass((text_size + kBlock - 1) / kBlock);
    Vector total{};
    float drawn = 0;
    for (Size j = 0; j < Size(mass.size()); ++j) {
      Vector sum{};
      for (Size v = 0; v < kBlock; v += kLanes) {
        const Vector x = Load<Vector>(block_of(j) + v) - top;
        total += Weight(x);
        sum += Weight(coldness * x);
      }
      drawn += mass[j] = Sum(sum);
    }
    log_total_R[r] = top + std::log(Sum(total));
    if (coldness == 0) {
      const Size likeliest = std::find(logits, logits + text_size, top) - logits;
      token_R[r] = likeliest < text_size ? likeliest : 0;  // or none is: they are no numbers
      return;
    }
    const auto [block, rest] = Pick(mass.data(), mass.size(), uniform_R[r] * drawn);
    float weights[kBlock];
    for (Size v = 0; v < kBlock; v += kLanes)
      Store(weights + v, Weight(coldness * (Load<Vector>(block_of(block) + v) - top)));
    token_R[r] = block * kBlock + Pick(weights, kBlock, rest).first;
  }
};

// work(i, j) of all, i < rows and j < columns. Whoever is free takes the next. The caller works too
// and waits for what is begun only, not for helpers to come: it may itself occupy the thread they
// would need.
template <typename Work>
void Share(ffi::ThreadPool& pool, Size rows, Size columns, Work work) {
  struct Progress {
    std::atomic<Size> taken{0}, done{0};
  };
  const auto progress = std::make_shared<Progress>();
  const Size parts = rows * columns;
  const auto take = [work, progress, parts, columns] {
    for (Size part; (part = progress->taken++) < parts; ++progress->done)
      work(part / columns, part % columns);
  };
  for (Size helper = 1; helper < std::min<Size>(pool.num_threads(), parts); ++helper)
    pool.Schedule([take] { take(); });
  take();
  while (progress->done < parts) std::this_thread::yield();
}

#ifdef TILES
constexpr Size kPanel = 2 * kTile;  // columns
constexpr Size kInner = 288;        // factors of a panel, which stay in the nearest cache
constexpr Size kRows = 288;         // whose factors stay in the second one
constexpr Size kWide = 16;          // panels whose sums stay there, if they must
constexpr Size kAhead = 48;         // rows after the one that is packed

struct alignas(64) PanelSums {
  float of[kRows][kPanel];
};
struct alignas(64) PanelFactors {
  Pair of[kInner][kPanel];
};
struct alignas(64) RowFactors {  // tile by tile, first along the rows
  Pair of[kRows / kTile][kInner / kTile][kTile][kTile];
  Tiled From(Size row) { return {of[row / kTile][0][0], kTile, kTile * kTile, kInner * kTile}; }
};
struct Kept {
  std::vector<PanelSums> sums{2 * kWide};
  std::vector<PanelFactors> panels{2};
  std::vector<RowFactors> rows{1};

  static Kept& OfThread() {  // or its memory would be new each time
    static thread_local Kept kept;
    return kept;
  }
};

// Jobs, numbered from 0, that are done as evenly as can be in so many steps.
struct Spread {
  Size jobs = 0, steps = 1, done = 0, due = 0;

  template <typename Work>
  void Step(Work work) {
    for (due += jobs; due >= steps && done < jobs; due -= steps) work(done++);
  }
  template <typename Work>
  void Rest(Work work) {
    while (done < jobs) work(done++);
  }
};

// At most so many numbers from a place on, 0 after them.
__m512i Numbers(const Bfloat16* from, Size count) {
  if (count >= 2 * kTile) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16(count > 0 ? (1u << count) - 1 : 0, from);
}

// Of a matrix in memory, [rows, columns], 16 vectors of pairs from a place on, and zeros beyond it.
struct Numbered {
  const Bfloat16* data;
  Size rows, columns;

  // Pairs across two rows, those of 16 columns and of the next 16.
  void Across(Size row, Size column, Vector* low, Vector* high) const {
    const auto numbers = [=](Size i) {
      return i < rows ? Numbers(data + i * columns + column, columns - column) : __m512i{};
    };
    for (Size i = 0; i < 2; ++i)  // rows that follow may lie apart
      __builtin_prefetch(data + (row + kAhead + i) * columns + column);
    const __m512i first = numbers(row), second = numbers(row + 1);
    const Integers order = kLaneNumbers + ((kLaneNumbers + 32) << 16);
    *low = (Vector)_mm512_permutex2var_epi16(first, (__m512i)order, second);
    *high = (Vector)_mm512_permutex2var_epi16(first, (__m512i)(order + 0x100010), second);
  }

  // Pairs along 16 rows, from a column on.
  void Along(Size row, Size column, Vector* to) const {
    for (Size i = 0; i < kTile; ++i)
      to[i] = row + i < rows
                  ? (Vector)Numbers(data + (row + i) * columns + column, columns - column)
                  : Vector{};
  }
};

// y = x m, rounded to O. Each of x and m may lie transposed in memory.
//
// Where x has many rows, the factors of m are packed first, panel by panel, into `room`, and those of
// x are read as they lie. Without room, both are packed where they are needed, part by part of the
// inner dimension, into the caches of the thread that does: what is too long to stay in a cache, or
// lies transposed, is read from memory once so, and never written. m's next panel is packed while
// the tiles multiply by this one.
//
// Of two m's, N, panels take turns, and y is what the first product lets through of the second: both
// are written too where there is somewhere to.
template <typename O, int N = 1>
struct Product {
  Size rows, inner, columns;
  bool x_turned, m_turned;  // [inner, rows] and [columns, inner]
  const Bfloat16* x;
  std::array<const Bfloat16*, N> m;
  O* y;
  Pair* room;
  std::array<O*, N> products{};
  bool gelu = false;  // or silu

  Size Inner() const { return (Factors<Pair>::Count(inner) + kTile - 1) / kTile * kTile; }
  Size Panels() const { return (columns + kPanel - 1) / kPanel; }

  // Of the panels of all of N so many factors, from one on, are packed in so many steps.
  Size Packings(Size factors) const { return m_turned ? factors / kTile * 2 : factors; }
  void PackPanel(Size panel, Size factor, Size step, Pair* to) const {
    const Bfloat16* const of = m[panel % N];
    const Size column = panel / N * kPanel;
    const auto store = [=](const Vector& x, Size i, Size half) {
      Store(reinterpret_cast<float*>(to + i * kPanel + half * kTile), x);
    };
    if (m_turned) {
      const Size along = step / 2 * kTile, half = step % 2;
      Vector x[kTile];
      Numbered{of, columns, inner}.Along(column + half * kTile, 2 * (factor + along), x);
      Transpose(x);
      for (Size i = 0; i < kTile; ++i) store(x[i], along + i, half);
    } else {
      Vector low, high;
      Numbered{of, inner, columns}.Across(2 * (factor + step), column, &low, &high);
      store(low, step, 0);
      store(high, step, 1);
    }
  }
  Pair* Packed(Size panel) const { return room + panel * Inner() * kPanel; }
  void PackPanel(Size panel) const {
    for (Size step = 0; step < Packings(Inner()); ++step) PackPanel(panel, 0, step, Packed(panel));
  }

  Tiled X(Size row, Size factor) const {
    auto* const of = reinterpret_cast<Pair*>(const_cast<Bfloat16*>(x));
    return Lying({of + row * Inner() + factor, Inner()});
  }
  void PackRows(Size from, Size count, Size factor, Size factors, RowFactors& to) const {
    for (Size f = 0; f < factors; f += kTile)
      for (Size r = 0; r < count; r += kPanel) {
        Vector x[2][kTile];
        for (Size half = 0; half < 2 && !x_turned; ++half)
          Numbered{this->x, rows, inner}.Along(from + r + half * kTile, 2 * (factor + f), x[half]);
        for (Size i = 0; i < kTile && x_turned; ++i)
          Numbered{this->x, inner, rows}.Across(2 * (factor + f + i), from + r, &x[0][i], &x[1][i]);
        for (Size half = 0; half < 2; ++half) {
          if (x_turned) Transpose(x[half]);
          Pair(*const tile)[kTile] = to.of[r / kTile + half][f / kTile];
          for (Size i = 0; i < kTile; ++i) Store(reinterpret_cast<float*>(tile[i]), x[half][i]);
        }
      }
  }

  using TwoPanels = std::array<const float*, 2 * N>;

  // finish(row, column, its numbers) of some rows of panels, the first an even one, two at a time:
  // numbers are those of one panel, of each of N, and then of the other.
  template <typename Finish>
  void Each(Size from, Size count, Size panel, Size end, Finish finish) const {
    for (const auto& [begin, some] : Parts(count))
      if (some)
        InTiles(std::min(some, kTile), kTile, kTile, [&, begin = begin, some = some] {
          EachInTiles(from + begin, some, panel, end, finish);
        });
    _mm_sfence();  // before others read what is written past the caches
  }

  // Two panels are finished, and the next one packed, little by little while the tiles multiply: else
  // these would wait. Parts of an inner dimension whose factors lie as they are needed are added up
  // two panels at a time, else in as many as the sums have room for, so that rows are packed once.
  template <typename Finish>
  void EachInTiles(Size from, Size count, Size first, Size end, Finish finish) const {
    static_assert(N <= 2);
    Kept& kept = Kept::OfThread();
    const Size some = room ? 2 : kWide, ring = room ? 4 : kWide;
    const auto sums = [=, all = kept.sums.data()](Size panel, Size n) {
      return all[panel % ring * N + n].of;
    };
    Spread finishing, packing;
    Size finished = first;
    const auto finish_row = [&](Size r) {
      TwoPanels numbers;
      for (Size i = 0; i < 2 * N; ++i) numbers[i] = sums(finished + i / N, i % N)[r];
      finish(from + r, finished * kPanel, numbers);
    };
    for (Size group = first; group < end; group += some) {
      const Size after = std::min(group + some, end) * N;
      for (Size i = 0; i < Inner(); i += kInner) {
        const Size factors = std::min(kInner, Inner() - i);
        const Size steps = (count + kPanel - 1) / kPanel * factors / kTile;
        Size next = group * N;  // of the panels of all of N
        const auto pack = [&](Size step) {
          PackPanel(next, i, step, kept.panels[next % 2].of[0]);
        };
        if (!room) {
          PackRows(from, count, i, factors, kept.rows[0]);
          packing = {Packings(factors), steps};
          packing.Rest(pack);
        }
        while (next < after) {
          const Size panel = next / N, n = next % N;
          Pair* const of = room ? Packed(next) + i * kPanel : kept.panels[next % 2].of[0];
          if (++next < after && !room) packing = {Packings(factors), steps};
          for (Size r = 0; r < count; r += kPanel) {
            const Tiled rows = room ? X(from + r, i) : kept.rows[0].From(r);
            const Matrix to{sums(panel, n)[r], kPanel};
            const auto multiply = [&](auto tiles) {
              Block<tiles(), 2>(rows, {of, kPanel}, to, factors, i > 0, [&] {
                finishing.Step(finish_row);
                packing.Step(pack);
              });
            };
            if (r + kTile < count)
              multiply(std::integral_constant<int, 2>{});
            else
              multiply(std::integral_constant<int, 1>{});
          }
          packing.Rest(pack);
          if (i + factors == Inner() && (next == after || next % (2 * N) == 0)) {
            finishing.Rest(finish_row);
            finishing = {count, 2 * N * steps};
            finished = panel / 2 * 2;
          }
        }
      }
    }
    finishing.Rest(finish_row);
  }

  void operator()(Size from, Size count, Size panel, Size end) const {
    Each(from, count, panel, end, [this](Size r, Size column, const TwoPanels& numbers) {
      const Size at = r * columns + column, size = std::min(2 * kPanel, columns - column);
      const auto of = [&](int n) -> Rows { return {RowOf(numbers[n]), RowOf(numbers[N + n])}; };
      if constexpr (N == 1)
        Write(of(0), y + at, size);
      else
        WriteGated(of(0), of(1), at, size);
    });
  }

  using Row = std::array<Vector, 2>;  // of a panel
  using Rows = std::array<Row, 2>;    // of two
  static Row RowOf(const float* from) { return {Load<Vector>(from), Load<Vector>(from + kLanes)}; }

  // Whole lines pass the caches, two at a time: memory takes these four times as fast as single ones
  // here and there, which it must read before, and none would stay until it is needed.
  static void Write(const Rows& rows, O* to, Size size) {
    if (size < 2 * kPanel || reinterpret_cast<uintptr_t>(to) % 64) {
      alignas(64) O whole[2 * kPanel];
      Write(rows, whole, 2 * kPanel);
      std::copy_n(whole, size, to);
    } else if constexpr (std::is_same_v<O, float>) {
      for (int i = 0; i < 4; ++i) _mm512_stream_ps(to + i * kLanes, (__m512)rows[i / 2][i % 2]);
    } else {
      for (int i = 0; i < 2; ++i)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * kPanel),
                            (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[i][1], (__m512)rows[i][0]));
    }
  }

  void WriteGated(const Rows& gates, const Rows& values, Size at, Size size) const {
    Rows through;
    for (int i = 0; i < 4; ++i)
      through[i / 2][i % 2] = Activation(gates[i / 2][i % 2]) * values[i / 2][i % 2];
    Write(through, y + at, size);
    if (products[0]) Write(gates, products[0] + at, size);
    if (products[1]) Write(values, products[1] + at, size);
  }

  // x, by the sigmoid of x or of what makes it GELU with its tanh, as that is a sigmoid, to 4e-6 of
  // it: the activation takes as long as the tiles.
  Vector Activation(Vector x) const {
    const Vector z = gelu ? x * (-2.3022082f - 0.10294324f * x * x) : x * -1.44269504f;
    const __m512 y = _mm512_min_ps(_mm512_set1_ps(126.0f), (__m512)z);  // and NaN stays NaN
    const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT);
    const Vector r = (Vector)y - (Vector)n;  // of the two to the y, the polynomial's part
    Vector p = r * 9.66636837e-3f + 5.59219755e-2f;
    p = p * r + 2.40223497e-1f;
    p = p * r + 6.93121016e-1f;
    p = p * r + 1.0f;
    const Vector below = (Vector)_mm512_scalef_ps((__m512)p, n) + 1.0f;
    const Vector near = (Vector)_mm512_rcp14_ps((__m512)below);
    return x * near * (2.0f - below * near);
  }
};

// Cross-entropy of rows whose logits are a product with the vocabulary's table, each times its
// weight; and its gradient by them, which is `logits.y`, if there is one. They are computed twice,
// else they would have to be written in full precision and read again. An id that isn't text has no
// probability.
struct CrossEntropy {
  Product<Bfloat16> logits;
  Size text_size;
  const int32_t* target_R;
  const float *weight_R;
  float* loss_R;

  void operator()(Size from, Size count, Size) const {
    Vector top[kRows], total[kRows];  // by lanes
    float of_target[kRows], log_total[kRows];
    std::fill_n(top, count, Vector{} + kHidden);
    std::fill_n(total, count, Vector{});
    std::fill_n(of_target, count, kHidden);
    Each(from, count, [&](Size r, Size column, const TwoPanels& numbers, const Vector* x) {
      const Size target = Target(from + r, column);
      if (0 <= target && target < 2 * kPanel)
        of_target[r] = numbers[target / kPanel][target % kPanel];
      const auto higher_of = [](Vector a, Vector b) { return a > b ? a : b; };
      const Vector higher = higher_of(higher_of(x[0], x[1]), higher_of(x[2], x[3]));
      if (_mm512_cmp_ps_mask((__m512)higher, (__m512)top[r], _CMP_GT_OQ)) {  // seldom, later on
        const Vector before = top[r];
        top[r] = higher > before ? higher : before;
        total[r] *= Weight(before - top[r]);
      }
      for (int i = 0; i < 4; ++i) total[r] += Weight(x[i] - top[r]);
    });
    for (Size r = 0; r < count; ++r) {
      const float highest = Top(top[r]);
      log_total[r] = highest + std::log(Sum(total[r] * Weight(top[r] - highest)));
      loss_R[from + r] = weight_R[from + r] * (log_total[r] - of_target[r]);
    }
    if (!logits.y) return;
    Each(from, count, [&](Size r, Size column, const TwoPanels&, const Vector* x) {
      const Size target = Target(from + r, column);
      Product<Bfloat16>::Rows gradient;
      for (int i = 0; i < 4; ++i) {
        const Integers is_target = kLaneNumbers + int32_t(i * kLanes) == int32_t(target);
        const Vector probability = Weight(x[i] - log_total[r]);
        gradient[i / 2][i % 2] =
            weight_R[from + r] * (is_target ? probability - 1.0f : probability);
      }
      Product<Bfloat16>::Write(gradient, logits.y + (from + r) * logits.columns + column,
                               std::min(2 * kPanel, logits.columns - column));
    });
  }

  // A row's target among the columns from one on; what isn't text is none.
  Size Target(Size r, Size column) const {
    return target_R[r] < text_size ? target_R[r] - column : -1;
  }

  using TwoPanels = Product<Bfloat16>::TwoPanels;

  // What work does with a row's logits in two panels, as they lie and as vectors, without text's.
  template <typename Work>
  void Each(Size from, Size count, Work work) const {
    logits.Each(from, count, 0, logits.Panels(), [=](Size r, Size column, const TwoPanels& numbers) {
      Vector x[4];
      for (int i = 0; i < 4; ++i) {
        const Size first = column + i * kLanes;
        x[i] = Load<Vector>(numbers[i / 2] + i % 2 * kLanes);
        if (first + kLanes > text_size)
          x[i] = kLaneNumbers < int32_t(text_size - first) ? x[i] : Vector{} + kHidden;
      }
      work(r - from, column, numbers, x);
    });
  }
};
#endif

template <ffi::DataType type, int rank>
using Of = ffi::Buffer<type, rank>;
template <int rank>
using Floats = Of<ffi::F32, rank>;
template <int rank>
using Int32s = Of<ffi::S32, rank>;
using Bfloat16s = Of<ffi::BF16, 1>;

template <ffi::DataType type>
ffi::Error RunDecode(ffi::ThreadPool pool, Of<type, 5> q, Of<type, 4> k, Of<type, 4> v,
                     Of<type, 5> prompt_k, Of<type, 5> prompt_v, Of<type, 5> own_k,
                     Of<type, 5> own_v, Int32s<2> length, Int32s<2> prompt, Int32s<2> age,
                     Int32s<3> table, Int32s<0> window,
                     ffi::Result<Of<type, 5>> out, ffi::Result<Of<type, 5>> new_k,
                     ffi::Result<Of<type, 5>> new_v, float scale, int64_t) {
  if (new_k->typed_data() != own_k.typed_data() || new_v->typed_data() != own_v.typed_data())
    return ffi::Error::Internal("the caches must be updated in place");
  const auto d = q.dimensions(), prompts = prompt_k.dimensions(), pages = own_k.dimensions();
  const auto run = [&](auto factor) {
    const Decode<ffi::NativeType<type>, decltype(factor)> step{
        d[0], d[1], d[2], d[3], d[4], prompts[1], prompts[3], pages[1], pages[3],
        table.dimensions()[2], scale,
        q.typed_data(), k.typed_data(), v.typed_data(), prompt_k.typed_data(),
        prompt_v.typed_data(), new_k->typed_data(), new_v->typed_data(), out->typed_data(),
        length.typed_data(), prompt.typed_data(), age.typed_data(), table.typed_data(),
        window.typed_data()};
    const Size parts = std::max<Size>((step.Crowd() + kSlots - 1) / kSlots, 1);
    Share(pool, step.U * step.P, step.K * parts,
          [step, parts](Size b, Size i) { step(b, i / parts, i % parts); });
  };
  if (d[4] % 2)
    run(0.0f);  // pairs along keys, as they lie, would reach into the next
  else
    run(Factor<ffi::NativeType<type>>{});
  return ffi::Error::Success();
}

template <ffi::DataType type>
auto DecodeBinding() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .template Arg<Of<type, 5>>()  // q_UTKGH
      .template Arg<Of<type, 4>>()  // k_UTKH
      .template Arg<Of<type, 4>>()  // v_UTKH
      .template Arg<Of<type, 5>>()  // prompt_k_UPKSH
      .template Arg<Of<type, 5>>()  // prompt_v_UPKSH
      .template Arg<Of<type, 5>>()  // own_k_UZKWH
      .template Arg<Of<type, 5>>()  // own_v_UZKWH
      .template Arg<Int32s<2>>()    // prompt_length_UP
      .template Arg<Int32s<2>>()    // prompt_UT
      .template Arg<Int32s<2>>()    // age_UT
      .template Arg<Int32s<3>>()    // table_UTJ
      .template Arg<Int32s<0>>()    // window, 0 for none
      .template Ret<Of<type, 5>>()  // out_UTKGH
      .template Ret<Of<type, 5>>()  // own_k_UZKWH
      .template Ret<Of<type, 5>>()  // own_v_UZKWH
      .template Attr<float>("scale")
      .template Attr<int64_t>("flops");
}

template <ffi::DataType type>
using WholeOf = Whole<ffi::NativeType<type>, Factor<ffi::NativeType<type>>>;

template <ffi::DataType type>
WholeOf<type> Arguments(Of<type, 5> q, Of<type, 4> k, Of<type, 4> v, Int32s<2> end,
                        Int32s<2> position, Int32s<0> window, float scale) {
  const auto d = q.dimensions();
  return {d[0], d[1], d[2], d[3], d[4], scale, q.typed_data(), k.typed_data(), v.typed_data(),
          end.typed_data(), position.typed_data(), window.typed_data()};
}

template <ffi::DataType type>
ffi::Error RunForwards(ffi::ThreadPool pool, Of<type, 5> q, Of<type, 4> k, Of<type, 4> v,
                       Int32s<2> end, Int32s<2> position, Int32s<0> window,
                       ffi::Result<Of<type, 5>> out, ffi::Result<Floats<4>> log_total, float scale,
                       int64_t) {
  auto rows = Arguments<type>(q, k, v, end, position, window, scale);
  rows.out_BTKGH = out->typed_data();
  rows.log_total_BTKG = log_total->typed_data();
  // A row's head is one part, or if threads can't share so few evenly, several parts of its tiles,
  // though each must pack all keys and values. The gradients of these are sums over all queries.
  const Size heads = rows.B * rows.K, threads = std::max<Size>(pool.num_threads(), 1);
  const Size cuts = heads < 4 * threads ? threads / std::gcd(threads, heads) : 1;
  const Size parts = std::min(cuts, rows.Tiles());
  Share(pool, heads, parts, [rows, parts](Size head, Size part) {
    rows.Forwards(head / rows.K, head % rows.K, part, parts);
  });
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error RunBackwards(ffi::ThreadPool pool, Of<type, 5> q, Of<type, 4> k, Of<type, 4> v,
                        Int32s<2> end, Int32s<2> position, Int32s<0> window, Of<type, 5> out,
                        Floats<4> log_total, Of<type, 5> d_out, ffi::Result<Of<type, 5>> d_q,
                        ffi::Result<Of<type, 4>> d_k, ffi::Result<Of<type, 4>> d_v, float scale,
                        int64_t) {
  auto rows = Arguments<type>(q, k, v, end, position, window, scale);
  rows.out_BTKGH = out.typed_data();
  rows.log_total_BTKG = log_total.typed_data();
  rows.d_out_BTKGH = d_out.typed_data();
  rows.d_q_BTKGH = d_q->typed_data();
  rows.d_k_BTKH = d_k->typed_data();
  rows.d_v_BTKH = d_v->typed_data();
  Share(pool, rows.B, rows.K, [rows](Size b, Size k) { rows.Backwards(b, k); });
  return ffi::Error::Success();
}

template <ffi::DataType type>
auto WholeBinding() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .template Arg<Of<type, 5>>()  // q_BTKGH
      .template Arg<Of<type, 4>>()  // k_BTKH
      .template Arg<Of<type, 4>>()  // v_BTKH
      .template Arg<Int32s<2>>()    // end_BT
      .template Arg<Int32s<2>>()    // position_BT
      .template Arg<Int32s<0>>();   // window
}

template <ffi::DataType type>
auto ForwardsBinding() {
  return WholeBinding<type>()
      .template Ret<Of<type, 5>>()  // out_BTKGH
      .template Ret<Floats<4>>()    // log_total_BTKG
      .template Attr<float>("scale")
      .template Attr<int64_t>("flops");
}

template <ffi::DataType type>
auto BackwardsBinding() {
  return WholeBinding<type>()
      .template Arg<Of<type, 5>>()  // out_BTKGH
      .template Arg<Floats<4>>()    // log_total_BTKG
      .template Arg<Of<type, 5>>()  // d_out_BTKGH
      .template Ret<Of<type, 5>>()  // d_q_BTKGH
      .template Ret<Of<type, 4>>()  // d_k_BTKH
      .template Ret<Of<type, 4>>()  // d_v_BTKH
      .template Attr<float>("scale")
      .template Attr<int64_t>("flops");
}

ffi::Error RunDraw(ffi::ThreadPool pool, Floats<3> logits, Floats<2> uniform,
                   ffi::Result<Int32s<2>> token, ffi::Result<Floats<2>> log_total, float coldness,
                   int64_t text_size, int64_t) {
  const auto d = logits.dimensions();
  const Draw draw{d[0] * d[1], d[2], text_size, coldness, logits.typed_data(), uniform.typed_data(),
                  token->typed_data(), log_total->typed_data()};
  Share(pool, draw.R, 1, draw);
  return ffi::Error::Success();
}

#ifdef TILES
template <typename P>
void Pack(ffi::ThreadPool& pool, const P& product) {
  if (product.room)
    Share(pool, product.Panels() * product.m.size(), 1,
          [=](Size panel, Size) { product.PackPanel(panel); });
}

// work(from, count, i) of all rows, and of so many i: as many parts for each thread, of whole tiles.
template <typename Work>
void ShareRows(ffi::ThreadPool& pool, Size all, Size columns, Work work) {
  const Size threads = std::max<Size>(pool.num_threads(), 1);
  const Size even = threads / std::gcd(threads, columns);
  const Size parts = (all + even * kRows - 1) / (even * kRows) * even;
  const Size rows = (all + parts * kTile - 1) / (parts * kTile) * kTile;
  Share(pool, (all + rows - 1) / rows, columns, [=](Size part, Size i) {
    work(part * rows, std::min(rows, all - part * rows), i);
  });
}

template <typename P>
void Run(ffi::ThreadPool& pool, const P& product) {
  Pack(pool, product);
  const Size panels = product.Panels(), groups = product.room ? 1 : (panels + kWide - 1) / kWide;
  const Size some = (panels + 2 * groups - 1) / (2 * groups) * 2;
  ShareRows(pool, product.rows, groups, [=](Size from, Size count, Size group) {
    product(from, count, group * some, std::min((group + 1) * some, panels));
  });
}

Bfloat16* NumbersOf(ffi::AnyBuffer of) { return static_cast<Bfloat16*>(of.untyped_data()); }
Bfloat16* Wanted(ffi::AnyBuffer of) { return of.element_count() ? NumbersOf(of) : nullptr; }
Pair* PairsOf(ffi::AnyBuffer of) { return reinterpret_cast<Pair*>(Wanted(of)); }

ffi::Error RunProduct(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer m,
                      ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> room,
                      int64_t inner, int64_t columns, bool x_turned, bool m_turned, int64_t) {
  const auto run = [&](auto* out) {
    Run(pool, Product<std::remove_pointer_t<decltype(out)>>{
                  Size(x.element_count()) / inner, inner, columns, x_turned, m_turned, NumbersOf(x),
                  {NumbersOf(m)}, out, PairsOf(*room)});
  };
  if (y->element_type() == ffi::F32)
    run(y->typed_data<float>());
  else
    run(NumbersOf(*y));
  return ffi::Error::Success();
}

ffi::Error RunGated(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gate,
                    ffi::AnyBuffer value, ffi::Result<ffi::AnyBuffer> y,
                    ffi::Result<ffi::AnyBuffer> gates, ffi::Result<ffi::AnyBuffer> values,
                    ffi::Result<ffi::AnyBuffer> room, int64_t inner, int64_t columns, bool x_turned,
                    bool m_turned, bool gelu, int64_t) {
  Run(pool, Product<Bfloat16, 2>{
                Size(x.element_count()) / inner, inner, columns, x_turned, m_turned, NumbersOf(x),
                {NumbersOf(gate), NumbersOf(value)}, NumbersOf(*y),
                PairsOf(*room), {Wanted(*gates), Wanted(*values)},
                gelu});
  return ffi::Error::Success();
}

ffi::Error RunCrossEntropy(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer table,
                           Int32s<1> target, Floats<1> weight, ffi::Result<Floats<1>> loss,
                           ffi::Result<ffi::AnyBuffer> d_logits, ffi::Result<ffi::AnyBuffer> room,
                           int64_t inner, int64_t columns, bool x_turned, bool m_turned,
                           int64_t text_size, int64_t) {
  const CrossEntropy rows{
      {Size(x.element_count()) / inner, inner, columns, x_turned, m_turned, NumbersOf(x),
       {NumbersOf(table)}, Wanted(*d_logits), PairsOf(*room)},
      text_size, target.typed_data(), weight.typed_data(), loss->typed_data()};
  Pack(pool, rows.logits);
  ShareRows(pool, rows.logits.rows, 1, rows);
  return ffi::Error::Success();
}
#endif

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(draw_float32, RunDraw,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats<3>>()   // logits_UCV
                                  .Arg<Floats<2>>()   // uniform_UC
                                  .Ret<Int32s<2>>()   // token_UC
                                  .Ret<Floats<2>>()   // log_total_UC
                                  .Attr<float>("coldness")
                                  .Attr<int64_t>("text_size")
                                  .Attr<int64_t>("flops"));

#define HANDLERS(NAME, TYPE)                                                                       \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(decode_##NAME, RunDecode<TYPE>, DecodeBinding<TYPE>());            \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(forwards_##NAME, RunForwards<TYPE>, ForwardsBinding<TYPE>());      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(backwards_##NAME, RunBackwards<TYPE>, BackwardsBinding<TYPE>())
HANDLERS(float32, ffi::F32);
HANDLERS(bfloat16, ffi::BF16);

extern "C" int has_tiles() {
#ifdef TILES
  return HasTiles();
#else
  return false;
#endif
}

#ifdef TILES
XLA_FFI_DEFINE_HANDLER_SYMBOL(product_bfloat16, RunProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // m
                                  .Ret<ffi::AnyBuffer>()  // y
                                  .Ret<ffi::AnyBuffer>()  // room for what is packed, or nothing
                                  .Attr<int64_t>("inner")
                                  .Attr<int64_t>("columns")
                                  .Attr<bool>("x_turned")
                                  .Attr<bool>("m_turned")
                                  .Attr<int64_t>("flops"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gated_bfloat16, RunGated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // gate
                                  .Arg<ffi::AnyBuffer>()  // value
                                  .Ret<ffi::AnyBuffer>()  // y
                                  .Ret<ffi::AnyBuffer>()  // x gate, or nothing
                                  .Ret<ffi::AnyBuffer>()  // x value, or nothing
                                  .Ret<ffi::AnyBuffer>()  // room for what is packed, or nothing
                                  .Attr<int64_t>("inner")
                                  .Attr<int64_t>("columns")
                                  .Attr<bool>("x_turned")
                                  .Attr<bool>("m_turned")
                                  .Attr<bool>("gelu")
                                  .Attr<int64_t>("flops"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(cross_entropy_bfloat16, RunCrossEntropy,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // the vocabulary's table
                                  .Arg<Int32s<1>>()       // target_R
                                  .Arg<Floats<1>>()       // weight_R
                                  .Ret<Floats<1>>()       // loss_R
                                  .Ret<ffi::AnyBuffer>()  // its gradient by logits
                                  .Ret<ffi::AnyBuffer>()  // room for what is packed, or nothing
                                  .Attr<int64_t>("inner")
                                  .Attr<int64_t>("columns")
                                  .Attr<bool>("x_turned")
                                  .Attr<bool>("m_turned")
                                  .Attr<int64_t>("text_size")
                                  .Attr<int64_t>("flops"));
#endif
