/* A stored matrix with a low-rank update, in the numbers in which it is stored: what a merge does
   with every weight. Each sum is computed in float32 and rounded once. */
#include "narrow.h"

/* Rows of the matrix, and vectors of a row, that share what is loaded of the update. */
enum { SUM_ROWS = 8, SUM_VECTORS = 2 };

#define LOW_RANK_BLOCK(NAME, TYPE)                                                                                 \
    INLINE void block_##NAME(const TYPE *w, const float *a, const float *b, TYPE *out, index_t columns,            \
                             index_t rank, float scale, vec *squares, const int rows, const int vectors) {         \
        vec sum[SUM_ROWS][SUM_VECTORS];                                                                            \
        _Pragma("GCC unroll 8")                                                                                    \
        for (int r = 0; r < rows; r++)                                                                             \
            _Pragma("GCC unroll 8")                                                                                \
            for (int v = 0; v < vectors; v++) sum[r][v] = splat(0.0f);                                             \
        for (index_t d = 0; d < rank; d++)                                                                         \
            _Pragma("GCC unroll 8")                                                                                \
            for (int r = 0; r < rows; r++) {                                                                       \
                vec left = splat(b[r * rank + d]);                                                                 \
                _Pragma("GCC unroll 8")                                                                            \
                for (int v = 0; v < vectors; v++) sum[r][v] += left * load(a + (v * rank + d) * LANES);            \
            }                                                                                                      \
        _Pragma("GCC unroll 8")                                                                                    \
        for (int r = 0; r < rows; r++)                                                                             \
            _Pragma("GCC unroll 8")                                                                                \
            for (int v = 0; v < vectors; v++) {                                                                    \
                index_t at = r * columns + v * LANES;                                                              \
                narrow_##NAME(out + at, widen_##NAME(w + at) + sum[r][v] * splat(scale));                          \
                vec stored = widen_##NAME(out + at);                                                               \
                squares[r] += stored * stored;                                                                     \
            }                                                                                                      \
    }

/* out = w + scale * b a, of w [outputs, columns], b [outputs, rank], and a [rank, columns] in the
   order [columns / LANES, rank, LANES], in which it is read; norms gets each row's sum of squares as
   it is stored. Columns are a multiple of LANES. */
#define LOW_RANK_SUM(NAME, TYPE)                                                                                   \
    LOW_RANK_BLOCK(NAME, TYPE)                                                                                     \
    void tandem_low_rank_sum_##NAME(const TYPE *w, const float *a, const float *b, TYPE *out, float *norms,        \
                                    index_t outputs, index_t columns, index_t rank, float scale,                   \
                                    index_t threads) {                                                             \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                          \
        for (index_t n = 0; n < outputs; n += SUM_ROWS) {                                                          \
            const int rows = outputs - n < SUM_ROWS ? (int)(outputs - n) : SUM_ROWS;                               \
            const TYPE *from = w + n * columns;                                                                    \
            TYPE *to = out + n * columns;                                                                          \
            vec squares[SUM_ROWS];                                                                                 \
            for (int r = 0; r < SUM_ROWS; r++) squares[r] = splat(0.0f);                                           \
            index_t k = 0;                                                                                         \
            if (rows == SUM_ROWS)                                                                                  \
                for (; k + SUM_VECTORS * LANES <= columns; k += SUM_VECTORS * LANES)                               \
                    block_##NAME(from + k, a + k * rank, b + n * rank, to + k, columns, rank, scale, squares,      \
                                 SUM_ROWS, SUM_VECTORS);                                                           \
            for (; k < columns; k += LANES)                                                                        \
                block_##NAME(from + k, a + k * rank, b + n * rank, to + k, columns, rank, scale, squares, rows, 1); \
            for (int r = 0; r < rows; r++) norms[n + r] = sum_lanes(squares[r]);                                   \
        }                                                                                                          \
    }

LOW_RANK_SUM(f32, float)
LOW_RANK_SUM(bf16, uint16_t)
#if defined(__F16C__)
LOW_RANK_SUM(f16, uint16_t)
#endif
