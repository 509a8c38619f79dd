/* Decode with AVX-512 (VNNI), step 2: 16 rows of the weight at a time. */
#include "common.h"

#ifdef INT4Q_X86

#include "avx512.h"

/* Scales of a block. Groups of 128 and more: [G][16 rows], one value for a register of weights.
 * Smaller ones ("quads"): [unit][slot of the row][4], a value for each 32 k of a unit. */

INLINE TARGET_512 void zeros_by_group(const int4q_args *a, int64_t n0, int blocks,
                                       int64_t groups, const block_params *to) {
    for (int64_t g = 0; g < groups; g++)
        for (int b = 0; b < blocks; b++) {
            const int64_t n = n0 + b * ROWS;
            _mm512_store_ps(to->zero + b * to->zero_size + g * ROWS,
                            load_zero(a, g, n, lanes(a->N - n)));
        }
}

INLINE TARGET_512 void scales_by_group(const int4q_args *a, int64_t n0, int blocks,
                                        int64_t groups, const block_params *to) {
    for (int64_t g = 0; g < groups; g++)
        for (int b = 0; b < blocks; b++) {
            const int64_t n = n0 + b * ROWS;
            _mm512_store_ps(to->scale + b * to->scale_size + g * ROWS,
                            load_scale(a, g, n, lanes(a->N - n)));
        }
}

INLINE TARGET_512 void scales_by_quad(const int4q_args *a, int64_t n0, int blocks,
                                       int64_t units, const block_params *to) {
    for (int64_t unit = 0; unit < units; unit++) {
        __m512 r[MAX_BLOCKS][4];
        for (int i = 0; i < 4; i++) {
            const int64_t k = unit * UNIT_K + i * 32;
            for (int b = 0; b < blocks; b++) {
                const int64_t n = n0 + b * ROWS;
                const __mmask16 mask = k < a->K ? lanes(a->N - n) : 0;
                r[b][i] = load_scale(a, k < a->K ? k / a->group : 0, n, mask);
            }
        }
        for (int b = 0; b < blocks; b++)
            store_quads(r[b], to->scale + b * to->scale_size + unit * ROWS * 4);
    }
}

INLINE TARGET_512 __m512 row_scale(const float *scales, int quads, int64_t unit, int row,
                                    int unit_shift) {
    if (!quads) return _mm512_set1_ps(scales[(unit >> unit_shift) * ROWS + row]);
    const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m128 four = _mm_load_ps(scales + (unit * ROWS + row_slot(row)) * 4);
    return _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(four));
}

/* Sum over one unit of u * v - 8 * v = q * v for one row of x, exact, times d. */
INLINE TARGET_512 __m512 dot_unit(__m512i even, __m512i odd, const uint8_t *x, int limbs) {
    const __m512i *limb = (const __m512i *)x;
    const __m512i *offset = limb + 2 * limbs;
    __m512i l0 = _mm512_dpbusd_epi32(_mm512_load_si512(offset), even, _mm512_load_si512(limb));
    l0 = _mm512_dpbusd_epi32(l0, odd, _mm512_load_si512(limb + 1));
    if (limbs == X_INT8)
        return _mm512_mul_ps(_mm512_cvtepi32_ps(l0), _mm512_load_ps((const float *)(offset + 1)));
    __m512i l1 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_load_si512(limb + 2));
    l1 = _mm512_dpbusd_epi32(l1, odd, _mm512_load_si512(limb + 3));
    __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(l1, 8), l0));
    if (limbs == X_INT24) {
        __m512i l2 =
            _mm512_dpbusd_epi32(_mm512_load_si512(offset + 1), even, _mm512_load_si512(limb + 4));
        l2 = _mm512_dpbusd_epi32(l2, odd, _mm512_load_si512(limb + 5));
        dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(l2), _mm512_set1_ps(65536.0f), dot);
    }
    return _mm512_mul_ps(dot, _mm512_load_ps((const float *)(offset + limbs - 1)));
}

/* u = q + 8 of the even and the odd k in 64 bytes; flip is 0x88 a byte for signed nibbles. */
INLINE TARGET_512 void unpack_unsigned(__m512i w, __m512i flip, __m512i *even, __m512i *odd) {
    const __m512i low = _mm512_set1_epi8(0x0f);
    enum { XOR_THEN_AND = 0x28 };
    *even = _mm512_ternarylogic_epi32(w, flip, low, XOR_THEN_AND);
    *odd = _mm512_ternarylogic_epi32(_mm512_srli_epi16(w, 4), flip, low, XOR_THEN_AND);
}

typedef struct {
    const uint8_t *row[ROWS]; /* past N: the last row again */
    const float *scales, *zeros;
    int64_t full_units;  /* of these 64 bytes may be read */
    __mmask16 tail_mask; /* dwords of the last, shorter unit */
    int unit_shift;      /* log2 of the units in a group */
    int64_t prefetch;    /* from a byte to the one that is needed some rows later */
    __m512 q;            /* of each nibble */
    __m512i q_bf16;      /* likewise, twice */
    char flip; /* what turns a byte of nibbles into offset binary */
} weight_rows;

/* acc[row][m] += one unit of R rows from `first` on; x in one form. */
typedef void (*unit_fn)(const weight_rows *w, const uint8_t *const row[], int first, int64_t unit,
                        __mmask16 mask, const uint8_t *x, __m512 *acc, const int M, const int R,
                        const int form, const int quads);

INLINE TARGET_512 void limbs_unit(const weight_rows *w, const uint8_t *const row[], int first,
                                   int64_t unit, __mmask16 mask, const uint8_t *x, __m512 *acc,
                                   const int M, const int R, const int form, const int quads) {
    __m512i even[MAX_R], odd[MAX_R];
    __m512 scale[MAX_R];
    const __m512i flip = _mm512_set1_epi8(w->flip);
    UNROLL
    for (int r = 0; r < R; r++) {
        const uint8_t *at = row[r] + unit * 64;
        unpack_unsigned(_mm512_maskz_loadu_epi32(mask, at), flip, &even[r], &odd[r]);
        _mm_prefetch((const char *)at + w->prefetch, _MM_HINT_T0);
        scale[r] = row_scale(w->scales, quads, unit, first + r, w->unit_shift);
    }
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
        for (int r = 0; r < R; r++)
            acc[r * M + m] =
                _mm512_fmadd_ps(dot_unit(even[r], odd[r], x + m * unit_bytes(form), form),
                                scale[r], acc[r * M + m]);
}

INLINE const float *scales_of_row(const weight_rows *w, const int quads, int64_t unit, int row) {
    if (quads) return w->scales + (unit * ROWS + row_slot(row)) * 4;
    return w->scales + (unit >> w->unit_shift) * ROWS + row;
}

/* The bf16 values of the nibbles that `shift` brings to the bottom of each word. vpermw looks at 5
 * bits of an index and vpermt2w at 6: with one scale a unit the fifth is some other nibble's and the
 * table holds its 16 entries twice, with four they say which 32 k the word is in. */
INLINE TARGET_BF16 __m512i look_up_bf16(__m512i shifted, const __m512i table[2],
                                        const int quads) {
    if (!quads) return _mm512_permutexvar_epi16(shifted, table[0]);
    const __m512i low = _mm512_set1_epi16(0x0f);
    const __m512i quad = _mm512_set_epi64(
        0x0030003000300030, 0x0030003000300030, 0x0020002000200020, 0x0020002000200020,
        0x0010001000100010, 0x0010001000100010, 0, 0);
    enum { AND_THEN_OR = 0xea };
    const __m512i index = _mm512_ternarylogic_epi32(shifted, low, quad, AND_THEN_OR);
    return _mm512_permutex2var_epi16(table[0], index, table[1]);
}

INLINE TARGET_BF16 void bf16_unit(const weight_rows *w, const uint8_t *const row[], int first,
                                  int64_t unit, __mmask16 mask, const uint8_t *x, __m512 *acc,
                                  const int M, const int R, const int form, const int quads) {
    UNROLL
    for (int r = 0; r < R; r++) {
        const uint8_t *at = row[r] + unit * 64;
        const float *scale = scales_of_row(w, quads, unit, first + r);
        const __m512i nibbles = _mm512_maskz_loadu_epi32(mask, at);
        __m512 value[4]; /* of each nibble, with each of the unit's scales */
        __m512i table[2], weight[4];
        _mm_prefetch((const char *)at + w->prefetch, _MM_HINT_T0);
        for (int i = 0; i < (quads ? 4 : 1); i++)
            value[i] = _mm512_mul_ps(w->q, _mm512_set1_ps(scale[i]));
        table[0] = (__m512i)_mm512_cvtne2ps_pbh(value[quads ? 1 : 0], value[0]);
        table[1] = quads ? (__m512i)_mm512_cvtne2ps_pbh(value[3], value[2]) : table[0];
        weight[0] = look_up_bf16(nibbles, table, quads);
        weight[1] = look_up_bf16(_mm512_srli_epi16(nibbles, 4), table, quads);
        weight[2] = look_up_bf16(_mm512_srli_epi16(nibbles, 8), table, quads);
        weight[3] = look_up_bf16(_mm512_srli_epi16(nibbles, 12), table, quads);
        UNROLL
        for (int m = 0; m < M; m++) {
            const __m512i *from = (const __m512i *)(x + m * unit_bytes(form));
            __m512bh x_row[4];
            UNROLL
            for (int j = 0; j < 4; j++) x_row[j] = (__m512bh)_mm512_load_si512(from + j);
            __m512 sum = acc[r * M + m];
            sum = _mm512_dpbf16_ps(sum, (__m512bh)weight[0], x_row[0]);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)weight[1], x_row[1]);
            /* One row of x has too few sums to hide the latency of a chain of four. */
            __m512 rest = M == 1 ? _mm512_setzero_ps() : sum;
            rest = _mm512_dpbf16_ps(rest, (__m512bh)weight[2], x_row[2]);
            rest = _mm512_dpbf16_ps(rest, (__m512bh)weight[3], x_row[3]);
            acc[r * M + m] = M == 1 ? _mm512_add_ps(sum, rest) : rest;
        }
    }
}

/* Weights as they are: q is a bf16, and its products with one are exact in float. A unit's sum meets
 * its scale, so that each m takes one instruction more than in bf16_unit, and each row no tables. */
INLINE TARGET_BF16 void exact_unit(const weight_rows *w, const uint8_t *const row[], int first,
                                   int64_t unit, __mmask16 mask, const uint8_t *x, __m512 *acc,
                                   const int M, const int R, const int form, const int quads) {
    UNROLL
    for (int r = 0; r < R; r++) {
        const uint8_t *at = row[r] + unit * 64;
        const __m512i nibbles = _mm512_maskz_loadu_epi32(mask, at);
        const __m512 scale = row_scale(w->scales, quads, unit, first + r, w->unit_shift);
        __m512i weight[4];
        _mm_prefetch((const char *)at + w->prefetch, _MM_HINT_T0);
        UNROLL
        for (int j = 0; j < 4; j++)
            weight[j] = 
                _mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 4 * j), w->q_bf16);
        UNROLL
        for (int m = 0; m < M; m++) {
            const __m512i *from = (const __m512i *)(x + m * unit_bytes(form));
            __m512 sum = _mm512_setzero_ps();
            UNROLL
            for (int j = 0; j < 4; j++)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)weight[j],
                                       (__m512bh)_mm512_load_si512(from + j));
            acc[r * M + m] = _mm512_fmadd_ps(sum, scale, acc[r * M + m]);
        }
    }
}

/* Rounded to bf16, still float. */
INLINE TARGET_512 __m512 through_bf16(__m512 f) { return bf16_to_float(float_to_bf16(f)); }

/* bf16_unit for a CPU without bf16 products. vpermps looks at 4 bits of an index: four scales a unit
 * are four tables, each for its lanes. */
INLINE TARGET_512 void float_unit(const weight_rows *w, const uint8_t *const row[], int first,
                                   int64_t unit, __mmask16 mask, const uint8_t *x, __m512 *acc,
                                   const int M, const int R, const int form, const int quads) {
    for (int r = 0; r < R; r++) {
        const uint8_t *at = row[r] + unit * 64;
        const float *scale = scales_of_row(w, quads, unit, first + r);
        __m512i nibbles = _mm512_maskz_loadu_epi32(mask, at);
        __m512 table[4];
        _mm_prefetch((const char *)at + w->prefetch, _MM_HINT_T0);
        for (int i = 0; i < (quads ? 4 : 1); i++)
            table[i] = through_bf16(_mm512_mul_ps(w->q, _mm512_set1_ps(scale[i])));
        for (int j = 0; j < 8; j++, nibbles = _mm512_srli_epi32(nibbles, 4)) {
            __m512 weight = _mm512_permutexvar_ps(nibbles, table[0]);
            for (int i = 1; i < (quads ? 4 : 1); i++)
                weight = _mm512_mask_permutexvar_ps(weight, (__mmask16)(0xf << 4 * i), nibbles,
                                                    table[i]);
            UNROLL
            for (int m = 0; m < M; m++) {
                const float *to = (const float *)(x + m * unit_bytes(form)) + j * 16;
                acc[r * M + m] = _mm512_fmadd_ps(weight, _mm512_load_ps(to), acc[r * M + m]);
            }
        }
    }
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
    for (; unit < full; unit++, x += M * unit_bytes(form))
        decode_unit(w, row, first, unit, 0xffff, x, acc, M, R, form, quads);
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

INLINE TARGET_512 __m512i twice(__m256i half) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
}

/* A block meets one chunk of x after the other while its weights are in cache. */
static TARGET_512 void decode_blocks(const int4q_args *a, const all_x *x, range blocks,
                                      const block_params *params) {
    const int quads = a->group < UNIT_K;
    const int64_t units = x->whole.units, groups = x->whole.groups;
    weight_rows w = {.full_units = a->K / UNIT_K,
                     .tail_mask = lanes(a->K % UNIT_K / 8),
                     .unit_shift = a->group > UNIT_K,
                     .prefetch = 4 * a->q_stride,
                     .q = q_of_nibbles(a->offset_binary),
                     .q_bf16 = twice(float_to_bf16(q_of_nibbles(a->offset_binary))),
                     .flip = a->offset_binary ? 0 : (char)0x88};
    for (int64_t block = blocks.begin; block < blocks.end; block++) {
        const int64_t n0 = block * ROWS;
        const int64_t at = (block - blocks.begin) % params->blocks;
        if (at == 0) {
            const int count = (int)min64(params->blocks, blocks.end - block);
            if (quads)
                scales_by_quad(a, n0, count, units, params);
            else
                scales_by_group(a, n0, count, groups, params);
            zeros_by_group(a, n0, count, groups, params);
        }
        prefetch_params(a, params, n0 + (params->blocks - at) * ROWS, at);
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
                                   decode_blocks, avx512_dequant_rows};

#endif
