/* The operations of simd.h with NEON; whoever includes this says how bytes are multiplied. */
#include <arm_neon.h>

#include "common.h"

enum { LANES = 4 };
typedef float32x4_t floats;
typedef int32x4_t ints;
typedef uint8x16_t bytes, bytes16;

INLINE SIMD bytes load_bytes(const uint8_t *p) { return vld1q_u8(p); }
INLINE SIMD ints load_ints(const uint8_t *p) { return vld1q_s32((const int32_t *)p); }
INLINE SIMD floats load_floats(const uint8_t *p) { return vld1q_f32((const float *)p); }
INLINE SIMD ints zero_ints(void) { return vdupq_n_s32(0); }
INLINE SIMD floats set_all(float f) { return vdupq_n_f32(f); }
INLINE SIMD floats to_floats(ints v) { return vcvtq_f32_s32(v); }
INLINE SIMD ints add_ints(ints a, ints b) { return vaddq_s32(a, b); }
INLINE SIMD ints times_256(ints v) { return vshlq_n_s32(v, 8); }
INLINE SIMD floats multiply(floats a, floats b) { return vmulq_f32(a, b); }
INLINE SIMD floats multiply_add(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
INLINE SIMD floats least(floats a, floats b) { return vminq_f32(a, b); }
INLINE SIMD floats greatest(floats a, floats b) { return vmaxq_f32(a, b); }
INLINE SIMD floats where_less(floats a, floats b, floats x, floats y) {
    return vbslq_f32(vcltq_f32(a, b), x, y);
}
INLINE SIMD float sum_of(floats v) { return vaddvq_f32(v); }

/* Entry `part`; they are `stride` floats apart. */
INLINE SIMD floats spread(const float *four, int stride, int part) {
    return vld1q_dup_f32(four + part * stride);
}

INLINE SIMD void unpack_nibbles(bytes16 w, bytes16 *even, bytes16 *odd) {
    *even = vandq_u8(w, vdupq_n_u8(0x0f));
    *odd = vshrq_n_u8(w, 4);
}

INLINE SIMD void unpack_unsigned(bytes w, uint8_t flip, bytes *even, bytes *odd) {
    unpack_nibbles(veorq_u8(w, vdupq_n_u8(flip)), even, odd);
}

INLINE SIMD bytes16 load_bytes16(const uint8_t *p) { return vld1q_u8(p); }
INLINE SIMD void store_bytes16(uint8_t *p, bytes16 v) { vst1q_u8(p, v); }
INLINE SIMD bytes16 look_up(bytes16 table, bytes16 index) { return vqtbl1q_u8(table, index); }

INLINE SIMD void interleave(bytes16 a, bytes16 b, bytes16 *first, bytes16 *second) {
    *first = vzip1q_u8(a, b);
    *second = vzip2q_u8(a, b);
}

INLINE SIMD void interleave_pairs(bytes16 a, bytes16 b, bytes16 *first, bytes16 *second) {
    const uint16x8_t x = vreinterpretq_u16_u8(a), y = vreinterpretq_u16_u8(b);
    *first = vreinterpretq_u8_u16(vzip1q_u16(x, y));
    *second = vreinterpretq_u8_u16(vzip2q_u16(x, y));
}

INLINE SIMD float half_to_float(uint16_t half) {
    __fp16 f;
    __builtin_memcpy(&f, &half, sizeof f);
    return f;
}

INLINE SIMD uint16_t float_to_half(float f) {
    const __fp16 rounded = (__fp16)f;
    uint16_t half;
    __builtin_memcpy(&half, &rounded, sizeof half);
    return half;
}

INLINE SIMD void load_halves(const uint16_t *p, float *to) {
    const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(p));
    vst1q_f32(to, vcvt_f32_f16(vget_low_f16(half)));
    vst1q_f32(to + 4, vcvt_high_f32_f16(half));
}
