// Sixteen numbers at a time: float32, or bfloat16 (uint16_t) widened to it. Vectors are the extensions that GCC and Clang share; on x86 two
// conversions have instructions that compilers do not find by themselves.
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16

typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

static inline floats as_floats(words bits) {
    floats v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

static inline words as_words(floats v) {
    words bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

static inline floats load_float(const float *at) {
    floats v;
    memcpy(&v, at, sizeof v);
    return v;
}

static inline floats load_bfloat16(const uint16_t *at) {
#ifdef __AVX512F__
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16);
#else
    halves v;
    memcpy(&v, at, sizeof v);
    return as_floats(__builtin_convertvector(v, words) << 16);
#endif
}

static inline void store_float(float *at, floats v) { memcpy(at, &v, sizeof v); }

// To the nearest, ties to even; NaN stays NaN.
static inline void store_bfloat16(uint16_t *at, floats v) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)at, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    words bits = as_words(v), nan = (words)(v != v);
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    halves result = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), halves);
    memcpy(at, &result, sizeof result);
#endif
}

static inline float one_float(const float *at) { return *at; }

static inline float one_bfloat16(const uint16_t *at) {
    uint32_t wide = (uint32_t)*at << 16;
    float result;
    memcpy(&result, &wide, sizeof result);
    return result;
}

static inline float total(floats v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}
