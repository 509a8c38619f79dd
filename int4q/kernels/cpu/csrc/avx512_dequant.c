/* Dequantisation with AVX-512: a nibble indexes a table of its 16 values, made once for each (row,
 * group). */
#include "common.h"

#ifdef INT4Q_X86

#include "avx512.h"

/* scale and zero_point of 16 rows, groups [g0, g0 + count), as float [count][16 rows]. */
INLINE TARGET_512 void params_of_rows(const int4q_args *a, int64_t n0, int64_t g0, int64_t count,
                                       float *scale, float *zero) {
    const __mmask16 mask = lanes(a->N - n0);
    for (int64_t g = 0; g < count; g++) {
        _mm512_store_ps(scale + g * ROWS, load_scale(a, g0 + g, n0, mask));
        _mm512_store_ps(zero + g * ROWS, load_zero(a, g0 + g, n0, mask));
    }
}

/* Entry i: the value of nibble i, q * scale + zero_point, the product rounded before the sum as in
 * the reference (the rounding variant keeps compilers from fusing the two). */
INLINE TARGET_512 __m512 value_table(float scale, float zero, int64_t offset_binary) {
    const __m512 q = q_of_nibbles(offset_binary);
    return _mm512_add_ps(_mm512_mul_round_ps(q, _mm512_set1_ps(scale), NEAREST),
                         _mm512_set1_ps(zero));
}

/* 16 bytes -> 32 table entries in the order of k. vpermw looks at 5 bits of each index; the fifth
 * is some other nibble's, so the table holds its 16 halves twice. */
INLINE TARGET_512 __m512i expand_halves(const uint8_t *w, __m512i table) {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)w));
    const __m512i index = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 12));
    return _mm512_permutexvar_epi16(index, table);
}

/* 8 bytes -> 16 table entries in the order of k; vpermps looks at 4 bits of each index. */
INLINE TARGET_512 __m512 expand_floats(const uint8_t *w, __m512 table) {
    const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)w));
    const __m512i index = _mm512_or_si512(byte, _mm512_slli_epi64(byte, 28));
    return _mm512_permutexvar_ps(index, table);
}

/* One group of one row. */
INLINE TARGET_512 void dequant_group(const uint8_t *w, __m512 table, int64_t group, int64_t kind,
                                      void *out, int64_t at) {
    if (kind == KIND_FP32) {
        for (int64_t k = 0; k < group; k += 16)
            _mm512_storeu_ps((float *)out + at + k, expand_floats(w + k / 2, table));
        return;
    }
    const __m512i halves = _mm512_broadcast_i64x4(to_half(table, kind));
    for (int64_t k = 0; k < group; k += 32)
        _mm512_storeu_si512((uint16_t *)out + at + k, expand_halves(w + k / 2, halves));
}

enum { PARAM_GROUPS = 64 }; /* groups whose parameters are converted at a time */

TARGET_512 void avx512_dequant_rows(const int4q_args *a, int64_t n0) {
    const int64_t groups = a->K / a->group, rows = min64(ROWS, a->N - n0);
    __attribute__((aligned(64))) float scale[PARAM_GROUPS * ROWS], zero[PARAM_GROUPS * ROWS];
    for (int64_t g0 = 0; g0 < groups; g0 += PARAM_GROUPS) {
        const int64_t count = min64(PARAM_GROUPS, groups - g0);
        params_of_rows(a, n0, g0, count, scale, zero);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = 0; g < count; g++) {
                const int64_t k = (g0 + g) * a->group;
                dequant_group(a->qdata + (n0 + r) * a->q_stride + k / 2,
                              value_table(scale[g * ROWS + r], zero[g * ROWS + r],
                                          a->offset_binary),
                              a->group, a->out_kind, a->out, (n0 + r) * a->out_stride + k);
            }
    }
}

#endif
