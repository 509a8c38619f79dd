/* Decode with AVX-512 (VNNI), step 2: 16 rows of the weight at a time. */
#include "common.h"

#ifdef INT4Q_X86

#include "avx512_units.h"

/* Scales or zero points of `blocks` blocks of 16 rows, each as [count][16 rows], entry i those of
 * k = i * step; 0 past N and K. */
INLINE TARGET_512 void convert_kind(const int4q_args *a, const void *p, const int64_t kind,
                                    int64_t stride_g, int64_t stride_n, int64_t n0, int blocks,
                                    int64_t step, int64_t count, float *to, int64_t size) {
    const int all_rows = n0 + blocks * ROWS <= a->N, shift = __builtin_ctzll(a->group / step);
    for (int64_t i = 0; i < count; i++)
        for (int b = 0; b < blocks; b++) {
            const int64_t n = n0 + b * ROWS;
            const __mmask16 rows = all_rows ? 0xffff : lanes(a->N - n);
            const __m512 entries = load_params(p, kind, stride_g, stride_n, i >> shift, n,
                                               p && i * step < a->K ? rows : 0);
            _mm512_store_ps(to + b * size + i * ROWS, entries);
        }
}

static TARGET_512 void convert_params(const int4q_args *a, const void *p, int64_t stride_g,
                                      int64_t stride_n, int64_t n0, int blocks, int64_t step,
                                      int64_t count, float *to, int64_t size) {
#define CONVERT(kind) \
    if (a->scale_kind == kind) \
        convert_kind(a, p, kind, stride_g, stride_n, n0, blocks, step, count, to, size)
    CONVERT(KIND_BF16);
    CONVERT(KIND_FP16);
    CONVERT(KIND_FP32);
}

/* Ask for what the next batch of parameters will convert, spread over this block's units: the entries
 * of one g are a few lines, and those of the next lie in another page, so that no prefetcher of the
 * CPU's finds them. */
INLINE TARGET_512 void prefetch_next(const weight_rows *w, int64_t unit, int64_t part,
                                     const int quads) {
    if (part >= (quads ? QUAD : 1)) return;
    const int64_t g = quads ? unit * QUAD + part : unit >> w->unit_shift;
    _mm_prefetch(w->next_scale + g * w->next_scale_stride, _MM_HINT_T1);
    _mm_prefetch(w->next_zero + g * w->next_zero_stride, _MM_HINT_T1);
}

/* Adds units [begin, end) of R rows from `first` on to sums[row][m], 16 partial sums each. */
INLINE TARGET_512 void decode_rows(const weight_rows *w, const turned_x *t, int first,
                                    int64_t begin, int64_t end, __m512 *sums, const int M,
                                    const int R, const int form, const int quads,
                                    const unit_fn decode_unit) {
    __m512 acc[MAX_R * MAX_CHUNK_M];
    const uint8_t *row[MAX_R];
    UNROLL
    for (int r = 0; r < R; r++) row[r] = w->row[first + r];
    UNROLL
    for (int i = 0; i < R * M; i++) acc[i] = sums[first * M + i];
    const uint8_t *x = t->units_x + begin * M * unit_bytes(form);
    const int64_t full = min64(end, w->full_units);
    int64_t unit = begin;
    for (; unit < full; unit++, x += M * unit_bytes(form)) {
        prefetch_next(w, unit, first / R, quads);
        decode_unit(w, row, first, unit, 0xffff, x, acc, M, R, form, quads);
    }
    if (unit < end)
        decode_unit(w, row, first, unit, w->tail_mask, x, acc, M, R, form, quads);
    UNROLL
    for (int i = 0; i < R * M; i++) sums[first * M + i] = acc[i];
}

/* Bytes of turned x that one sweep over the 16 rows uses: half of a first-level cache. */
enum { SWEEP_BYTES = 24 << 10 };

/* sums[row][m] and total[m], 16 rows of the weight: products with q * scale and zero_point. */
INLINE TARGET_512 void decode_block(const weight_rows *w, const turned_x *t, __m512 *sums,
                                     __m512 *total, const int M, const int R, const int form,
                                     const int quads, const unit_fn decode_unit) {
    const int64_t step = SWEEP_BYTES / (M * unit_bytes(form));
    for (int i = 0; i < ROWS * M; i++) sums[i] = _mm512_setzero_ps();
    for (int64_t begin = 0; begin < t->units; begin += step)
        for (int first = 0; first < ROWS; first += R)
            decode_rows(w, t, first, begin, min64(begin + step, t->units), sums, M, R, form,
                        quads, decode_unit);
    __m512 acc[MAX_CHUNK_M];
    UNROLL
    for (int m = 0; m < M; m++) acc[m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < t->groups; g++) {
        const __m512 zero = _mm512_load_ps(w->zeros + g * ROWS);
        UNROLL
        for (int m = 0; m < M; m++) {
            const __m512 sum = _mm512_set1_ps(t->group_sum[m * t->groups + g]);
            acc[m] = _mm512_fmadd_ps(zero, sum, acc[m]);
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) total[m] = acc[m];
}

typedef void (*block_fn)(const weight_rows *, const turned_x *, __m512 *sums, __m512 *total);

#define DEFINE_BLOCK(target, form, unit, M, R, quads)                                          \
    static target void block_##form##_##M##_##quads(const weight_rows *w, const turned_x *t,  \
                                                    __m512 *sums, __m512 *total) {            \
        decode_block(w, t, sums, total, M, R, form, quads, unit);                             \
    }
#define DEFINE_BLOCKS_OF(M, R, quads)                          \
    DEFINE_BLOCK(TARGET_512, X_INT8, limbs_unit, M, R, quads)  \
    DEFINE_BLOCK(TARGET_512, X_INT16, limbs_unit, M, R, quads) \
    DEFINE_BLOCK(TARGET_512, X_INT24, limbs_unit, M, R, quads) \
    DEFINE_BLOCK(TARGET_BF16, X_BF16, bf16_unit, M, R, quads)   \
    DEFINE_BLOCK(TARGET_BF16, X_BF16_EXACT, exact_unit, M, R, quads) \
    DEFINE_BLOCK(TARGET_512, X_FLOAT, float_unit, M, R, quads)
#define DEFINE_BLOCKS(M, R)   \
    DEFINE_BLOCKS_OF(M, R, 0) \
    DEFINE_BLOCKS_OF(M, R, 1)
DEFINE_BLOCKS(1, 4)
DEFINE_BLOCKS(2, 4)
DEFINE_BLOCKS(3, 4)
DEFINE_BLOCKS(4, 2)
DEFINE_BLOCKS(5, 2)
DEFINE_BLOCKS(6, 2)
DEFINE_BLOCKS(7, 2)
DEFINE_BLOCKS(8, 2)

static block_fn choose_block(int64_t M, int form, int quads) {
#define OF_FORM(form, M) {block_##form##_##M##_0, block_##form##_##M##_1}
#define OF_M(M)                                                                          \
    {OF_FORM(X_INT8, M), OF_FORM(X_INT16, M), OF_FORM(X_INT24, M), OF_FORM(X_BF16, M), \
     OF_FORM(X_FLOAT, M), OF_FORM(X_BF16_EXACT, M)}
    static const block_fn table[MAX_CHUNK_M][FORMS][2] = {OF_M(1), OF_M(2), OF_M(3), OF_M(4),
                                                          OF_M(5), OF_M(6), OF_M(7), OF_M(8)};
    return table[M - 1][form - 1][quads];
}

/* Results of 16 rows of the weight: partial sums + zero points + bias. */
INLINE TARGET_512 void finish_block(const int4q_args *a, const turned_x *t, const __m512 *sums,
                                     const __m512 *total, int64_t n0, __mmask16 mask) {
    const __m512 bias = a->bias ? _mm512_maskz_loadu_ps(mask, a->bias + n0) : _mm512_setzero_ps();
    for (int64_t m = 0; m < t->M; m++) {
        float dot[ROWS];
        for (int r = 0; r < ROWS; r++) dot[r] = _mm512_reduce_add_ps(sums[r * t->M + m]);
        const __m512 y = _mm512_add_ps(_mm512_loadu_ps(dot), total[m]);
        const int64_t at = (t->m0 + m) * a->out_stride + n0;
        store_floats(a->out, a->out_kind, at, mask, _mm512_add_ps(y, bias));
    }
}

/* Rows of weights are asked for at least so many bytes ahead, which is a memory's latency. */
enum { PREFETCH_BYTES = 16 << 10 };

/* Line `line` of the entries of each group from row n0 on. */
INLINE void set_next(const int4q_args *a, weight_rows *w, int64_t n0, int64_t line) {
    const int64_t size = a->scale_kind == KIND_FP32 ? 4 : 2, n = n0 + line * 64 / size;
    const int scale = a->scale_stride_n == 1 && n < a->N;
    const int zero = a->zero && a->zero_stride_n == 1 && n < a->N;
    const char *nothing = (const char *)w->row[0];
    w->next_scale = scale ? (const char *)a->scale + n * size : nothing;
    w->next_zero = zero ? (const char *)a->zero + n * size : nothing;
    w->next_scale_stride = scale ? a->scale_stride_g * size : 0;
    w->next_zero_stride = zero ? a->zero_stride_g * size : 0;
}

INLINE TARGET_512 __m512i twice(__m256i half) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
}

/* A block meets one chunk of x after the other while its weights are in cache. */
static TARGET_512 void decode_blocks(const int4q_args *a, const all_x *x, range blocks,
                                      const block_params *params) {
    const int quads = a->group < UNIT_K;
    const int64_t groups = x->whole.groups, step = quads ? UNIT_K / QUAD : a->group;
    const int64_t steps = quads ? x->whole.units * QUAD : groups;
    weight_rows w = {.full_units = a->K / UNIT_K,
                     .tail_mask = lanes(a->K % UNIT_K / 8),
                     .unit_shift = a->group > UNIT_K,
                     .prefetch = ceil_div(PREFETCH_BYTES, 4 * a->q_stride) * 4 * a->q_stride,
                     .q = q_of_nibbles(a->offset_binary),
                     .q_bf16 = twice(float_to_bf16(q_of_nibbles(a->offset_binary))),
                     .flip = a->offset_binary ? 0 : (char)0x88};
    for (int64_t block = blocks.begin; block < blocks.end; block++) {
        const int64_t n0 = block * ROWS;
        const int64_t at = (block - blocks.begin) % params->blocks;
        if (at == 0) {
            const int count = (int)min64(params->blocks, blocks.end - block);
            convert_params(a, a->scale, a->scale_stride_g, a->scale_stride_n, n0, count, step,
                           steps, params->scale, params->scale_size);
            convert_params(a, a->zero, a->zero_stride_g, a->zero_stride_n, n0, count, a->group,
                           groups, params->zero, params->zero_size);
        }
        set_next(a, &w, n0 + (params->blocks - at) * ROWS, at);
        w.scales = params->scale + at * params->scale_size;
        w.zeros = params->zero + at * params->zero_size;
        for (int r = 0; r < ROWS; r++)
            w.row[r] = a->qdata + min64(n0 + r, a->N - 1) * a->q_stride;
        for (int64_t chunk = 0; chunk < x->chunks; chunk++) {
            const turned_x t = chunk_of(x, chunk);
            __m512 sums[ROWS * MAX_CHUNK_M], total[MAX_CHUNK_M];
            choose_block(t.M, t.form, quads)(&w, &t, sums, total);
            finish_block(a, &t, sums, total, n0, lanes(a->N - n0));
        }
    }
}

const kernels_of avx512_kernels = {FEATURE_AVX512, avx512_has_outlier, avx512_turn_span,
                                   decode_blocks, avx512_dequant_rows, avx512_search_rows};

#endif
