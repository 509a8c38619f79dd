/* Armv8.0: NEON without a dot product of bytes. */
#include "common.h"

#ifdef INT4Q_ARM

#define SIMD
#define KERNELS neon_kernels
#define FEATURE FEATURE_NEON

#include "neon.h"

/* u is below 16, so it is a signed byte too; two products fit 16 bits: 2 * 15 * 128. */
INLINE SIMD ints dot_bytes(ints acc, bytes u, const uint8_t *x) {
    const int8x16_t v = vld1q_s8((const int8_t *)x), q = vreinterpretq_s8_u8(u);
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(q), vget_low_s8(v)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(q, v));
    return vaddq_s32(acc, vpaddq_s32(low, high));
}

#include "simd.h"

#endif
