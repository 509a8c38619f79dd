/* AVX-512: loads, stores and parameters, for the files of its kernels. */
#ifndef INT4Q_AVX512_H
#define INT4Q_AVX512_H

#include <immintrin.h>

#include "common.h"

#define TARGET_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,fma")))
#define TARGET_BF16 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,fma")))
#define TARGET_AMX \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,fma,amx-tile,amx-bf16")))
/* The parts of avx512_kernels that lie in other files than its decode_blocks. */
int avx512_has_outlier(const int4q_args *a, int64_t m, float bits);
void avx512_turn_span(const int4q_args *a, const turned_x *t, int64_t m, int64_t span);
void avx512_dequant_rows(const int4q_args *a, int64_t n0);
void avx512_search_rows(const int4q_search_args *a, int64_t r0);

#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

INLINE TARGET_512 __m512 bf16_to_float(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* Round to nearest even; a NaN keeps its upper bits and stays quiet. */
INLINE TARGET_512 __m256i float_to_bf16(__m512 f) {
    const __m512i bits = _mm512_castps_si512(f);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16));
}

/* Elements [i, i + 16) of p, those in the mask, as float. */
INLINE TARGET_512 __m512 load_floats(const void *p, int64_t kind, int64_t i, __mmask16 mask) {
    if (kind == KIND_FP32) return _mm512_maskz_loadu_ps(mask, (const float *)p + i);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)p + i);
    return kind == KIND_BF16 ? bf16_to_float(half) : _mm512_cvtph_ps(half);
}

INLINE TARGET_512 __m256i to_half(__m512 f, int64_t kind) {
    return kind == KIND_BF16 ? float_to_bf16(f)
                             : _mm512_cvtps_ph(f, NEAREST);
}

INLINE TARGET_512 void store_floats(void *p, int64_t kind, int64_t i, __mmask16 mask, __m512 f) {
    if (kind == KIND_FP32)
        _mm512_mask_storeu_ps((float *)p + i, mask, f);
    else
        _mm256_mask_storeu_epi16((uint16_t *)p + i, mask, to_half(f, kind));
}

/* Mask of the valid lanes when `count` elements are left. */
INLINE __mmask16 lanes(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* Entry [g, n0 .. n0 + 15] of scale or zero_point as float; lanes past N are 0. */
INLINE TARGET_512 __m512 load_params(const void *p, int64_t kind, int64_t stride_g,
                                      int64_t stride_n, int64_t g, int64_t n0, __mmask16 mask) {
    const int64_t first = g * stride_g + n0 * stride_n;
    if (stride_n == 1) return load_floats(p, kind, first, mask);
    union {
        uint32_t word[16];
        uint16_t half[16];
    } row = {{0}}; /* strided: bring the 16 elements together, then convert */
    for (int i = 0; i < 16 && (mask >> i); i++) {
        const int64_t at = first + i * stride_n;
        if (kind == KIND_FP32)
            row.word[i] = ((const uint32_t *)p)[at];
        else
            row.half[i] = ((const uint16_t *)p)[at];
    }
    return load_floats(&row, kind, 0, 0xffff);
}

INLINE TARGET_512 __m512 load_scale(const int4q_args *a, int64_t g, int64_t n0, __mmask16 mask) {
    return load_params(a->scale, a->scale_kind, a->scale_stride_g, a->scale_stride_n, g, n0, mask);
}

INLINE TARGET_512 __m512 load_zero(const int4q_args *a, int64_t g, int64_t n0, __mmask16 mask) {
    if (!a->zero) return _mm512_setzero_ps();
    return load_params(a->zero, a->scale_kind, a->zero_stride_g, a->zero_stride_n, g, n0, mask);
}

/* Entry i: q of nibble i. */
INLINE TARGET_512 __m512 q_of_nibbles(int64_t offset_binary) {
    const __m512 halves = _mm512_set_ps(-1, -2, -3, -4, -5, -6, -7, -8, 7, 6, 5, 4, 3, 2, 1, 0);
    return offset_binary ? _mm512_shuffle_f32x4(halves, halves, 0x4e) : halves;
}

#endif
