/* Decode with AVX-512, step 1: x in the order and the numbers of the products. */
#include "common.h"

#ifdef INT4Q_X86

#include "avx512.h"

INLINE TARGET_512 __m512i max_of_four(__m512i v) {
    v = _mm512_max_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
    return _mm512_max_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
}

INLINE TARGET_512 __m512i sum_of_four(__m512i v) {
    v = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
    return _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
}

/* Lanes 0, 4, 8, 12. */
INLINE TARGET_512 __m128i every_fourth(__m512i v) {
    return _mm512_castsi512_si128(_mm512_maskz_compress_epi32(0x1111, v));
}

INLINE TARGET_512 __m512i block_exponent(__m512i amax_bits, int bits) {
    const __m512i field =
        _mm512_srli_epi32(_mm512_add_epi32(amax_bits, _mm512_set1_epi32(FIELD_CARRY)), 23);
    return _mm512_sub_epi32(_mm512_max_epi32(field, _mm512_set1_epi32(bits)),
                            _mm512_set1_epi32(bits - 1));
}

/* The lanes whose largest |x| fixed point does not hold. */
INLINE TARGET_512 __mmask16 beyond_range(__m512i amax_bits) {
    return _mm512_cmpge_epi32_mask(amax_bits, _mm512_set1_epi32(FIELD_BEYOND << 23));
}

/* 8 k in each four lanes: their power of two d, and v. */
INLINE TARGET_512 __m512 to_fixed_point(__m512 even, __m512 odd, __m512i amax, int bits,
                                         __m512i *v_even, __m512i *v_odd) {
    const __m512i field = block_exponent(amax, bits);
    const __m512 inverse = _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(254), field), 23));
    const __mmask16 bad = beyond_range(amax);
    *v_even = _mm512_maskz_cvtps_epi32((__mmask16)~bad, _mm512_mul_ps(even, inverse));
    *v_odd = _mm512_maskz_cvtps_epi32((__mmask16)~bad, _mm512_mul_ps(odd, inverse));
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi32(_mm512_slli_epi32(field, 23), bad, _mm512_set1_epi32(0x7fc00000)));
}

/* All 32 k: d = amax / 127 and v = x / d, to nearest even; where d rounds to 0 all v are 0. */
INLINE TARGET_512 __m512 to_int8(__m512 even, __m512 odd, __m512i amax, __m512i *v_even,
                                  __m512i *v_odd) {
    const __m512 limit = _mm512_set1_ps(127.0f), minus_limit = _mm512_set1_ps(-127.0f);
    const __m512i largest = _mm512_set1_epi32(_mm512_reduce_max_epi32(amax));
    const __mmask16 bad = beyond_range(largest);
    const __m512 d = _mm512_div_ps(_mm512_castsi512_ps(largest), limit);
    const __mmask16 live = (__mmask16)~bad & _mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 to_even = _mm512_maskz_div_ps(live, even, d);
    const __m512 to_odd = _mm512_maskz_div_ps(live, odd, d);
    *v_even = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(to_even, minus_limit), limit));
    *v_odd = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(to_odd, minus_limit), limit));
    return _mm512_mask_mov_ps(d, bad, _mm512_set1_ps(__builtin_nanf("")));
}

/* 32 k of x (even and odd ones) -> 16 byte of each limb, 4 lanes of offset and d. Their sum: of int8
 * activations, which have another one than x, v * d; NaN where they are out of range. */
INLINE TARGET_512 float turn_limbs(__m512 even, __m512 odd, int limbs, uint8_t *unit, int chunk) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i abs_even = _mm512_and_si512(_mm512_castps_si512(even), magnitude);
    const __m512i abs_odd = _mm512_and_si512(_mm512_castps_si512(odd), magnitude);
    const __m512i amax = max_of_four(_mm512_max_epi32(abs_even, abs_odd));
    __m512i v_even, v_odd;
    const __m512 d = limbs == X_INT8
                         ? to_int8(even, odd, amax, &v_even, &v_odd)
                         : to_fixed_point(even, odd, amax, limbs == 2 ? 15 : 23, &v_even, &v_odd);
    const __m512i half = _mm512_set1_epi32(128);
    const __m512i all = _mm512_add_epi32(v_even, v_odd);
    __m512i low = _mm512_setzero_si512(), sum = all;
    for (int l = 0; l < limbs; l++) {
        uint8_t *to = unit + l * 128 + chunk * 16;
        if (l == 2) { /* what limbs 0 and 1 hold is v - limb2 * 2^16 */
            const __m512i top = _mm512_add_epi32(v_even, v_odd);
            low = _mm512_sub_epi32(sum, _mm512_slli_epi32(top, 16));
            sum = top;
        }
        _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(v_even));
        _mm_storeu_si128((__m128i *)(to + 64), _mm512_cvtepi32_epi8(v_odd));
        v_even = _mm512_srai_epi32(_mm512_add_epi32(v_even, half), 8);
        v_odd = _mm512_srai_epi32(_mm512_add_epi32(v_odd, half), 8);
    }
    const __m512i minus8 = _mm512_set1_epi32(-8);
    __m128i *offset = (__m128i *)(unit + limbs * 128 + chunk * 16);
    if (limbs == 3) {
        _mm_storeu_si128(offset, every_fourth(_mm512_mullo_epi32(sum_of_four(low), minus8)));
        offset += 4;
    }
    _mm_storeu_si128(offset, every_fourth(_mm512_mullo_epi32(sum_of_four(sum), minus8)));
    _mm_storeu_si128(offset + 4, every_fourth(_mm512_castps_si512(d)));
    if (_mm512_cmp_ps_mask(d, d, _CMP_UNORD_Q)) return __builtin_nanf("");
    if (limbs == X_INT8) return (float)_mm512_reduce_add_epi32(all) * _mm512_cvtss_f32(d);
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

/* The four 16-byte lanes of v to 64-byte rows first .. first + 3 of a unit. */
INLINE TARGET_512 void store_lanes(__m512i v, uint8_t *unit, int first, int chunk) {
    __m128i *to = (__m128i *)(unit + first * 64 + chunk * 16);
    _mm_storeu_si128(to, _mm512_castsi512_si128(v));
    _mm_storeu_si128(to + 4, _mm512_extracti32x4_epi32(v, 1));
    _mm_storeu_si128(to + 8, _mm512_extracti32x4_epi32(v, 2));
    _mm_storeu_si128(to + 12, _mm512_extracti32x4_epi32(v, 3));
}

/* 32 k of bf16 -> 8 words of each of the four rows. */
INLINE TARGET_512 void turn_bf16(__m512i x, uint8_t *unit, int chunk) {
    const __m512i fours = _mm512_broadcast_i32x4(
        _mm_set_epi16(28, 24, 20, 16, 12, 8, 4, 0));
    const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i index =
        _mm512_add_epi16(fours, _mm512_or_si512(lane, _mm512_slli_epi32(lane, 16)));
    store_lanes(_mm512_permutexvar_epi16(index, x), unit, 0, chunk);
}

/* 32 k of float -> 4 lanes of each of the eight rows. */
INLINE TARGET_512 void turn_floats(__m512 lo, __m512 hi, uint8_t *unit, int chunk) {
    const __m512i index =
        _mm512_set_epi32(27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
    const __m512i upper = _mm512_add_epi32(index, _mm512_set1_epi32(4));
    store_lanes(_mm512_castps_si512(_mm512_permutex2var_ps(lo, index, hi)), unit, 0, chunk);
    store_lanes(_mm512_castps_si512(_mm512_permutex2var_ps(lo, upper, hi)), unit, 4, chunk);
}

/* NaN where the sum q * x of a lane could leave the range of float, or x does. */
INLINE TARGET_512 float sum_in_range(__m512 lo, __m512 hi) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i bits_lo = _mm512_and_si512(_mm512_castps_si512(lo), magnitude);
    const __m512i bits_hi = _mm512_and_si512(_mm512_castps_si512(hi), magnitude);
    if (beyond_range(_mm512_max_epi32(bits_lo, bits_hi))) return __builtin_nanf("");
    return _mm512_reduce_add_ps(_mm512_add_ps(lo, hi));
}

/* 32 k of a row of x from element `at` on, those in the mask; their sum. */
INLINE TARGET_512 float turn_chunk(const int4q_args *a, int form, int64_t at, __mmask16 mask,
                                    uint8_t *unit, int chunk) {
    const __m512i even_index = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4,
                                                2, 0);
    const __m512i odd_index = _mm512_add_epi32(even_index, _mm512_set1_epi32(1));
    const __m512 lo = load_floats(a->x, a->x_kind, at, mask);
    const __m512 hi = load_floats(a->x, a->x_kind, at + (mask ? 16 : 0), mask);
    if (form == X_BF16 || form == X_BF16_EXACT) {
        const uint16_t *x = (const uint16_t *)a->x + at;
        turn_bf16(mask ? _mm512_loadu_si512(x) : _mm512_setzero_si512(), unit, chunk);
        return form == X_BF16 ? 0 : sum_in_range(lo, hi); /* X_BF16: no zero points */
    }
    if (form == X_FLOAT) {
        turn_floats(lo, hi, unit, chunk);
        return 0;
    }
    return turn_limbs(_mm512_permutex2var_ps(lo, even_index, hi),
                      _mm512_permutex2var_ps(lo, odd_index, hi), form, unit, chunk);
}

TARGET_512 void avx512_turn_span(const int4q_args *a, const turned_x *t, int64_t m, int64_t span) {
    const int64_t last = min64(SPAN_K, t->units * UNIT_K - span * SPAN_K);
    float sum = 0;
    for (int64_t i = 0; i < last; i += 32) {
        const int64_t k = span * SPAN_K + i, unit = k / UNIT_K;
        const __mmask16 mask = k < a->K ? 0xffff : 0; /* K is a multiple of 32, the units' of 128 */
        const int64_t at = k < a->K ? (t->m0 + m) * a->x_stride + k : 0;
        uint8_t *to = t->units_x + (unit * t->M + m) * unit_bytes(t->form);
        const float of_chunk = turn_chunk(a, t->form, at, mask, to, (int)(k % UNIT_K) / 32);
        if (__builtin_isnan(of_chunk)) __atomic_store_n(t->out_of_range, 1, __ATOMIC_RELAXED);
        sum += of_chunk;
        if (mask && (k + 32) % a->group == 0) {
            t->group_sum[m * t->groups + k / a->group] = sum;
            sum = 0;
        }
    }
}

TARGET_512 int avx512_has_outlier(const int4q_args *a, int64_t m, float bits) {
    __m512i largest = _mm512_setzero_si512(), sum = largest, count = largest;
    const __m512i one = _mm512_set1_epi32(1);
    for (int64_t k = 0; k < a->K; k += 16) { /* K is a multiple of 32 */
        const __m512i x =
            _mm512_castps_si512(load_floats(a->x, a->x_kind, m * a->x_stride + k, 0xffff));
        const __m512i field = _mm512_srli_epi32(_mm512_slli_epi32(x, 1), 24); /* the exponent */
        largest = _mm512_max_epi32(largest, field);
        sum = _mm512_add_epi32(sum, field);
        count = _mm512_mask_add_epi32(count, _mm512_test_epi32_mask(field, field), count, one);
    }
    const float elements = (float)_mm512_reduce_add_epi32(count);
    const float all = (float)_mm512_reduce_add_epi32(sum);
    return elements * ((float)_mm512_reduce_max_epi32(largest) - bits) > all;
}

#endif
