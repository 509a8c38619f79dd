/* Part of simd.h. Decode: 16 rows of the weight at a time. */

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
        const int64_t at = (block - blocks.begin) % params->blocks;
        if (at == 0) {
            const int count = (int)min64(params->blocks, blocks.end - block);
            convert_params(a, a->scale, a->scale_stride_g, a->scale_stride_n, n0, count, step,
                           steps, params->scale, params->scale_size);
            convert_params(a, a->zero, a->zero_stride_g, a->zero_stride_n, n0, count, a->group,
                           groups, params->zero, params->zero_size);
        }
        prefetch_params(a, params, n0 + (params->blocks - at) * ROWS, at);
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
