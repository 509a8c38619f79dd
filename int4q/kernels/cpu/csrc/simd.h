/* Decode and dequantisation for instruction sets of 16- and 32-byte registers, written once.
 *
 * A file that includes this has defined
 *   SIMD       the function attribute that names the instruction set
 *   LANES      32-bit lanes of a register: 4 or 8
 *   floats, ints, bytes   registers; bytes16 is one of 16 bytes
 *   load_bytes, load_ints, load_floats, zero_ints, set_all (a float), spread (see row_scale), to_floats,
 *   add_ints, times_256, multiply, multiply_add (a * b + c), sum_of (lanes)
 *   unpack_unsigned       u = q + 8 of the even and the odd k in a register of weights
 *   dot_bytes             acc + sums over the four bytes of a lane, unsigned ones times x
 *   load_bytes16, store_bytes16, unpack_nibbles, look_up (a table of 16 bytes), interleave (low, high bytes of two
 *   registers), interleave_pairs (of 16 bits)
 *   half_to_float, float_to_half, load_halves (8 of them as floats)
 *   KERNELS, FEATURE      the name of the table of functions, and what the CPU must have
 *
 * The numbers are those of avx512_decode.c, as common.h defines them; only the order of float32 sums
 * differs.
 */
#include <string.h>

#include "common.h"

enum { PARTS = 16 / LANES, PART_BYTES = 4 * LANES }; /* of a unit's 64 bytes of weights */

/* ---------------------------------------------------------------------------------------------
 * Elements of any kind as float
 * ------------------------------------------------------------------------------------------- */

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

/* ---------------------------------------------------------------------------------------------
 * Decode, step 1: x in the order and the numbers of the products
 * ------------------------------------------------------------------------------------------- */

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

/* ---------------------------------------------------------------------------------------------
 * Decode, step 2: 16 rows of the weight at a time
 * ------------------------------------------------------------------------------------------- */

/* Scales or zero points of `blocks` blocks of 16 rows, each as [count][16 rows], entry i those of
 * k = i * step; 0 past N and K. */
static SIMD void convert_params(const int4q_args *a, const void *p, int64_t stride_g,
                                int64_t stride_n, int64_t n0, int blocks, int64_t step,
                                int64_t count, float *to, int64_t size) {
    for (int64_t i = 0; i < count; i++)
        for (int b = 0; b < blocks; b++) {
            const int64_t n = n0 + b * ROWS, first = i * step / a->group * stride_g + n * stride_n;
            const int64_t rows = p && i * step < a->K ? min64(ROWS, a->N - n) : 0;
            float *row = to + b * size + i * ROWS;
            if (rows == ROWS) {
                load_elements(p, a->scale_kind, first, stride_n, ROWS, row);
                continue;
            }
            for (int r = 0; r < ROWS; r++)
                row[r] = r < rows ? element(p, a->scale_kind, first + r * stride_n) : 0.0f;
        }
}

typedef struct {
    const uint8_t *row[ROWS]; /* past N: the last row again */
    const float *scales; /* [K / scale_step][16 rows]; a step is 32 (quads) or a group */
    const float *zeros;  /* [G][16 rows] */
    int64_t full_units; /* of these 64 bytes may be read */
    int64_t tail_bytes; /* of the last, shorter unit */
    int unit_shift;     /* log2 of the units in a group */
    int64_t prefetch;   /* from a byte to the one that is needed some rows later */
    uint8_t flip;       /* what turns a byte of nibbles into offset binary */
} weight_rows;

/* Sum over a part of a unit of u * v - 8 * v = q * v for one row of x, exact, times d. */
INLINE SIMD floats dot_part(bytes even, bytes odd, const uint8_t *x, int part, const int limbs) {
    const uint8_t *limb = x + part * PART_BYTES, *offset = limb + limbs * 128;
    const ints zero = load_ints(offset);
    ints l0 = dot_bytes(dot_bytes(zero, even, limb), odd, limb + 64);
    if (limbs == X_INT8) return multiply(to_floats(l0), load_floats(offset + 64));
    ints l1 = dot_bytes(dot_bytes(zero_ints(), even, limb + 128), odd, limb + 192);
    floats dot = to_floats(add_ints(times_256(l1), l0));
    if (limbs == X_INT24) {
        offset += 64;
        ints l2 = dot_bytes(dot_bytes(load_ints(offset), even, limb + 256), odd, limb + 320);
        dot = multiply_add(to_floats(l2), set_all(65536.0f), dot);
    }
    return multiply(dot, load_floats(offset + 64));
}

/* "Quads": a scale for each 32 k of a unit, since groups are shorter than that. */
INLINE SIMD floats row_scale(const weight_rows *w, int row, int64_t unit, int part,
                             const int quads) {
    if (quads) return spread(w->scales + unit * 4 * ROWS + row, ROWS, part);
    return set_all(w->scales[(unit >> w->unit_shift) * ROWS + row]);
}

/* acc[row][m] += one unit, whose weights are `at`, of R rows from `first` on. */
INLINE SIMD void add_unit(const weight_rows *w, const uint8_t *const at[], int first, int64_t unit,
                          const uint8_t *x, floats *acc, const int M, const int R, const int form,
                          const int quads) {
    UNROLL
    for (int part = 0; part < PARTS; part++)
        UNROLL
        for (int r = 0; r < R; r++) {
            bytes even, odd;
            unpack_unsigned(load_bytes(at[r] + part * PART_BYTES), w->flip, &even, &odd);
            const floats scale = row_scale(w, first + r, unit, part, quads);
            UNROLL
            for (int m = 0; m < M; m++)
                acc[r * M + m] = multiply_add(
                    dot_part(even, odd, x + m * unit_bytes(form), part, form), scale,
                    acc[r * M + m]);
        }
}

/* Adds units [begin, end) of R rows from `first` on to sums[row][m]. */
INLINE SIMD void decode_rows(const weight_rows *w, const turned_x *t, int first, int64_t begin,
                             int64_t end, float *sums, const int M, const int R, const int form,
                             const int quads) {
    floats acc[MAX_R * MAX_CHUNK_M];
    const uint8_t *at[MAX_R];
    UNROLL
    for (int r = 0; r < R; r++) at[r] = w->row[first + r] + begin * 64;
    UNROLL
    for (int i = 0; i < R * M; i++) acc[i] = set_all(0);
    const uint8_t *x = t->units_x + begin * M * unit_bytes(form);
    const int64_t full = min64(end, w->full_units);
    int64_t unit = begin;
    for (; unit < full; unit++, x += M * unit_bytes(form)) {
        UNROLL
        for (int r = 0; r < R; r++) __builtin_prefetch(at[r] + w->prefetch);
        add_unit(w, at, first, unit, x, acc, M, R, form, quads);
        UNROLL
        for (int r = 0; r < R; r++) at[r] += 64;
    }
    if (unit < end) {
        uint8_t padded[MAX_R][64] = {{0}};
        for (int r = 0; r < R; r++)
            at[r] = memcpy(padded[r], at[r], (size_t)w->tail_bytes);
        add_unit(w, at, first, unit, x, acc, M, R, form, quads);
    }
    UNROLL
    for (int i = 0; i < R * M; i++) sums[first * M + i] += sum_of(acc[i]);
}

/* Bytes of turned x that one sweep over the 16 rows uses: half of a first-level cache. */
enum { SWEEP_BYTES = 16 << 10 };

/* sums[row][m] of 16 rows of the weight: products with q * scale. */
INLINE SIMD void decode_block(const weight_rows *w, const turned_x *t, float *sums, const int M,
                              const int R, const int form, const int quads) {
    const int64_t step = SWEEP_BYTES / (M * unit_bytes(form));
    memset(sums, 0, sizeof(float) * ROWS * M);
    for (int64_t begin = 0; begin < t->units; begin += step)
        for (int first = 0; first < ROWS; first += R)
            decode_rows(w, t, first, begin, min64(begin + step, t->units), sums, M, R, form,
                        quads);
}

typedef void (*block_fn)(const weight_rows *, const turned_x *, float *sums);

#define DEFINE_BLOCK(form, M, R, quads)                                                       \
    static SIMD void block_##form##_##M##_##quads(const weight_rows *w, const turned_x *t,    \
                                                  float *sums) {                              \
        decode_block(w, t, sums, M, R, form, quads);                                          \
    }
#define DEFINE_BLOCKS(M, R)       \
    DEFINE_BLOCK(X_INT8, M, R, 0)  \
    DEFINE_BLOCK(X_INT8, M, R, 1)  \
    DEFINE_BLOCK(X_INT16, M, R, 0) \
    DEFINE_BLOCK(X_INT16, M, R, 1) \
    DEFINE_BLOCK(X_INT24, M, R, 0) \
    DEFINE_BLOCK(X_INT24, M, R, 1)
DEFINE_BLOCKS(1, 4)
DEFINE_BLOCKS(2, 4)
DEFINE_BLOCKS(3, 2)
DEFINE_BLOCKS(4, 2)
DEFINE_BLOCKS(5, 1)
DEFINE_BLOCKS(6, 1)
DEFINE_BLOCKS(7, 1)
DEFINE_BLOCKS(8, 1)

static block_fn choose_block(int64_t M, int form, int quads) {
#define OF_FORM(form, M) {block_##form##_##M##_0, block_##form##_##M##_1}
#define OF_M(M) {OF_FORM(X_INT8, M), OF_FORM(X_INT16, M), OF_FORM(X_INT24, M)}
    static const block_fn table[MAX_CHUNK_M][X_INT24][2] = {OF_M(1), OF_M(2), OF_M(3), OF_M(4),
                                                            OF_M(5), OF_M(6), OF_M(7), OF_M(8)};
    return table[M - 1][form - 1][quads];
}

/* Results of 16 rows of the weight: sums + zero points + bias. */
static SIMD void finish_block(const int4q_args *a, const turned_x *t, const weight_rows *w,
                              const float *sums, int64_t n0) {
    const int64_t count = min64(ROWS, a->N - n0);
    for (int64_t m = 0; m < t->M; m++) {
        float y[ROWS] = {0};
        for (int64_t g = 0; a->zero && g < t->groups; g++)
            for (int r = 0; r < ROWS; r++)
                y[r] += w->zeros[g * ROWS + r] * t->group_sum[m * t->groups + g];
        for (int r = 0; r < ROWS; r++) y[r] += sums[r * t->M + m];
        for (int r = 0; a->bias && r < count; r++) y[r] += a->bias[n0 + r];
        store_elements(a->out, a->out_kind, (t->m0 + m) * a->out_stride + n0, count, y);
    }
}

/* A block meets one chunk of x after the other while its weights are in cache. */
static SIMD void decode_blocks(const int4q_args *a, const all_x *x, range blocks,
                               const block_params *params) {
    const int quads = a->group < UNIT_K;
    const int64_t groups = x->whole.groups, step = quads ? CHUNK_K : a->group;
    const int64_t steps = quads ? x->whole.units * 4 : groups;
    weight_rows w = {.full_units = a->K / UNIT_K,
                     .tail_bytes = a->K % UNIT_K / 2,
                     .unit_shift = a->group > UNIT_K,
                     .prefetch = 4 * a->q_stride,
                     .flip = a->offset_binary ? 0 : 0x88};
    for (int64_t block = blocks.begin; block < blocks.end; block++) {
        const int64_t n0 = block * ROWS;
        const int at = (int)((block - blocks.begin) % MAX_BLOCKS);
        if (at == 0) {
            const int count = (int)min64(MAX_BLOCKS, blocks.end - block);
            convert_params(a, a->scale, a->scale_stride_g, a->scale_stride_n, n0, count, step,
                           steps, params->scale, params->scale_size);
            convert_params(a, a->zero, a->zero_stride_g, a->zero_stride_n, n0, count, a->group,
                           groups, params->zero, params->zero_size);
        }
        w.scales = params->scale + at * params->scale_size;
        w.zeros = params->zero + at * params->zero_size;
        for (int r = 0; r < ROWS; r++)
            w.row[r] = a->qdata + min64(n0 + r, a->N - 1) * a->q_stride;
        for (int64_t chunk = 0; chunk < x->chunks; chunk++) {
            const turned_x t = chunk_of(x, chunk);
            float sums[ROWS * MAX_CHUNK_M];
            choose_block(t.M, t.form, quads)(&w, &t, sums);
            finish_block(a, &t, &w, sums, n0);
        }
    }
}

/* ---------------------------------------------------------------------------------------------
 * Dequantisation: a nibble indexes the bytes of its value, tables made once for each (row, group)
 * ------------------------------------------------------------------------------------------- */

enum { NIBBLES = 16 };

/* Byte b of the value of every nibble, q * scale + zero_point, the product rounded before the sum as
 * in the reference (so this file is compiled without contraction). */
INLINE SIMD void byte_tables(float scale, float zero, int64_t offset_binary, int64_t kind,
                             bytes16 *table) {
    float value[NIBBLES];
    uint8_t byte[4][NIBBLES];
    for (int i = 0; i < NIBBLES; i++)
        value[i] = (float)(offset_binary || i >= 8 ? i - (offset_binary ? 8 : 16) : i);
    for (int i = 0; i < NIBBLES; i++) {
        const float product = value[i] * scale;
        value[i] = product + zero;
    }
    for (int i = 0; i < NIBBLES; i++) {
        const uint32_t bits = kind == KIND_FP32 ? bits_of(value[i]) : to_half(value[i], kind);
        for (int b = 0; b < 4; b++) byte[b][i] = (uint8_t)(bits >> 8 * b);
    }
    for (int b = 0; b < (kind == KIND_FP32 ? 4 : 2); b++) table[b] = load_bytes16(byte[b]);
}

/* 32 k of a row: 16 bytes of weights. */
INLINE SIMD void dequant_chunk(const uint8_t *w, const bytes16 *table, int64_t kind, uint8_t *to) {
    bytes16 even, odd, index[2];
    unpack_nibbles(load_bytes16(w), &even, &odd);
    interleave(even, odd, &index[0], &index[1]); /* in the order of k */
    for (int i = 0; i < 2; i++) {
        bytes16 half[2][2], word[2];
        interleave(look_up(table[0], index[i]), look_up(table[1], index[i]), &half[0][0],
                   &half[0][1]);
        if (kind == KIND_FP32)
            interleave(look_up(table[2], index[i]), look_up(table[3], index[i]), &half[1][0],
                       &half[1][1]);
        for (int j = 0; j < 2; j++) {
            if (kind != KIND_FP32) {
                store_bytes16(to + (i * 2 + j) * 16, half[0][j]);
                continue;
            }
            interleave_pairs(half[0][j], half[1][j], &word[0], &word[1]);
            store_bytes16(to + (i * 2 + j) * 32, word[0]);
            store_bytes16(to + (i * 2 + j) * 32 + 16, word[1]);
        }
    }
}

INLINE SIMD void dequant_row(const int4q_args *a, int64_t n, const int64_t kind) {
    const uint8_t *w = a->qdata + n * a->q_stride;
    const int64_t size = kind == KIND_FP32 ? 4 : 2;
    uint8_t *to = (uint8_t *)a->out + n * a->out_stride * size;
    for (int64_t k = 0; k < a->K; k += a->group) {
        const int64_t g = k / a->group, at = g * a->scale_stride_g + n * a->scale_stride_n;
        const int64_t zero_at = g * a->zero_stride_g + n * a->zero_stride_n;
        bytes16 table[4];
        byte_tables(element(a->scale, a->scale_kind, at),
                    a->zero ? element(a->zero, a->scale_kind, zero_at) : 0.0f, a->offset_binary,
                    kind, table);
        for (int64_t i = k; i < k + a->group; i += CHUNK_K)
            dequant_chunk(w + i / 2, table, kind, to + i * size);
    }
}

static SIMD void dequant_rows(const int4q_args *a, int64_t n0) {
    for (int64_t n = n0; n < min64(n0 + ROWS, a->N); n++) {
        if (a->out_kind == KIND_FP32) dequant_row(a, n, KIND_FP32);
        if (a->out_kind == KIND_BF16) dequant_row(a, n, KIND_BF16);
        if (a->out_kind == KIND_FP16) dequant_row(a, n, KIND_FP16);
    }
}

const kernels_of KERNELS = {FEATURE, has_outlier, turn_span, decode_blocks, dequant_rows};
