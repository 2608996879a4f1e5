/* Vectors of floats in the compiler's own notation, and the two things built on them that every
   kernel needs: a register-blocked product and exp. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 6, TILE_VECTORS = 4 };
#elif defined(__AVX__)
enum { LANES = 8, TILE_ROWS = 6, TILE_VECTORS = 2 };
#else
enum { LANES = 4, TILE_ROWS = 4, TILE_VECTORS = 2 };
#endif

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int64_t index_t;

#define INLINE static inline __attribute__((always_inline))

INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }

INLINE float sum_lanes(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}
INLINE float max_lanes(vec x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
}

/* exp to about one unit in the last place, between the ends of float32: exactly 0 below -87.3, and
   2.4e38 from 88.37 on. The polynomial is Cephes' expf (Moshier, 1984). */
INLINE vec exp_lanes(vec x) {
    ivec gone = x < splat(-87.3f); /* so that NaN stays */
    x = choose(gone, splat(0.0f), choose(x > splat(88.37f), splat(88.37f), x));
    vec shifted = x * splat(1.44269504f) + splat(12582912.0f); /* 1.5 * 2^23: rounds to integers */
    vec n = shifted - splat(12582912.0f);
    vec r = x - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
    vec p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    ivec power = ((ivec)shifted - (ivec)splat(12582912.0f)) << 23;
    return (vec)(((ivec)p + power) & ~gone);
}

/* One register tile: C[rows, vectors * LANES] (+)= A[rows, depth] B[depth, vectors * LANES].
   A is read one number at a time, at a_row and a_depth; B and C by vectors, b_vector and
   c_vector apart. */
typedef struct {
    index_t depth;
    const float *a;
    index_t a_row, a_depth;
    const float *b;
    index_t b_depth, b_vector;
    float *c;
    index_t c_row, c_vector;
    int add;
} Product;

INLINE void tile(const int rows, const int vectors, const Product *p) {
    vec sum[TILE_ROWS][TILE_VECTORS];
    const float *a = p->a, *b = p->b;
    const index_t a_row = p->a_row, b_vector = p->b_vector;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sum[r][v] = splat(0.0f);
    for (index_t d = 0; d < p->depth; d++, a += p->a_depth, b += p->b_depth) {
        vec right[TILE_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) right[v] = load(b + v * b_vector);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vec left = splat(a[r * a_row]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sum[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            float *c = p->c + r * p->c_row + v * p->c_vector;
            store(c, p->add ? load(c) + sum[r][v] : sum[r][v]);
        }
}

#define TILE(R, V) static __attribute__((noinline)) void tile_##R##_##V(const Product *p) { tile(R, V, p); }
#define TILES(R) TILE(R, 1) TILE(R, 2)
TILES(1) TILES(2) TILES(3) TILES(4)
#if defined(__AVX__)
TILES(5) TILES(6)
#endif
#if defined(__AVX512F__)
#define MORE_TILES(R) TILE(R, 3) TILE(R, 4)
MORE_TILES(1) MORE_TILES(2) MORE_TILES(3) MORE_TILES(4) MORE_TILES(5) MORE_TILES(6)
#define ROW(R) {tile_##R##_1, tile_##R##_2, tile_##R##_3, tile_##R##_4}
#else
#define ROW(R) {tile_##R##_1, tile_##R##_2}
#endif
static void (*const TILE_TABLE[TILE_ROWS][TILE_VECTORS])(const Product *) = {
    ROW(1), ROW(2), ROW(3), ROW(4),
#if defined(__AVX__)
    ROW(5), ROW(6),
#endif
};

/* The product over `rows` and `vectors` of any number, tile by tile. */
static void product(index_t rows, index_t vectors, Product p) {
    for (index_t v = 0; v < vectors; v += TILE_VECTORS) {
        index_t wide = vectors - v < TILE_VECTORS ? vectors - v : TILE_VECTORS;
        for (index_t r = 0; r < rows; r += TILE_ROWS) {
            index_t high = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
            Product part = p;
            part.a += r * p.a_row;
            part.b += v * p.b_vector;
            part.c += r * p.c_row + v * p.c_vector;
            TILE_TABLE[high - 1][wide - 1](&part);
        }
    }
}
