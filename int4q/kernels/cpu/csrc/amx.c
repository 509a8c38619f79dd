/* GEMM on AMX tiles.
 *
 * Transposed, C^T[n, m] = W[n, :] x^T[:, m], so that weights are the A operand and need no
 * transposition: a tile row is 32 k of one weight row. Tiles are 1 KiB:
 *   A  bf16 [16 n][32 k]              dequantised on the fly into a buffer that stays in cache
 *   B  bf16 [16 k pairs][16 m][2]     x, packed once
 *   C  fp32 [16 n][16 m]
 * A panel is 32 weight rows (two A tiles); a step is 32 k of a panel. The four steps of a unit
 * (128 k, 64 bytes of weights) take its k in the order in which unpacking yields them, in A and B
 * alike: word i of step t is k = 32 (i / 8) + 2 (i % 8) + 16 (t % 2) + t / 2.
 */
#include "common.h"

#ifdef INT4Q_X86

#include "avx512.h"

enum {
    TILE = 1024,
    TILE_K = 32,
    PANEL = 32,
    STEP_BYTES = 2 * TILE,
    UNIT_STEPS = UNIT_K / TILE_K,
    UNIT_BYTES = UNIT_STEPS * STEP_BYTES,
    CHUNK_UNITS = 2,  /* of a dequantised panel: as large as the B tiles it meets, both fit in L1 */
    BLOCK_PANELS = 8, /* panels that share a chunk of packed x while it is in cache */
    BLOCK_M = 512     /* rows of x packed at a time */
};

typedef struct {
    int64_t m0, rows; /* rows of x in this block */
    int64_t m_tiles, units;
    uint8_t *tiles; /* B tiles, [chunks of K][m_tiles][k tiles of the chunk] */
} packed_x;

/* The four B tiles of a unit. Chunks are contiguous: a power of two between m tiles would map them
 * all to the same few sets of the second-level cache. The last chunk may be shorter. */
INLINE uint8_t *b_tiles(const packed_x *p, int64_t m_tile, int64_t unit) {
    const int64_t first = unit / CHUNK_UNITS * CHUNK_UNITS;
    const int64_t length = min64(CHUNK_UNITS, p->units - first);
    return p->tiles + (first * p->m_tiles + m_tile * length + unit - first) * UNIT_STEPS * TILE;
}

INLINE TARGET_AMX void configure_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
}

INLINE TARGET_512 void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) { /* 4x4 inside each 128-bit lane */
        const __m512i ab_lo = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        const __m512i ab_hi = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        const __m512i cd_lo = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
        const __m512i cd_hi = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(ab_lo, cd_lo);
        t[i + 1] = _mm512_unpackhi_epi64(ab_lo, cd_lo);
        t[i + 2] = _mm512_unpacklo_epi64(ab_hi, cd_hi);
        t[i + 3] = _mm512_unpackhi_epi64(ab_hi, cd_hi);
    }
    for (int j = 0; j < 4; j++) { /* 4x4 of the lanes */
        const __m512i lo = _mm512_shuffle_i32x4(t[j], t[j + 4], 0x44);
        const __m512i hi = _mm512_shuffle_i32x4(t[j], t[j + 4], 0xee);
        const __m512i lo2 = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0x44);
        const __m512i hi2 = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0xee);
        r[j] = _mm512_shuffle_i32x4(lo, lo2, 0x88);
        r[j + 4] = _mm512_shuffle_i32x4(lo, lo2, 0xdd);
        r[j + 8] = _mm512_shuffle_i32x4(hi, hi2, 0x88);
        r[j + 12] = _mm512_shuffle_i32x4(hi, hi2, 0xdd);
    }
}

/* 128 k of a row of x, in the order of the steps. */
INLINE TARGET_512 void order_row(const uint16_t *x, int64_t valid, __m512i step[UNIT_STEPS]) {
    const __m512i fours =
        _mm512_set_epi32(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i evens = _mm512_or_si512( /* words 0, 2, .. 62 of two registers */
        fours, _mm512_slli_epi32(_mm512_add_epi32(fours, _mm512_set1_epi32(2)), 16));
    const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
    __m512i part[4]; /* 32 k each; past K: 0 */
    for (int i = 0; i < 4; i++)
        part[i] = i * 32 < valid ? _mm512_loadu_si512(x + i * 32) : _mm512_setzero_si512();
    for (int odd = 0; odd < 2; odd++) {
        const __m512i index = odd ? odds : evens;
        const __m512i a = _mm512_permutex2var_epi16(part[0], index, part[1]);
        const __m512i b = _mm512_permutex2var_epi16(part[2], index, part[3]);
        step[2 * odd] = _mm512_shuffle_i32x4(a, b, 0x88);
        step[2 * odd + 1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    }
}

/* B tiles of 16 rows of x and one unit; rows past M are 0. */
static TARGET_512 void pack_unit(const int4q_args *a, const packed_x *p, int64_t m_tile,
                                  int64_t unit) {
    const int64_t rows = min64(16, p->rows - m_tile * 16);
    const uint16_t *x =
        (const uint16_t *)a->x + (p->m0 + m_tile * 16) * a->x_stride + unit * UNIT_K;
    __m512i tile[UNIT_STEPS][16];
    for (int i = 0; i < 16; i++) {
        __m512i step[UNIT_STEPS];
        order_row(i < rows ? x + i * a->x_stride : x, i < rows ? a->K - unit * UNIT_K : 0, step);
        for (int t = 0; t < UNIT_STEPS; t++) tile[t][i] = step[t];
    }
    __m512i *to = (__m512i *)b_tiles(p, m_tile, unit);
    for (int t = 0; t < UNIT_STEPS; t++) {
        transpose16(tile[t]);
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + t * 16 + i, tile[t][i]);
    }
}

/* Where a row's four scales of a unit lie ("quads"). */
INLINE int row_slot(int row) { return (row & 3) * 4 + (row >> 2); }

/* [4 groups][16 rows] -> [slot of the row][4]: 4x4 transposes inside each 128-bit lane put row
 * 4 * lane + j into lane `lane` of register j. */
INLINE TARGET_512 void store_quads(const __m512 r[4], float *quad) {
    const __m512 ab_lo = _mm512_unpacklo_ps(r[0], r[1]), ab_hi = _mm512_unpackhi_ps(r[0], r[1]);
    const __m512 cd_lo = _mm512_unpacklo_ps(r[2], r[3]), cd_hi = _mm512_unpackhi_ps(r[2], r[3]);
    _mm512_store_ps(quad, _mm512_shuffle_ps(ab_lo, cd_lo, 0x44));
    _mm512_store_ps(quad + 16, _mm512_shuffle_ps(ab_lo, cd_lo, 0xee));
    _mm512_store_ps(quad + 32, _mm512_shuffle_ps(ab_hi, cd_hi, 0x44));
    _mm512_store_ps(quad + 48, _mm512_shuffle_ps(ab_hi, cd_hi, 0xee));
}

/* scale and zero_point of a panel for one unit: a value for each row (groups of 128 and more), or
 * quads as in decode. */
typedef struct {
    __attribute__((aligned(64))) float scale[2][ROWS * 4];
    __attribute__((aligned(64))) float zero[2][ROWS * 4];
} panel_params;

INLINE TARGET_512 void load_panel_params(const int4q_args *a, int64_t n0, int64_t unit,
                                          panel_params *p, const int quads) {
    for (int half = 0; half < 2; half++) {
        const int64_t n = n0 + half * ROWS;
        const __mmask16 mask = lanes(a->N - n);
        __m512 scale[4], zero[4];
        for (int i = 0; i < (quads ? 4 : 1); i++) {
            const int64_t k = unit * UNIT_K + i * 32;
            const __mmask16 valid = k < a->K ? mask : 0;
            const int64_t g = k < a->K ? k / a->group : 0;
            scale[i] = load_scale(a, g, n, valid);
            zero[i] = load_zero(a, g, n, valid);
        }
        if (quads) {
            store_quads(scale, p->scale[half]);
            store_quads(zero, p->zero[half]);
        } else {
            _mm512_store_ps(p->scale[half], scale[0]);
            _mm512_store_ps(p->zero[half], zero[0]);
        }
    }
}

/* Values of nibbles 0..7 (q = 0..7) or 8..15 (q = -8..-1) for two groups, eight lanes each. */
INLINE TARGET_512 __m512 half_tables(__m512 scale, __m512 zero, const int upper) {
    const __m512 low = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 q = upper ? _mm512_sub_ps(low, _mm512_set1_ps(8.0f)) : low;
    return _mm512_add_ps(_mm512_mul_round_ps(q, scale, NEAREST), zero);
}

/* Tables of a row for a unit, as vpshufb wants them: lane i serves the k in [32 i, 32 i + 32), the
 * lower bytes of its 16 bf16 values in one register, the upper bytes in another. */
INLINE TARGET_AMX void byte_tables(const panel_params *p, int row, const int quads,
                                   int64_t offset_binary, __m512i *lower, __m512i *upper) {
    const int half = row / ROWS, r = row % ROWS;
    __m512i first, last; /* nibbles 0..7 and 8..15 (if signed); lane i for its 32 k */
    if (quads) {
        const __m512i groups01 = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        const __m512i groups23 = _mm512_add_epi32(groups01, _mm512_set1_epi32(2));
        const __m512 s = _mm512_castps128_ps512(_mm_load_ps(p->scale[half] + row_slot(r) * 4));
        const __m512 z = _mm512_castps128_ps512(_mm_load_ps(p->zero[half] + row_slot(r) * 4));
        const __m512 s01 = _mm512_permutexvar_ps(groups01, s);
        const __m512 z01 = _mm512_permutexvar_ps(groups01, z);
        const __m512 s23 = _mm512_permutexvar_ps(groups23, s);
        const __m512 z23 = _mm512_permutexvar_ps(groups23, z);
        first = (__m512i)_mm512_cvtne2ps_pbh(half_tables(s23, z23, 0), half_tables(s01, z01, 0));
        last = (__m512i)_mm512_cvtne2ps_pbh(half_tables(s23, z23, 1), half_tables(s01, z01, 1));
    } else {
        const __m512 s = _mm512_set1_ps(p->scale[half][r]), z = _mm512_set1_ps(p->zero[half][r]);
        const __m512 low = half_tables(s, z, 0), high = half_tables(s, z, 1);
        first = (__m512i)_mm512_cvtne2ps_pbh(low, low);
        last = (__m512i)_mm512_cvtne2ps_pbh(high, high);
    }
    if (offset_binary) { /* nibbles 0..7 are q = -8..-1 */
        const __m512i swapped = first;
        first = last;
        last = swapped;
    }
    const __m512i byte = _mm512_set1_epi16(0xff);
    *lower = _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(last, byte));
    *upper = _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(last, 8));
}

/* Rows [first, last) of the panel at n0, one unit, into A tiles [step][2][16 rows][32 k]. */
INLINE TARGET_AMX void dequant_unit(const int4q_args *a, int64_t n0, int64_t unit, int first,
                                    int last, const panel_params *p, uint8_t *tiles,
                                    int64_t prefetch, const int quads) {
    const __mmask16 mask = lanes((a->K - unit * UNIT_K) / 8); /* dwords of weights */
    const __m512i low = _mm512_set1_epi8(0x0f);
    for (int r = first; r < last; r++) {
        const uint8_t *at = a->qdata + min64(n0 + r, a->N - 1) * a->q_stride + unit * 64;
        _mm_prefetch((const char *)at + prefetch, _MM_HINT_T0);
        const __m512i w = _mm512_maskz_loadu_epi32(mask, at);
        __m512i lower, upper;
        byte_tables(p, r, quads, a->offset_binary, &lower, &upper);
        __m512i *to = (__m512i *)(tiles + r * 64);
        for (int odd = 0; odd < 2; odd++, to += 2 * STEP_BYTES / 64) {
            const __m512i nibble = _mm512_and_si512(odd ? _mm512_srli_epi16(w, 4) : w, low);
            const __m512i lo = _mm512_shuffle_epi8(lower, nibble);
            const __m512i hi = _mm512_shuffle_epi8(upper, nibble);
            _mm512_store_si512(to, _mm512_unpacklo_epi8(lo, hi));
            _mm512_store_si512(to + STEP_BYTES / 64, _mm512_unpackhi_epi8(lo, hi));
        }
    }
}

/* C tiles 0 1 (first 16 rows; m tiles 0, 1) and 2 3 (last 16 rows) += one step. */
INLINE TARGET_AMX void multiply_step(const uint8_t *A, const uint8_t *B0, const uint8_t *B1,
                                     const int two) {
    _tile_loadd(6, B0, 64);
    _tile_loadd(4, A, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, A + TILE, 64);
    _tile_dpbf16ps(2, 5, 6);
    if (!two) return;
    _tile_loadd(7, B1, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}

INLINE TARGET_AMX void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Sums of a panel and two m tiles: [2 halves][2 m tiles] C tiles. */
INLINE TARGET_AMX void load_sums(const float *sums, const int two) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(2, sums + 512, 64);
    if (!two) return;
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(3, sums + 768, 64);
}

INLINE TARGET_AMX void store_sums(float *sums, const int two) {
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 512, 64);
    if (!two) return;
    _tile_stored(1, sums + 256, 64);
    _tile_stored(3, sums + 768, 64);
}

/* 16 rows of out: two C tiles of 16 weight rows each, with the bias, rounded once. */
INLINE TARGET_AMX void write_m_tile(const int4q_args *a, int64_t m, int64_t rows, int64_t n,
                                    const float *upper, const float *lower) {
    const __mmask16 left = lanes(a->N - n), right = lanes(a->N - n - 16);
    const __mmask32 mask = (__mmask32)left | (__mmask32)right << 16;
    __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (a->bias) {
        bias[0] = _mm512_maskz_loadu_ps(left, a->bias + n);
        bias[1] = _mm512_maskz_loadu_ps(right, a->bias + n + 16);
    }
    __m512i u[16], l[16];
    for (int i = 0; i < 16; i++) {
        u[i] = _mm512_load_si512(upper + i * 16);
        l[i] = _mm512_load_si512(lower + i * 16);
    }
    transpose16(u);
    transpose16(l);
    for (int i = 0; i < rows; i++) {
        const __m512 to_left = _mm512_add_ps(_mm512_castsi512_ps(u[i]), bias[0]);
        const __m512 to_right = _mm512_add_ps(_mm512_castsi512_ps(l[i]), bias[1]);
        _mm512_mask_storeu_epi16((uint16_t *)a->out + (m + i) * a->out_stride + n, mask,
                                 (__m512i)_mm512_cvtne2ps_pbh(to_right, to_left));
    }
}

/* Sums of a panel and two m tiles, the first `m_tile`, to out. */
static TARGET_AMX void write_sums(const int4q_args *a, const packed_x *p, int64_t n0,
                                  int64_t m_tile, const float *sums) {
    for (int i = 0; i < 2; i++) {
        const int64_t m = (m_tile + i) * 16, rows = min64(16, p->rows - m);
        if (rows > 0)
            write_m_tile(a, p->m0 + m, rows, n0, sums + i * 256, sums + 512 + i * 256);
    }
}

/* At most 32 rows of x: a panel's sums stay in tiles over all of K, and the weights of the next
 * unit are dequantised between this one's tile products, which run beside them. */
INLINE TARGET_AMX void small_panel(const int4q_args *a, const packed_x *p, int64_t n0,
                                   uint8_t *buffer, const int two, const int quads) {
    panel_params params;
    zero_sums();
    for (int64_t unit = 0; unit <= p->units; unit++) {
        uint8_t *fill = buffer + (unit & 1) * UNIT_BYTES;
        const uint8_t *use = buffer + (~unit & 1) * UNIT_BYTES;
        const uint8_t *B0 = unit ? b_tiles(p, 0, unit - 1) : NULL;
        const uint8_t *B1 = unit && two ? b_tiles(p, 1, unit - 1) : B0;
        if (unit < p->units) load_panel_params(a, n0, unit, &params, quads);
        for (int i = 0; i < UNIT_STEPS; i++) {
            if (unit < p->units)
                dequant_unit(a, n0, unit, i * 8, i * 8 + 8, &params, fill, 4 * 64, quads);
            if (unit)
                multiply_step(use + i * STEP_BYTES, B0 + i * TILE, B1 + i * TILE, two);
        }
    }
    __attribute__((aligned(64))) float sums[4 * 256];
    store_sums(sums, two);
    write_sums(a, p, n0, 0, sums);
}

static TARGET_AMX void small_panels(const int4q_args *a, const packed_x *p, range panels,
                                    uint8_t *buffer) {
    const int quads = a->group < UNIT_K, two = p->m_tiles > 1;
    configure_tiles();
    for (int64_t i = panels.begin; i < panels.end; i++) {
        if (quads && two) small_panel(a, p, i * PANEL, buffer, 1, 1);
        if (quads && !two) small_panel(a, p, i * PANEL, buffer, 0, 1);
        if (!quads && two) small_panel(a, p, i * PANEL, buffer, 1, 0);
        if (!quads && !two) small_panel(a, p, i * PANEL, buffer, 0, 0);
    }
    _tile_release();
}

/* A dequantised chunk of a panel times two m tiles. */
INLINE TARGET_AMX void chunk_product(const uint8_t *A, const uint8_t *B0, const uint8_t *B1,
                                     int64_t steps, float *sums, int first, const int two) {
    if (first)
        zero_sums();
    else
        load_sums(sums, two);
    for (int64_t i = 0; i < steps; i++)
        multiply_step(A + i * STEP_BYTES, B0 + i * TILE, B1 + i * TILE, two);
    store_sums(sums, two);
}

INLINE TARGET_AMX void dequant_chunk(const int4q_args *a, int64_t n0, range units, uint8_t *A,
                                     const int quads) {
    panel_params params;
    for (int64_t unit = units.begin; unit < units.end; unit++) {
        load_panel_params(a, n0, unit, &params, quads);
        dequant_unit(a, n0, unit, 0, PANEL, &params, A + (unit - units.begin) * UNIT_BYTES,
                     PANEL * a->q_stride, quads);
    }
}

/* Up to BLOCK_PANELS panels; sums are [panels][pairs of m tiles][2][2] C tiles. */
INLINE TARGET_AMX void panel_block(const int4q_args *a, const packed_x *p, range panels,
                                   uint8_t *A, float *sums, const int quads) {
    const int64_t pairs = ceil_div(p->m_tiles, 2);
    for (int64_t unit = 0; unit < p->units; unit += CHUNK_UNITS) {
        const range units = {unit, min64(unit + CHUNK_UNITS, p->units)};
        const int64_t steps = (units.end - units.begin) * UNIT_STEPS;
        for (int64_t i = panels.begin; i < panels.end; i++) {
            dequant_chunk(a, i * PANEL, units, A, quads);
            for (int64_t j = 0; j < pairs; j++) {
                const uint8_t *B0 = b_tiles(p, 2 * j, unit);
                float *to = sums + ((i - panels.begin) * pairs + j) * 1024;
                if (2 * j + 1 < p->m_tiles)
                    chunk_product(A, B0, B0 + steps * TILE, steps, to, unit == 0, 1);
                else
                    chunk_product(A, B0, B0, steps, to, unit == 0, 0);
            }
        }
    }
    /* Panel by panel within a row of out: the next row is in another page. */
    for (int64_t j = 0; j < pairs; j++)
        for (int64_t i = panels.begin; i < panels.end; i++)
            write_sums(a, p, i * PANEL, 2 * j, sums + ((i - panels.begin) * pairs + j) * 1024);
}

static TARGET_AMX void large_panels(const int4q_args *a, const packed_x *p, range panels,
                                    uint8_t *A, float *sums) {
    configure_tiles();
    for (int64_t i = panels.begin; i < panels.end; i += BLOCK_PANELS) {
        const range block = {i, min64(i + BLOCK_PANELS, panels.end)};
        if (a->group < UNIT_K)
            panel_block(a, p, block, A, sums, 1);
        else
            panel_block(a, p, block, A, sums, 0);
    }
    _tile_release();
}

EXPORT int int4q_gemm(const int4q_args *a) {
    if (!has_feature(a, FEATURE_AMX) || a->x_kind != KIND_BF16) return INT4Q_UNSUPPORTED;
    const int64_t panels = ceil_div(a->N, PANEL), units = ceil_div(a->K, UNIT_K);
    const int64_t threads = useful_threads(a, panels, a->N * (a->K / 2) * a->M);
    const int64_t max_tiles = ceil_div(min64(a->M, BLOCK_M), 16);
    const int64_t x_size = max_tiles * units * UNIT_STEPS * TILE, a_size = 2 * UNIT_BYTES;
    const int64_t sums_size = ceil_div(max_tiles, 2) * BLOCK_PANELS * 4 * TILE;
    uint8_t *memory = aligned_new(x_size + threads * (a_size + sums_size));
    if (!memory) return INT4Q_NO_MEMORY;
    PARALLEL(threads) {
        const int64_t part = THREAD_INDEX, parts = THREAD_COUNT;
        uint8_t *A = memory + x_size + part * (a_size + sums_size);
        const range mine = share(panels, part, parts), pack = share(units, part, parts);
        for (int64_t m0 = 0; m0 < a->M; m0 += BLOCK_M) {
            packed_x p = {.m0 = m0, .rows = min64(BLOCK_M, a->M - m0), .units = units};
            p.m_tiles = ceil_div(p.rows, 16);
            p.tiles = memory;
            for (int64_t unit = pack.begin; unit < pack.end; unit++)
                for (int64_t i = 0; i < p.m_tiles; i++) pack_unit(a, &p, i, unit);
            BARRIER;
            if (p.m_tiles <= 2)
                small_panels(a, &p, mine, A);
            else
                large_panels(a, &p, mine, A, (float *)(A + a_size));
            BARRIER;
        }
    }
    aligned_free(memory);
    return INT4Q_OK;
}

#else

EXPORT int int4q_gemm(const int4q_args *a) { return (void)a, INT4Q_UNSUPPORTED; }

#endif
