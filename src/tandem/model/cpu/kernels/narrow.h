/* Numbers of 16 bits: widened exactly, and rounded to nearest even. */
#pragma once
#include "vectors.h"
#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

typedef uint16_t narrow_vec __attribute__((vector_size(LANES * 2), aligned(2)));

INLINE vec widen_f32(const float *p) { return load(p); }
/* The compiler would take a vector's halves apart. */
#if defined(__AVX512F__)
INLINE ivec wide_integers(const uint16_t *p) { return (ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)); }
#elif defined(__AVX2__)
INLINE ivec wide_integers(const uint16_t *p) { return (ivec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)); }
#else
INLINE ivec wide_integers(const uint16_t *p) { return __builtin_convertvector(*(const narrow_vec *)p, ivec); }
#endif
INLINE vec widen_bf16(const uint16_t *p) { return (vec)(wide_integers(p) << 16); }
#if defined(__AVX512F__) && defined(__F16C__)
INLINE vec widen_f16(const uint16_t *p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
#elif defined(__F16C__)
INLINE vec widen_f16(const uint16_t *p) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
#endif

/* Sixteen bits of each number, those of a bfloat16; NaN stays what it is. */
INLINE ivec upper_half(vec x) {
    ivec bits = (ivec)x, number = x == x;
    return (((bits + 0x7fff + ((bits >> 16) & 1)) & number) | ((bits | 0x400000) & ~number)) >> 16;
}
INLINE void narrow_f32(float *p, vec x) { store(p, x); }
INLINE void narrow_bf16(uint16_t *p, vec x) { *(narrow_vec *)p = __builtin_convertvector(upper_half(x), narrow_vec); }
#if defined(__AVX512F__) && defined(__F16C__)
INLINE void narrow_f16(uint16_t *p, vec x) { _mm256_storeu_si256((void *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#elif defined(__F16C__)
INLINE void narrow_f16(uint16_t *p, vec x) { _mm_storeu_si128((void *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#endif
