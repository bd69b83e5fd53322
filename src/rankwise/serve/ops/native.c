/* Low-rank changes of many adapters on their own rows, for rankwise/serve/ops/native.py (which explains the layout).

   Vectors are the compiler's own (GCC and Clang): it picks AVX-512, AVX2, NEON or what there is.  Nothing is padded and
   nothing beyond a run's pages is read.  float throughout, sums in registers. */
#include <stdint.h>

#define W 8      /* components in a page */
#define ROWS 8   /* rows that read a page together */
#define MODULES 8

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));

typedef struct {
  const float *shrink, *expand; /* the pages of one group */
  int64_t in, modules, chunk, chunks;
  int64_t out[MODULES], first[MODULES]; /* outputs, and the first chunk, of each module */
} group;

typedef struct {
  int32_t start, rows, first, pages; /* rows of the step, and a range of the list of pages */
} work;

/* v[rows][modules·W] = x[rows][in] · A[in][modules·W] at B vectors of columns, U sums beside each other for the latency */
#define SHRINK(N, B, U)                                                                                              \
  static void shrink_##N##_##B(const float *x, int64_t ldx, const float *A, int64_t in, int64_t ld, float *v) {       \
    v8 a[U][N][B];                                                                                                   \
    for (int u = 0; u < U; u++)                                                                                      \
      for (int t = 0; t < N; t++)                                                                                    \
        for (int b = 0; b < B; b++) a[u][t][b] = (v8){0};                                                            \
    int64_t i = 0;                                                                                                   \
    for (; i + U <= in; i += U)                                                                                      \
      for (int u = 0; u < U; u++)                                                                                    \
        for (int b = 0; b < B; b++) {                                                                                \
          v8 s = *(const v8 *)(A + (i + u) * ld + b * W);                                                            \
          for (int t = 0; t < N; t++) a[u][t][b] += x[t * ldx + i + u] * s;                                          \
        }                                                                                                            \
    for (; i < in; i++)                                                                                              \
      for (int b = 0; b < B; b++)                                                                                    \
        for (int t = 0; t < N; t++) a[0][t][b] += x[t * ldx + i] * *(const v8 *)(A + i * ld + b * W);                \
    for (int t = 0; t < N; t++)                                                                                      \
      for (int b = 0; b < B; b++) {                                                                                  \
        for (int u = 1; u < U; u++) a[0][t][b] += a[u][t][b];                                                        \
        *(v8 *)(v + t * ld + b * W) = a[0][t][b];                                                                    \
      }                                                                                                              \
  }
SHRINK(1, 1, 8) SHRINK(1, 2, 4) SHRINK(1, 3, 4)
SHRINK(2, 1, 4) SHRINK(2, 2, 2) SHRINK(2, 3, 2)
SHRINK(4, 1, 2) SHRINK(4, 2, 1) SHRINK(4, 3, 1)
SHRINK(8, 1, 1) SHRINK(8, 2, 1) SHRINK(8, 3, 1)

typedef void (*shrinker)(const float *, int64_t, const float *, int64_t, int64_t, float *);
static const shrinker SHRINKERS[4][3] = {{shrink_1_1, shrink_1_2, shrink_1_3},
                                         {shrink_2_1, shrink_2_2, shrink_2_3},
                                         {shrink_4_1, shrink_4_2, shrink_4_3},
                                         {shrink_8_1, shrink_8_2, shrink_8_3}};

static int log2_of(int64_t rows) { return rows >= 8 ? 3 : rows >= 4 ? 2 : rows >= 2 ? 1 : 0; }

/* v[rows][modules·W] of one page */
static void shrink(const group *g, const float *x, int64_t ldx, int64_t rows, int64_t page, float *v) {
  int64_t ld = g->modules * W;
  const float *A = g->shrink + page * g->in * ld;
  for (int64_t t = 0; t < rows;) {
    int k = log2_of(rows - t);
    for (int64_t b = 0; b < g->modules; b += 3) {
      int64_t left = g->modules - b;
      SHRINKERS[k][left > 3 ? 2 : left - 1](x + t * ldx, ldx, A + b * W, g->in, ld, v + t * ld + b * W);
    }
    t += 1 << k;
  }
}

/* y[rows][n] += v[rows][W] · B[W][chunk] for the first n outputs of a chunk */
#define EXPAND(N)                                                                                                    \
  static void expand_##N(float *y, int64_t ldy, const float *B, int64_t chunk, int64_t n, const float *v, int64_t ldv) { \
    int64_t o = 0;                                                                                                   \
    for (; o + 16 <= n; o += 16) {                                                                                   \
      v16 a[N];                                                                                                      \
      for (int t = 0; t < N; t++) a[t] = *(const v16 *)(y + t * ldy + o);                                            \
      for (int k = 0; k < W; k++) {                                                                                  \
        __builtin_prefetch(B + W * chunk + k * 16 + o * W);                                                              \
        v16 s = *(const v16 *)(B + k * chunk + o);                                                                   \
        for (int t = 0; t < N; t++) a[t] += v[t * ldv + k] * s;                                                      \
      }                                                                                                              \
      for (int t = 0; t < N; t++) *(v16 *)(y + t * ldy + o) = a[t];                                                  \
    }                                                                                                                \
    for (; o < n; o++)                                                                                               \
      for (int t = 0; t < N; t++) {                                                                                  \
        float a = y[t * ldy + o];                                                                                    \
        for (int k = 0; k < W; k++) a += v[t * ldv + k] * B[k * chunk + o];                                          \
        y[t * ldy + o] = a;                                                                                          \
      }                                                                                                              \
  }
EXPAND(1) EXPAND(2) EXPAND(4) EXPAND(8)

typedef void (*expander)(float *, int64_t, const float *, int64_t, int64_t, const float *, int64_t);
static const expander EXPANDERS[4] = {expand_1, expand_2, expand_4, expand_8};

/* all outputs of module j, one page */
static void expand(const group *g, int64_t j, float *y, int64_t ldy, int64_t rows, int64_t page, const float *v) {
  int64_t ldv = g->modules * W;
  const float *B = g->expand + (page * g->chunks + g->first[j]) * W * g->chunk;
  for (int64_t o = 0; o < g->out[j]; o += g->chunk, B += W * g->chunk) {
    int64_t n = g->out[j] - o < g->chunk ? g->out[j] - o : g->chunk;
    for (int64_t t = 0; t < rows;) {
      int k = log2_of(rows - t);
      EXPANDERS[k](y + t * ldy + o, ldy, B, g->chunk, n, v + t * ldv + j * W, ldv);
      t += 1 << k;
    }
  }
}

/* v[first + page of the run][rows][modules·W] for every piece of work; v holds ROWS rows a page */
void rankwise_shrink(const group *g, const float *x, int64_t ldx, const work *todo, int64_t n, const int32_t *pages, float *v) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t w = 0; w < n; w++)
    for (int32_t c = 0; c < todo[w].pages; c++)
      shrink(g, x + todo[w].start * ldx, ldx, todo[w].rows, pages[todo[w].first + c],
             v + (int64_t)(todo[w].first + c) * ROWS * g->modules * W);
}

void rankwise_expand(const group *g, int64_t j, float *y, int64_t ldy, const work *todo, int64_t n, const int32_t *pages,
                     const float *v) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t w = 0; w < n; w++)
    for (int32_t c = 0; c < todo[w].pages; c++)
      expand(g, j, y + todo[w].start * ldy, ldy, todo[w].rows, pages[todo[w].first + c],
             v + (int64_t)(todo[w].first + c) * ROWS * g->modules * W);
}

/* both at once: a row's v never leaves the core that made it */
void rankwise_apply(const group *g, const float *x, int64_t ldx, float *const *y, const int64_t *ldy, const work *todo, int64_t n,
                    const int32_t *pages) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t w = 0; w < n; w++) {
    float v[ROWS * MODULES * W];
    for (int32_t c = 0; c < todo[w].pages; c++) {
      int64_t page = pages[todo[w].first + c];
      shrink(g, x + todo[w].start * ldx, ldx, todo[w].rows, page, v);
      for (int64_t j = 0; j < g->modules; j++) expand(g, j, y[j] + todo[w].start * ldy[j], ldy[j], todo[w].rows, page, v);
    }
  }
}
