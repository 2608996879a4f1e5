/* Attention over trees (see docs/internals/engine.md): each row sees a prefix wholly and its own segment
   causally. One call does a layer; a task is one tree and one head, so results do not depend on
   the number of threads.

   Scores of a block of query rows against all keys they see are held at once: exact softmax
   without rescaling, and nothing of size rows x rows. */
#include "vectors.h"

enum { BLOCK = 24 }; /* query rows of a block; a multiple of TILE_ROWS */

typedef struct { /* rows [start, stop) see rows [prefix_start, prefix_stop) and, causally, themselves */
    int64_t start, stop, prefix_start, prefix_stop;
} Segment;

typedef struct { /* numbers at data[row * row_stride + head * head_stride + d] */
    float *data;
    index_t row, head;
} Rows;

typedef struct {
    Rows q, k, v, out, d_out, d_q, d_k, d_v;
    float *lse; /* [heads, rows] */
    index_t rows, heads, key_heads, depth;
    float scale;
    index_t window; /* positions a query sees, itself included; 0 for all */
    const Segment *segments;
    const int64_t *trees; /* [count + 1]: tree t owns segments trees[t] .. trees[t + 1] - 1 */
    index_t tree_count, threads;
} Attention;

static const float *at(Rows r, index_t row, index_t head) { return r.data + row * r.row + head * r.head; }
static float *to(Rows r, index_t row, index_t head) { return r.data + row * r.row + head * r.head; }

/* Keys or values of rows [first, last) of one head, turned: LANES rows a panel, [panel][depth][LANES],
   zero behind the last row. */
static void turn(Rows source, index_t head, index_t first, index_t last, index_t depth, float *panels) {
    for (index_t row = first; row < last; row += LANES) {
        float *panel = panels + (row - first) * depth;
        index_t count = last - row < LANES ? last - row : LANES;
        if (count < LANES) memset(panel, 0, sizeof(float) * LANES * depth);
        for (index_t i = 0; i < count; i++) {
            const float *from = at(source, row + i, head);
            for (index_t d = 0; d < depth; d++) panel[d * LANES + i] = from[d];
        }
    }
}

/* The keys that a block of query rows sees: up to two runs of rows, each with its columns of the
   score block. Columns begin at whole panels; those outside [low, high) of a row are masked. */
typedef struct {
    index_t first, last;   /* key rows, whole run */
    index_t panel, panels; /* first panel of the tree and number of panels */
    index_t column;
} Run;

typedef struct {
    const Attention *a;
    index_t tree_start, tree_stop;
    float *keys, *values; /* panels */
    float *scores, *slopes; /* [BLOCK, columns] */
    index_t columns;        /* allotted to a row */
} Work;

/* Which of a run's key rows the query at row `row` of segment `s` sees: [*low, *high). */
static void visible(const Attention *a, const Segment *s, int own, index_t row, index_t *low, index_t *high) {
    index_t prefix = s->prefix_stop - s->prefix_start;
    index_t position = prefix + row - s->start;
    index_t oldest = a->window && position >= a->window ? position - a->window + 1 : 0;
    if (own) {
        *low = s->start + (oldest > prefix ? oldest - prefix : 0);
        *high = row + 1;
    } else {
        *low = s->prefix_start + (oldest < prefix ? oldest : prefix);
        *high = s->prefix_stop;
    }
}

static int runs_of(const Work *w, const Segment *s, index_t row, index_t rows, Run *runs) {
    int count = 0;
    index_t column = 0;
    for (int own = 0; own < 2; own++) {
        index_t low, high, unused;
        visible(w->a, s, own, row, &low, &unused);
        visible(w->a, s, own, row + rows - 1, &unused, &high);
        if (low >= high) continue;
        index_t panel = (low - w->tree_start) / LANES;
        index_t end = (high - w->tree_start + LANES - 1) / LANES;
        runs[count++] = (Run){low, high, panel, end - panel, column};
        column += (end - panel) * LANES;
    }
    return count;
}

/* Rows of `left` against turned rows: block[i, column] = left_i . panel column. */
static void against(const Work *w, const float *left, index_t left_row, index_t rows, const float *panels,
                    const Run *runs, int count, float *block) {
    index_t depth = w->a->depth;
    for (int i = 0; i < count; i++)
        product(rows, runs[i].panels,
                (Product){depth, left, left_row, 1, panels + runs[i].panel * LANES * depth, LANES,
                          LANES * depth, block + runs[i].column, w->columns, LANES, 0});
}

/* out_i (+)= sum over the keys seen of block[i, key] * right_key, for rows `right` in their own layout. */
static void combine(const Work *w, const float *block, index_t rows, Rows right, index_t head, const Run *runs,
                    int count, float *out, index_t out_row) {
    for (int i = 0; i < count; i++) {
        const Run *r = runs + i;
        const float *from = block + r->column + (r->first - w->tree_start) - r->panel * LANES;
        product(rows, w->a->depth / LANES,
                (Product){r->last - r->first, from, w->columns, 1, at(right, r->first, head), right.row, LANES,
                          out, out_row, LANES, i > 0});
    }
}

/* into_key += sum over rows i of block[i, key] * left_i. */
static void spread(const Work *w, const float *block, index_t rows, const float *left, index_t left_row,
                   const Run *runs, int count, Rows into, index_t head) {
    for (int i = 0; i < count; i++) {
        const Run *r = runs + i;
        const float *from = block + r->column + (r->first - w->tree_start) - r->panel * LANES;
        product(r->last - r->first, w->a->depth / LANES,
                (Product){rows, from, 1, w->columns, left, left_row, LANES, to(into, r->first, head), into.row,
                          LANES, 1});
    }
}

/* Scores that a row does not see become -inf, whole panels at the edges included. */
static void mask(const Work *w, const Segment *s, index_t row, const Run *runs, int count, float *scores) {
    for (int i = 0; i < count; i++) {
        const Run *r = runs + i;
        index_t low, high, base = w->tree_start + r->panel * LANES, end = r->panels * LANES;
        visible(w->a, s, r->first >= s->start, row, &low, &high);
        float *columns = scores + r->column;
        for (index_t c = 0; c < end && base + c < low; c++) columns[c] = -INFINITY;
        for (index_t c = high > base ? high - base : 0; c < end; c++) columns[c] = -INFINITY;
    }
}

static void forward_block(const Work *w, const Segment *s, index_t head, index_t row, index_t rows) {
    const Attention *a = w->a;
    index_t key_head = head / (a->heads / a->key_heads);
    Run runs[2];
    int count = runs_of(w, s, row, rows, runs);
    index_t width = runs[count - 1].column + runs[count - 1].panels * LANES;
    against(w, at(a->q, row, head), a->q.row, rows, w->keys, runs, count, w->scores);
    float inverse[BLOCK];
    for (index_t i = 0; i < rows; i++) {
        float *scores = w->scores + i * w->columns;
        mask(w, s, row + i, runs, count, scores);
        vec top = splat(-INFINITY), total = splat(0.0f);
        for (index_t c = 0; c < width; c += LANES) top = larger(load(scores + c), top);
        float peak = max_lanes(top) * a->scale;
        for (index_t c = 0; c < width; c += LANES) {
            vec p = exp_lanes(load(scores + c) * splat(a->scale) - splat(peak));
            store(scores + c, p);
            total += p;
        }
        float sum = sum_lanes(total);
        inverse[i] = 1.0f / sum;
        a->lse[head * a->rows + row + i] = peak + logf(sum);
    }
    combine(w, w->scores, rows, a->v, key_head, runs, count, to(a->out, row, head), a->out.row);
    for (index_t i = 0; i < rows; i++) {
        float *out = to(a->out, row + i, head);
        for (index_t d = 0; d < a->depth; d += LANES) store(out + d, load(out + d) * splat(inverse[i]));
    }
}

static void backward_block(const Work *w, const Segment *s, index_t head, index_t row, index_t rows) {
    const Attention *a = w->a;
    index_t key_head = head / (a->heads / a->key_heads);
    Run runs[2];
    int count = runs_of(w, s, row, rows, runs);
    index_t width = runs[count - 1].column + runs[count - 1].panels * LANES;
    const float *q = at(a->q, row, head), *d_out = at(a->d_out, row, head);
    against(w, q, a->q.row, rows, w->keys, runs, count, w->scores);
    against(w, d_out, a->d_out.row, rows, w->values, runs, count, w->slopes);
    for (index_t i = 0; i < rows; i++) {
        float *scores = w->scores + i * w->columns, *slopes = w->slopes + i * w->columns;
        mask(w, s, row + i, runs, count, scores);
        const float *out = at(a->out, row + i, head), *d = at(a->d_out, row + i, head);
        vec dot = splat(0.0f);
        for (index_t c = 0; c < a->depth; c += LANES) dot += load(out + c) * load(d + c);
        vec delta = splat(sum_lanes(dot)), lse = splat(a->lse[head * a->rows + row + i]);
        for (index_t c = 0; c < width; c += LANES) {
            vec p = exp_lanes(load(scores + c) * splat(a->scale) - lse);
            store(scores + c, p);
            store(slopes + c, p * (load(slopes + c) - delta) * splat(a->scale));
        }
    }
    spread(w, w->scores, rows, d_out, a->d_out.row, runs, count, a->d_v, key_head);
    spread(w, w->slopes, rows, q, a->q.row, runs, count, a->d_k, key_head);
    combine(w, w->slopes, rows, a->k, key_head, runs, count, to(a->d_q, row, head), a->d_q.row);
}

static Work begin(const Attention *a, index_t tree, int backward) {
    const Segment *first = a->segments + a->trees[tree], *last = a->segments + a->trees[tree + 1] - 1;
    Work w = {a, first->start, last->stop, 0, 0, 0, 0, 0};
    index_t rows = (w.tree_stop - w.tree_start + LANES - 1) / LANES * LANES;
    w.columns = rows + 2 * LANES;
    size_t panels = sizeof(float) * rows * a->depth, block = sizeof(float) * BLOCK * w.columns;
    w.keys = malloc((panels + block) * (backward ? 2 : 1));
    if (!w.keys) abort();
    w.scores = w.keys + panels / sizeof(float);
    w.values = w.scores + block / sizeof(float);
    w.slopes = w.values + panels / sizeof(float);
    return w;
}

/* Tasks with the most work first, so that threads end together. */
static index_t *tasks_by_cost(const Attention *a, index_t heads) {
    index_t count = a->tree_count * heads, *order = malloc(sizeof(index_t) * (count + 1));
    double *cost = malloc(sizeof(double) * (a->tree_count + 1));
    index_t *trees = malloc(sizeof(index_t) * (a->tree_count + 1));
    if (!order || !cost || !trees) abort();
    for (index_t t = 0; t < a->tree_count; t++) {
        cost[t] = 0;
        for (index_t i = a->trees[t]; i < a->trees[t + 1]; i++) {
            const Segment *s = a->segments + i;
            double rows = s->stop - s->start, prefix = s->prefix_stop - s->prefix_start;
            cost[t] += rows * (prefix + rows / 2);
        }
        index_t place = t;
        for (; place > 0 && cost[trees[place - 1]] < cost[t]; place--) trees[place] = trees[place - 1];
        trees[place] = t;
    }
    for (index_t i = 0; i < count; i++) order[i] = trees[i / heads] * heads + i % heads;
    free(cost);
    free(trees);
    return order;
}

void tandem_attention_forward(const Attention *a) {
    index_t tasks = a->tree_count * a->heads, *order = tasks_by_cost(a, a->heads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(a->threads)
    for (index_t task = 0; task < tasks; task++) {
        index_t tree = order[task] / a->heads, head = order[task] % a->heads;
        Work w = begin(a, tree, 0);
        turn(a->k, head / (a->heads / a->key_heads), w.tree_start, w.tree_stop, a->depth, w.keys);
        for (index_t i = a->trees[tree]; i < a->trees[tree + 1]; i++) {
            const Segment *s = a->segments + i;
            for (index_t row = s->start; row < s->stop; row += BLOCK)
                forward_block(&w, s, head, row, s->stop - row < BLOCK ? s->stop - row : BLOCK);
        }
        free(w.keys);
    }
    free(order);
}

void tandem_attention_backward(const Attention *a) {
    index_t tasks = a->tree_count * a->key_heads, *order = tasks_by_cost(a, a->key_heads);
    index_t group = a->heads / a->key_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a->threads)
    for (index_t task = 0; task < tasks; task++) {
        index_t tree = order[task] / a->key_heads, key_head = order[task] % a->key_heads;
        Work w = begin(a, tree, 1);
        turn(a->k, key_head, w.tree_start, w.tree_stop, a->depth, w.keys);
        turn(a->v, key_head, w.tree_start, w.tree_stop, a->depth, w.values);
        for (index_t row = w.tree_start; row < w.tree_stop; row++) {
            memset(to(a->d_k, row, key_head), 0, sizeof(float) * a->depth);
            memset(to(a->d_v, row, key_head), 0, sizeof(float) * a->depth);
        }
        for (index_t head = key_head * group; head < (key_head + 1) * group; head++)
            for (index_t i = a->trees[tree]; i < a->trees[tree + 1]; i++) {
                const Segment *s = a->segments + i;
                for (index_t row = s->start; row < s->stop; row += BLOCK)
                    backward_block(&w, s, head, row, s->stop - row < BLOCK ? s->stop - row : BLOCK);
            }
        free(w.keys);
    }
    free(order);
}
