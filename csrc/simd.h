// A vector of floats as wide as the instruction set this file is compiled for, on GCC/Clang vector extensions.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// vexp, the signs of zero and the sorting of infinities rely on arithmetic as written; clang defines less than gcc, so
// see also arithmetic().
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error \
    "flowroutes_fast needs IEEE arithmetic: take -ffast-math, -Ofast and the like out of CFLAGS, CXXFLAGS and CPPFLAGS"
#endif

namespace flowroutes {
namespace FLOWROUTES_ISA {

#if defined(FLOWROUTES_LANES)  // the tests': any width on any processor, vectors taken apart by the compiler
constexpr int LANES = FLOWROUTES_LANES;
#elif defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

inline vec load(const float* p) {
    vec x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }
inline vec splat(float x) { return x - vec{}; }
inline vec vmin(vec a, vec b) { return a < b ? a : b; }
inline vec vmax(vec a, vec b) { return a > b ? a : b; }
inline vec vabs(vec a) { return reinterpret_cast<vec>(reinterpret_cast<ivec>(a) & 0x7fffffff); }
// x carrying the sign of y times its own
inline vec flip(vec x, vec y) {
    return reinterpret_cast<vec>(reinterpret_cast<ivec>(x) ^ (reinterpret_cast<ivec>(y) & INT32_MIN));
}
// a bit for every lane of a comparison that holds, the first lane lowest
inline uint32_t mask(ivec x) {
#if defined(__AVX512F__) && !defined(FLOWROUTES_LANES)
    return _mm512_cmplt_epi32_mask(reinterpret_cast<__m512i>(x), _mm512_setzero_si512());
#elif defined(__AVX2__) && !defined(FLOWROUTES_LANES)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__) && !defined(FLOWROUTES_LANES)
    return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(x)));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < LANES; ++lane) bits |= (x[lane] ? 1u : 0u) << lane;
    return bits;
#endif
}

// bytes[index[lane]] of every lane, as a number; three bytes behind the last are read
inline vec gather(const int8_t* bytes, const int32_t* index) {
#if defined(__AVX512F__) && !defined(FLOWROUTES_LANES)
    const __m512i x = _mm512_i32gather_epi32(_mm512_loadu_si512(index), bytes, 1);
    return reinterpret_cast<vec>(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24)));
#elif defined(__AVX2__) && !defined(FLOWROUTES_LANES)
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    const __m256i x = _mm256_i32gather_epi32(reinterpret_cast<const int*>(bytes), at, 1);
    return reinterpret_cast<vec>(_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 24), 24)));
#else
    vec out;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = bytes[index[lane]];
    return out;
#endif
}

typedef float vec4 __attribute__((vector_size(16)));
typedef int32_t ivec4 __attribute__((vector_size(16)));

inline vec4 load4(const float* p) {
    vec4 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
// halves added until four lanes are left
inline vec4 quarter(vec a) {
    float lanes[LANES];
    store(lanes, a);
    vec4 total = load4(lanes);
    for (int i = 4; i < LANES; i += 4) total += load4(lanes + i);
    return total;
}
inline float sum(vec a) {
    const vec4 x = quarter(a);
    return (x[0] + x[2]) + (x[1] + x[3]);
}
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FLOWROUTES_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef FLOWROUTES_SHUFFLE  // gcc before 12
#define FLOWROUTES_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec4{__VA_ARGS__})
#endif
// sums of four vectors
inline vec4 sums(vec a, vec b, vec c, vec d) {
    const vec4 w = quarter(a), x = quarter(b), y = quarter(c), z = quarter(d);
    const vec4 p = FLOWROUTES_SHUFFLE(w, x, 0, 4, 1, 5) + FLOWROUTES_SHUFFLE(w, x, 2, 6, 3, 7);
    const vec4 q = FLOWROUTES_SHUFFLE(y, z, 0, 4, 1, 5) + FLOWROUTES_SHUFFLE(y, z, 2, 6, 3, 7);
    return FLOWROUTES_SHUFFLE(p, q, 0, 1, 4, 5) + FLOWROUTES_SHUFFLE(p, q, 2, 3, 6, 7);
}

inline float largest(vec a) {
    float lanes[LANES];
    store(lanes, a);
    vec4 most = load4(lanes);
    for (int i = 4; i < LANES; i += 4) {
        const vec4 x = load4(lanes + i);
        most = most > x ? most : x;
    }
    const float p = most[0] > most[1] ? most[0] : most[1], q = most[2] > most[3] ? most[2] : most[3];
    return p > q ? p : q;
}

// e^x for x <= 0, relative error below 3e-7; 0 under -87. Range reduction to |r| <= ln2/2 and a degree-6 polynomial.
inline vec vexp(vec x) {
    const vec t = vmax(x, splat(-87.f)) * 1.44269504f;
    const vec shifted = t + 12582912.f;  // 1.5 * 2^23: rounds to the nearest integer
    const vec n = shifted - 12582912.f;
    vec r = vmax(x, splat(-87.f)) - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = r * 1.98756915e-4f + 1.39819994e-3f;
    p = p * r + 8.33345190e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666654e-1f;
    p = p * r + 5.00000012e-1f;
    p = p * r * r + r + 1.f;
    const ivec bits = (reinterpret_cast<ivec>(shifted) - reinterpret_cast<ivec>(splat(12582912.f)) + 127) << 23;
    const vec e = p * reinterpret_cast<vec>(bits);
    return x < splat(-87.f) ? vec{} : e;
}

}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
