/* Part of simd.h. Elements of any kind as float; x in the order and numbers of the products. */

INLINE float of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

INLINE uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

/* Round to nearest even; a NaN keeps its upper bits and stays quiet. */
INLINE uint16_t float_to_bf16(float f) {
    const uint32_t bits = bits_of(f), up = bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)((f == f ? up : bits | 0x400000) >> 16);
}

INLINE SIMD float element(const void *p, const int64_t kind, int64_t i) {
    if (kind == KIND_FP32) return ((const float *)p)[i];
    const uint16_t half = ((const uint16_t *)p)[i];
    return kind == KIND_BF16 ? of_bits((uint32_t)half << 16) : half_to_float(half);
}

INLINE SIMD void copy_elements(const void *p, const int64_t kind, int64_t first, int64_t stride,
                               const int64_t count, float *to) {
    for (int64_t i = 0; i < count; i++) to[i] = element(p, kind, first + i * stride);
}

/* Elements first, first + stride, ..: a loop for each kind, so that compilers vectorise it. */
INLINE SIMD void load_elements(const void *p, int64_t kind, int64_t first, int64_t stride,
                               const int64_t count, float *to) {
    if (stride != 1)
        copy_elements(p, kind, first, stride, count, to);
    else if (kind == KIND_BF16)
        copy_elements(p, KIND_BF16, first, 1, count, to);
    else if (kind == KIND_FP32)
        copy_elements(p, KIND_FP32, first, 1, count, to);
    else
        for (int64_t i = 0; i < count; i += 8)
            load_halves((const uint16_t *)p + first + i, to + i);
}

INLINE SIMD uint16_t to_half(float f, int64_t kind) {
    return kind == KIND_BF16 ? float_to_bf16(f) : float_to_half(f);
}

static SIMD void store_elements(void *p, int64_t kind, int64_t first, int64_t count,
                                const float *from) {
    for (int64_t i = 0; i < count; i++)
        if (kind == KIND_FP32)
            ((float *)p)[first + i] = from[i];
        else
            ((uint16_t *)p)[first + i] = to_half(from[i], kind);
}

enum { CHUNK_K = 32, BLOCK_K = 8, MAGNITUDE = 0x7fffffff };

/* The bits of the largest |x|. */
INLINE SIMD uint32_t largest_of(const float *x, int count) {
    uint32_t largest = 0;
    for (int i = 0; i < count; i++) {
        const uint32_t bits = bits_of(x[i]) & MAGNITUDE;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

INLINE int is_beyond(uint32_t amax) { return amax >= (uint32_t)FIELD_BEYOND << 23; }

/* Nearest integer, ties to even, of |f| < 2^23: adding 2^23 leaves it in the bits of the sum. */
INLINE SIMD int32_t nearest(float f) {
    const float shift = 8388608.0f;
    const int32_t magnitude = (int32_t)(bits_of(__builtin_fabsf(f) + shift) - bits_of(shift));
    return f < 0 ? -magnitude : magnitude;
}

/* Blocks of 8 k: their power of two d, and v. */
INLINE SIMD void to_fixed_point(const float *x, int bits, int32_t *v, float *d) {
    for (int block = 0; block < CHUNK_K / BLOCK_K; block++, x += BLOCK_K, v += BLOCK_K) {
        const uint32_t amax = largest_of(x, BLOCK_K), raised = (amax + FIELD_CARRY) >> 23;
        const uint32_t field = (raised < (uint32_t)bits ? (uint32_t)bits : raised) - (bits - 1);
        const int bad = is_beyond(amax);
        const float inverse = of_bits((254 - field) << 23);
        for (int i = 0; i < BLOCK_K; i++) v[i] = bad ? 0 : nearest(x[i] * inverse);
        d[block] = bad ? __builtin_nanf("") : of_bits(field << 23);
    }
}

/* All 32 k: d = amax / 127 and v = x / d, to nearest even; where d rounds to 0 all v are 0. */
INLINE SIMD void to_int8(const float *x, int32_t *v, float *d) {
    const uint32_t amax = largest_of(x, CHUNK_K);
    const int bad = is_beyond(amax);
    const float one = of_bits(amax) / 127.0f;
    for (int i = 0; i < CHUNK_K; i++) {
        const float y = bad || one == 0 ? 0.0f : x[i] / one;
        v[i] = nearest(y > 127.0f ? 127.0f : y < -127.0f ? -127.0f : y);
    }
    for (int i = 0; i < CHUNK_K / BLOCK_K; i++) d[i] = bad ? __builtin_nanf("") : one;
}

INLINE SIMD int32_t sum_of_block(const int32_t *v) {
    int32_t sum = 0;
    for (int i = 0; i < BLOCK_K; i++) sum += v[i];
    return sum;
}

/* 32 k of x -> 16 byte of each limb, 4 lanes of offset and d. */
INLINE SIMD void turn_limbs(int32_t *v, const float *d, int limbs, uint8_t *unit, int chunk) {
    enum { BLOCKS = CHUNK_K / BLOCK_K };
    int32_t sum[BLOCKS], low[BLOCKS];
    for (int i = 0; i < BLOCKS; i++) sum[i] = sum_of_block(v + i * BLOCK_K);
    for (int l = 0; l < limbs; l++) {
        int8_t *even = (int8_t *)unit + l * 128 + chunk * 16, *odd = even + 64;
        if (l == 2) /* what limbs 0 and 1 hold is v - limb2 * 2^16 */
            for (int i = 0; i < BLOCKS; i++) {
                const int32_t top = sum_of_block(v + i * BLOCK_K);
                low[i] = -8 * (sum[i] - top * 65536);
                sum[i] = top;
            }
        for (int i = 0; i < CHUNK_K / 2; i++) {
            even[i] = (int8_t)v[2 * i];
            odd[i] = (int8_t)v[2 * i + 1];
        }
        for (int i = 0; i < CHUNK_K; i++) v[i] = (v[i] + 128) >> 8;
    }
    for (int i = 0; i < BLOCKS; i++) sum[i] *= -8;
    uint8_t *offset = unit + limbs * 128 + chunk * 16;
    if (limbs == X_INT24) {
        memcpy(offset, low, sizeof low);
        offset += 64;
    }
    memcpy(offset, sum, sizeof sum);
    memcpy(offset + 64, d, 4 * BLOCKS);
}

/* 32 k of a row of x; their sum: of int8 activations, which have another one than x, v * d; NaN
 * where they are out of range. */
INLINE SIMD float turn_chunk(const float *x, int form, uint8_t *unit, int chunk) {
    int32_t v[CHUNK_K], all = 0;
    float d[CHUNK_K / BLOCK_K], sum = 0;
    if (form == X_INT8)
        to_int8(x, v, d);
    else
        to_fixed_point(x, form == X_INT16 ? 15 : 23, v, d);
    for (int i = 0; i < CHUNK_K; i++) all += v[i];
    turn_limbs(v, d, form, unit, chunk);
    for (int i = 0; i < CHUNK_K / BLOCK_K; i++) /* NaN where one is */
        sum += d[i] == d[i] ? 0.0f : d[i];
    if (form == X_INT8) return sum + (float)all * d[0];
    float part[BLOCK_K] = {0};
    for (int i = 0; i < CHUNK_K; i++) part[i % BLOCK_K] += x[i];
    for (int i = 0; i < BLOCK_K; i++) sum += part[i];
    return sum;
}

static SIMD void turn_span(const int4q_args *a, const turned_x *t, int64_t m, int64_t span) {
    const int64_t last = min64(SPAN_K, t->units * UNIT_K - span * SPAN_K);
    float sum = 0;
    for (int64_t i = 0; i < last; i += CHUNK_K) {
        const int64_t k = span * SPAN_K + i, unit = k / UNIT_K;
        uint8_t *to = t->units_x + (unit * t->M + m) * unit_bytes(t->form);
        float x[CHUNK_K] = {0}; /* K is a multiple of 32, the units' of 128 */
        if (k < a->K)
            load_elements(a->x, a->x_kind, (t->m0 + m) * a->x_stride + k, 1, CHUNK_K, x);
        const float of_chunk = turn_chunk(x, t->form, to, (int)(k % UNIT_K) / CHUNK_K);
        if (of_chunk != of_chunk) __atomic_store_n(t->out_of_range, 1, __ATOMIC_RELAXED);
        sum += of_chunk;
        if (k < a->K && (k + CHUNK_K) % a->group == 0) {
            t->group_sum[m * t->groups + k / a->group] = sum;
            sum = 0;
        }
    }
}

static SIMD int has_outlier(const int4q_args *a, int64_t m, float bits) {
    int64_t largest = 0, sum = 0, elements = 0;
    for (int64_t k = 0; k < a->K; k += CHUNK_K) {
        float x[CHUNK_K];
        uint32_t most = 0, all = 0, count = 0;
        load_elements(a->x, a->x_kind, m * a->x_stride + k, 1, CHUNK_K, x);
        for (int i = 0; i < CHUNK_K; i++) {
            const uint32_t field = bits_of(x[i]) << 1 >> 24; /* the exponent */
            most = field > most ? field : most;
            all += field;
            count += field != 0;
        }
        largest = most > largest ? most : largest;
        sum += all;
        elements += count;
    }
    return (float)elements * ((float)largest - bits) > (float)sum;
}
