/* Decode with AVX-512 (VNNI), the inner loops: a unit of some rows of the weight and of x. */
#ifndef INT4Q_AVX512_UNITS_H
#define INT4Q_AVX512_UNITS_H

#include "avx512.h"

typedef struct {
    const uint8_t *row[ROWS]; /* past N: the last row again */
    const float *scales; /* [K / step][16 rows]; a step is 32 (quads) or a group */
    const float *zeros;  /* [G][16 rows] */
    int64_t full_units;  /* of these 64 bytes may be read */
    __mmask16 tail_mask; /* dwords of the last, shorter unit */
    int unit_shift;      /* log2 of the units in a group */
    int64_t prefetch;    /* from a byte to the one that is needed some rows later */
    const char *next_scale, *next_zero; /* a line of each group's in the next batch, or of nothing */
    int64_t next_scale_stride, next_zero_stride; /* bytes from group to group */
    __m512 q;            /* of each nibble */
    __m512i q_bf16;      /* likewise, twice */
    char flip; /* what turns a byte of nibbles into offset binary */
} weight_rows;

/* "Quads": a scale for each 32 k of a unit, since groups are shorter than that. */
enum { QUAD = 4 };

/* The scales of R rows from `first` on, each for the lanes of its k. */
INLINE TARGET_512 void row_scales(const weight_rows *w, const int quads, int64_t unit, int first,
                                  const int R, __m512 *scale) {
    if (!quads) {
        const float *of_group = w->scales + (unit >> w->unit_shift) * ROWS + first;
        UNROLL
        for (int r = 0; r < R; r++) scale[r] = _mm512_set1_ps(of_group[r]);
        return;
    }
    /* Entry r + i * ROWS: the i-th 32 k of row r. (The last reads may end in the zero points.) */
    const float *four = w->scales + unit * QUAD * ROWS + first;
    __m512 rows = _mm512_castps128_ps512(_mm_loadu_ps(four));
    rows = _mm512_insertf32x4(rows, _mm_loadu_ps(four + ROWS), 1);
    rows = _mm512_insertf32x4(rows, _mm_loadu_ps(four + 2 * ROWS), 2);
    rows = _mm512_insertf32x4(rows, _mm_loadu_ps(four + 3 * ROWS), 3);
    scale[0] = _mm512_permute_ps(rows, 0x00);
    if (R > 1) scale[1] = _mm512_permute_ps(rows, 0x55);
    if (R > 2) scale[2] = _mm512_permute_ps(rows, 0xaa);
    if (R > 3) scale[3] = _mm512_permute_ps(rows, 0xff);
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
        _mm_prefetch((const char *)at + w->prefetch, _MM_HINT_T1);
    }
    row_scales(w, quads, unit, first, R, scale);
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
        for (int r = 0; r < R; r++)
            acc[r * M + m] =
                _mm512_fmadd_ps(dot_unit(even[r], odd[r], x + m * unit_bytes(form), form),
                                scale[r], acc[r * M + m]);
}

/* The scales of a row's unit: the first of `quads ? QUAD : 1`, ROWS apart. */
INLINE const float *scales_of_row(const weight_rows *w, const int quads, int64_t unit, int row) {
    return w->scales + (quads ? unit * QUAD : unit >> w->unit_shift) * ROWS + row;
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
        _mm_prefetch((const char *)at + w->prefetch, _MM_HINT_T1);
        for (int i = 0; i < (quads ? QUAD : 1); i++)
            value[i] = _mm512_mul_ps(w->q, _mm512_set1_ps(scale[i * ROWS]));
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
    __m512 scale[MAX_R];
    row_scales(w, quads, unit, first, R, scale);
    UNROLL
    for (int r = 0; r < R; r++) {
        const uint8_t *at = row[r] + unit * 64;
        const __m512i nibbles = _mm512_maskz_loadu_epi32(mask, at);
        __m512i weight[4];
        _mm_prefetch((const char *)at + w->prefetch, _MM_HINT_T1);
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
            acc[r * M + m] = _mm512_fmadd_ps(sum, scale[r], acc[r * M + m]);
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
        _mm_prefetch((const char *)at + w->prefetch, _MM_HINT_T1);
        for (int i = 0; i < (quads ? QUAD : 1); i++)
            table[i] = through_bf16(_mm512_mul_ps(w->q, _mm512_set1_ps(scale[i * ROWS])));
        for (int j = 0; j < 8; j++, nibbles = _mm512_srli_epi32(nibbles, 4)) {
            __m512 weight = _mm512_permutexvar_ps(nibbles, table[0]);
            for (int i = 1; i < (quads ? QUAD : 1); i++)
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

#endif
