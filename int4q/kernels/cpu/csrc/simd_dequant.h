/* Part of simd.h. Dequantisation: a nibble indexes the bytes of its value, in tables made once for
 * each (row, group). */

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
