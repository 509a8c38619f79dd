// int4 weight-only linear layer for few activation rows (decode): out[M, N] = x[M, K] @ W[N, K].T + bias, M <= 16.
//
//   value[n, k] = q[n, k] * scale[k / GROUP, n] + zero_point[k / GROUP, n]
//
// qdata holds two's complement nibbles, even k in the low one. The activations are quantised at run time to integers:
//   ACT_BITS == 16 (W4A16): q = round(x * 32639 / amax) per 128 elements, kept as two int8 limbs, q = 256 * hi + lo.
//   ACT_BITS == 8  (W4A8):  q = round_half_even(x / d), d = amax / 127 per 32 elements.
// Every product is an exact int8 x int8 -> int32 tensor core dot product (a limb is simply one more column), every scale is
// applied in float32, and a zero point costs one multiply-add a group: zero_point * (sum of the quantised x over the group).
//
// Work split. A CTA owns some consecutive weight rows (all CTAs nearly the same number) and walks over them in tiles of
// ROWS = 16 * ROW_TILES. Its WARPS warps take the steps of 256 k of those tiles in turn, each through its own ring of STAGES
// shared memory buffers filled by cp.async: no barrier is needed until a tile is done, when the warps' partial sums meet in
// shared memory.
//
// Rounded weights (ROUNDED, the definition of int4_matmul). x stays as it is; a weight becomes bf16(q * scale), in registers and
// with one rounding, and meets x in a bf16 matrix instruction, whose float32 sums run on over all groups. No limbs, no units: what
// follows about fixed point is for the other mode. See "Rounded weights".
//
// Compile-time parameters (set by decode.py):
//   ACT_BITS     16 or 8
//   GROUP        32, 64, 128, 256
//   X_TYPE       dtype of x and out; SCALE_TYPE that of scale and zero_point: 0 bfloat16, 1 float16, 2 float32
//   COALESCED    1: the groups of a row are adjacent ([N, n_groups]); 0: the rows of a group are ([n_groups, N])
//   SCALE_VEC    bytes of one scale copy (16, 8, 4), or 0: read scales one by one, which any stride and alignment allows
//   COL_TILES    tiles of 8 activation columns (an activation row is two columns with ACT_BITS == 16, else one)
//                (ROUNDED: always one)
//   SPLIT        columns (or limb pairs) that one activation row is spread over, 1 to 8; see "Split columns"
//   FUSED        1: each CTA quantises x into its own shared memory; 0: the kernel quantise_activations did, into `table`
//   WARPS, ROW_TILES, STAGES, MIN_CTAS    the shape of the work split
//   PDL          1: programmatic dependent launch (needs sm_90)
//   SYMMETRIC    1: nibbles are offset binary (q + 8) and there are no zero points; `zero_point` is not read
//   ROUNDED      1: weights rounded to bfloat16, see above; SYMMETRIC, x and scales bfloat16, rows of x on 16-byte boundaries,
//                no act_pre_scale; else 0. With it ARRANGED, 1: arrange_activations has put x into `table`
//   MATVEC       1: build int4_matvec (M == 1, at the end of this file) instead of the above; it has ROW_BLOCK and UNROLL and
//                ignores COALESCED, COL_TILES, SPLIT, FUSED, ROW_TILES and STAGES; SCALE_VEC there is 1 if the scales of
//                ROW_BLOCK rows may be loaded as one vector (plain layout), else 0
//   EXPERTS      1: a stack of weights, see "Experts"; else 0. With it BLOCK_ROWS, the rows of x that meet a weight at a time
//
// Experts. The rows of x are sorted by the weight ("expert") that they meet; `offs` holds each expert's end row. Only the device
// knows it, so quantise_activations cuts the rows of every expert into blocks of at most BLOCK_ROWS and writes a plan of them,
// and int4_decode shares the weight rows of all blocks evenly among a fixed number of CTAs. Each block has a table of its own.
//
// Split columns. An int32 sum may only run over a "unit": k that share a weight group and an activation scale. The matrix
// instruction computes 8 columns whether they are used or not, so with few activation rows each row gets SPLIT columns, unit u
// goes to column u % SPLIT (the others hold zeros there), and SPLIT units share an accumulator: the float32 work after the
// integer sums, which would dominate for small groups, shrinks SPLIT-fold, and each thread applies one group's scale.

#ifndef EXPERTS
#define EXPERTS 0
#endif
#ifndef ROUNDED
#define ROUNDED 0
#endif
#ifndef ARRANGED
#define ARRANGED 0
#endif

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

struct Params {
    const char* qdata;        // int8 [N, K/2]
    const char* scale;        // [n_groups, N] or [N, n_groups], by the two strides
    const char* zero_point;   // as scale
    const char* x;            // [M, K]
    const char* bias;         // [N] or null
    const char* pre_scale;    // [K] or null: multiplies x, in float32
    char* out;                // [M, N], contiguous
    char* table;              // scratch for quantise_activations (FUSED == 0)
    i64 qdata_row;            // bytes from one weight row to the next
    i64 scale_row;            // elements from one row's scale to the next row's
    i64 scale_group;          // elements from one group's scale to the next group's
    i64 x_row;                // elements
    int M, N, K;
    int row_unit;             // rows are dealt to CTAs in units of so many (scale copies need aligned rows):
    int units_per_cta;        // every CTA takes so many units,
    int extra_units;          // the first `extra_units` CTAs one more
    int bias_type, pre_type;  // dtype codes as X_TYPE
    int x_vector;             // 1: rows of x allow 16-byte loads
    int unused;
#if EXPERTS
    const int* offs;          // [experts], or null where all experts have rows_each rows
    i64 qdata_expert;         // bytes from one expert's weights to the next one's
    i64 scale_expert;         // elements
    i64 tables;               // bytes from `table`, where the plan is, to the first block's table
    i64 table_block;          // bytes of one block's table
    int experts, rows_each, max_blocks, unused2;
#endif
};

constexpr u32 FLIP = SYMMETRIC ? 0x88888888u : 0u;            // offset binary -> two's complement
constexpr int STEP_K = 256;                                  // k covered by one ring stage: 128 bytes of every row
constexpr int X_BLOCK = ACT_BITS == 16 ? 128 : 32;           // elements that share one activation scale
constexpr int SCALE_BYTES = SCALE_TYPE == 2 ? 4 : 2;
constexpr int TENSORS = SYMMETRIC ? 1 : 2;                   // scale, zero_point
#if !MATVEC
constexpr int ROWS = 16 * ROW_TILES;
constexpr int LIMBS = ROUNDED ? 1 : ACT_BITS / 8;            // columns of an activation row
constexpr int COLS = 8 * COL_TILES;
constexpr int SUMS = COLS / LIMBS;                           // sums the instructions form for each weight row:
constexpr int TABLE_ROWS = SUMS / SPLIT;                     // SPLIT of them for each of so many activation rows (>= M)
constexpr int UNIT = GROUP < X_BLOCK ? GROUP : X_BLOCK;      // elements summed in int32
constexpr int SUM_BLOCK = SPLIT > 1 ? UNIT : GROUP < 128 ? GROUP : 128;  // elements in one precomputed sum of activations
constexpr int X_BLOCKS = STEP_K / X_BLOCK;                   // of each, in one step
constexpr int UNITS = STEP_K / UNIT;
constexpr int SUM_BLOCKS = STEP_K / SUM_BLOCK;
constexpr int GROUPS = STEP_K / GROUP;                       // weight groups in one step
constexpr int TENSOR_BYTES = ROWS * GROUPS * SCALE_BYTES;    // scales (or zero points) of one stage
constexpr int STAGE_BYTES = ROWS * 128 + (SCALE_VEC ? (TENSORS * TENSOR_BYTES + 127) / 128 * 128 : 0);
constexpr int RING_BYTES = STAGES * STAGE_BYTES;             // of one warp
constexpr int PARTIAL_BYTES = 2 * WARPS * ROWS * SUMS * 4;   // two buffers of partial outputs
constexpr int FACTORS = SPLIT > 1 ? 2 * UNITS : (X_BLOCKS + SUM_BLOCKS + 3) / 4 * 4;  // floats per step and activation row
constexpr int VALUES_STEP = STEP_K * COLS;                   // bytes of quantised activations in one step
constexpr int FACTORS_STEP = TABLE_ROWS * FACTORS;
static_assert(SPLIT == 1 || (SCALE_VEC != 0 && COL_TILES == 1 && SPLIT <= UNITS), "SPLIT");
static_assert(!ROUNDED || (SYMMETRIC && SPLIT == 1 && X_TYPE == 0 && SCALE_TYPE == 0 && !FUSED && !EXPERTS), "ROUNDED");
static_assert(!ROUNDED || COALESCED || SCALE_VEC == 0, "scales of ROUNDED");
#endif

__device__ __forceinline__ float bf16_to_float(u32 bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float half_to_float(u32 bits) {
    float f;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(bits));
    return f;
}
// One of the two 16-bit numbers in a word.
template <int type> __device__ __forceinline__ float pick(u32 word, int high) {
    if (type == 0) return high ? __uint_as_float(word & 0xffff0000u) : bf16_to_float(word);
    return half_to_float(high ? word >> 16 : word & 0xffffu);
}
__device__ __forceinline__ float load_as_float(const char* base, i64 i, int type) {
    if (type == 2) return ((const float*)base)[i];
    u32 bits = ((const u16*)base)[i];
    return type == 0 ? bf16_to_float(bits) : half_to_float(bits);
}
__device__ __forceinline__ void store_from_float(char* base, i64 i, float v) {
    if (X_TYPE == 2) { ((float*)base)[i] = v; return; }
    u16 bits;
    if (X_TYPE == 0) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    ((u16*)base)[i] = bits;
}

__device__ __forceinline__ void launch_dependents() {
#if PDL
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Asynchronous copies into shared memory; what is not `inside` the tensor is zeroed, and its address never read.
__device__ __forceinline__ void copy_weights(u32 dst, const char* src, bool inside) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(inside ? 16 : 0));
}
template <int bytes> __device__ __forceinline__ void copy_scales(u32 dst, const char* src, bool inside) {
    if (bytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(inside ? 16 : 0));
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(dst), "l"(src), "r"(inside ? bytes : 0), "n"(bytes));
}
template <int words> __device__ __forceinline__ void load_words(const char* from, u32 (&to)[words]) {
    if constexpr (words % 4 == 0) {
        #pragma unroll
        for (int j = 0; j < words / 4; j++) {
            uint4 v = ((const uint4*)from)[j];
            to[4 * j] = v.x; to[4 * j + 1] = v.y; to[4 * j + 2] = v.z; to[4 * j + 3] = v.w;
        }
    } else if constexpr (words == 2) {
        uint2 v = *(const uint2*)from;
        to[0] = v.x; to[1] = v.y;
    } else to[0] = *(const u32*)from;
}
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void mma_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const int (&c)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
constexpr u32 TWO_127 = 0x7f007f00u, MINUS_0 = 0x80008000u;  // as pairs of bf16
// Two bf16 a word. One rounding; an fma, because sm_80 has no bf16 product or sum by itself.
__device__ __forceinline__ u32 fma_bf16(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ void mma_bf16(float (&d)[2][2], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[1][0]), "+f"(d[1][1])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ------------------------------------------------------------------------------------------------------------------
// Activations -> integers, in the order in which the matrix instruction wants them.
//
// values:  int8 [steps, 4 pieces of 64 k, COLS, t = 0..3, 16 bytes]; the 16 bytes are the elements k = 8t .. 8t+7 of the
//          piece's first 32 k (even ones, then odd ones), then of its second 32. A thread's B operand for 64 k is then one
//          16-byte load, even k meet low nibbles and odd k high nibbles, and the weights need no shuffle.
//          Column = (m * SPLIT + unit % SPLIT) * LIMBS + limb.
// factors: float32 [steps, TABLE_ROWS, FACTORS]: with d the activation scale,
//          SPLIT == 1: d / 16 of each X_BLOCK, then d * (exact integer sum of the quantised x) of each SUM_BLOCK;
//          SPLIT > 1:  that pair for each unit.
//          (Unpacked nibbles are 16 times the weight, hence d / 16.)
// ------------------------------------------------------------------------------------------------------------------
#if !MATVEC && !ROUNDED
struct Table {
    char* values;
    float* factors;
};
__device__ __forceinline__ Table table_at(char* base, int steps) {
    Table t;
    t.values = base;
    t.factors = (float*)(base + (i64)steps * VALUES_STEP);
    return t;
}
#endif

__device__ __forceinline__ void load_octet(const Params& p, int m, int k, float (&f)[8]) {
    if (k >= p.K) {
        #pragma unroll
        for (int i = 0; i < 8; i++) f[i] = 0.f;
        return;
    }
    const char* row = p.x + (m * p.x_row + k) * (X_TYPE == 2 ? 4 : 2);
    if (!p.x_vector) {
        #pragma unroll
        for (int i = 0; i < 8; i++) f[i] = load_as_float(row, i, X_TYPE);
    } else if (X_TYPE == 2) {
        float4 a = ((const float4*)row)[0], b = ((const float4*)row)[1];
        f[0] = a.x; f[1] = a.y; f[2] = a.z; f[3] = a.w; f[4] = b.x; f[5] = b.y; f[6] = b.z; f[7] = b.w;
    } else {
        uint4 v = *(const uint4*)row;
        u32 w[4] = {v.x, v.y, v.z, v.w};
        #pragma unroll
        for (int i = 0; i < 8; i++) f[i] = pick<X_TYPE>(w[i >> 1], i & 1);
    }
}

__device__ __forceinline__ void apply_pre_scale(const Params& p, int k, float (&f)[8]) {
    if (!p.pre_scale || k >= p.K) return;
    #pragma unroll
    for (int i = 0; i < 8; i++) f[i] *= load_as_float(p.pre_scale, k + i, p.pre_type);
}
// The largest magnitude as an integer, so that NaN and Inf win.
template <int n> __device__ __forceinline__ u32 magnitude(const float (&f)[n]) {
    u32 bits = 0;
    #pragma unroll
    for (int i = 0; i < n; i++) bits = max(bits, __float_as_uint(f[i]) & 0x7fffffffu);
    return bits;
}
// Quantises values whose block has the magnitude `amax_bits`; returns the scale d. q[i] holds BIAS + the integer: adding
// 1.5 * 2^23 to a float rounds it, half to even, into the low bits.
//
// The integers fit. 16 bits: `inverse` is 32639 / amax rounded, so at most (32639 / amax) * (1 + 2^-24), no subnormal for any
// finite amax; the fma rounds once, so |q| is at most the integer next to 32639 + 2^-9: 32639. That is the largest for which
// (q + 128) >> 8, the limb above a signed low byte, is an int8: 32767 >> 8 = 127, and 32640 would give 128. (An amax clamped to
// 1e-30 only makes |q| smaller.) 8 bits: d is amax / 127 rounded; where it is normal, |x| / d <= 127 * (1 + 2^-23), next to 127;
// where it is subnormal it may be off by more, and there the integer is clamped.
// The sums fit. A product is at most 128 * 128 = 2^14 (16 * a nibble, a limb). A unit has at most 128 k: 2^21 a limb, and
// 256 * hi + lo below 2^29 + 2^21. The 32 k of a thread of int4_matvec: 2^19 for the upper limb, 2^27 shifted, and
// 32 * 128 * 255 < 2^20 for its unsigned lower one. Sums of q, at most 128 * 32639 < 2^22, are exact in float32.
// The scales fit. d / 16 of amax = 1e-30 is 1.9e-36: times a weight scale down to 1e-2 it is still normal. d * (sum of q) is at
// most 128 * amax: finite for amax up to 2^120.
constexpr u32 BIAS = 0x4b400000u;
template <int n> __device__ __forceinline__ float to_integers(const float (&f)[n], u32 amax_bits, u32 (&q)[n]) {
    const float magic = __uint_as_float(BIAS);
    float amax = __uint_as_float(amax_bits), d;
    if (ACT_BITS == 16) {
        amax = fmaxf(amax, 1e-30f);
        const float inverse = 32639.f / amax;
        d = amax * (1.f / 32639.f);
        #pragma unroll
        for (int i = 0; i < n; i++) q[i] = __float_as_uint(fmaf(f[i], inverse, magic));
    } else {
        d = amax / 127.f;
        if (d > 1e-30f && d < 1e30f) {  // f / d, correctly rounded: the division's own steps, with its range check hoisted
            float r;
            asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(d));
            r = fmaf(fmaf(-d, r, 1.f), r, r);
            #pragma unroll
            for (int i = 0; i < n; i++) {
                float v = f[i] * r;
                v = fmaf(fmaf(-d, v, f[i]), r, v);
                v = fmaf(fmaf(-d, v, f[i]), r, v);
                q[i] = __float_as_uint(v + magic);
            }
        } else {
            #pragma unroll
            for (int i = 0; i < n; i++) q[i] = BIAS + (d > 0.f ? min(max(__float2int_rn(f[i] / d), -127), 127) : 0);
        }
    }
    // a block with NaN or Inf gives NaN, never a wrong number
    return amax_bits >= 0x7f800000u ? __uint_as_float(0x7fffffffu) : d;
}

#if !MATVEC && !ROUNDED
// One warp quantises 256 consecutive k of activation row m; lane l holds k = 256 * step + 8 * l + 0..7.
__device__ __forceinline__ void quantise_step(const Params& p, const Table& t, int m, int step, int lane, float (&f)[8]) {
    apply_pre_scale(p, step * STEP_K + lane * 8, f);
    u32 amax_bits = magnitude(f), q[8];
    #pragma unroll
    for (int o = 1; o < X_BLOCK / 8; o <<= 1) amax_bits = max(amax_bits, __shfl_xor_sync(~0u, amax_bits, o));
    const float d = to_integers(f, amax_bits, q);
    int sum = 0;
    #pragma unroll
    for (int i = 0; i < 8; i++) sum += (int)(q[i] - BIAS);

    u32 top[2] = {0, 0}, low[2] = {0, 0};
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        // 256 * hi + lo with a signed lo
        top[i & 1] |= ((LIMBS == 2 ? (q[i] + 128) >> 8 : q[i]) & 0xffu) << (8 * (i >> 1));
        low[i & 1] |= (q[i] & 0xffu) << (8 * (i >> 1));
    }
    const int chunk = step * 8 + (lane >> 2), unit = lane / (UNIT / 8);
    char* dst = t.values + ((i64)(chunk >> 1) * COLS + m * (SPLIT * LIMBS)) * 64 + (lane & 3) * 16 + (chunk & 1) * 8;
    #pragma unroll
    for (int j = 0; j < SPLIT; j++) {
        const bool mine = SPLIT == 1 || unit % SPLIT == j;
        *(uint2*)(dst + j * LIMBS * 64) = mine ? make_uint2(top[0], top[1]) : make_uint2(0, 0);
        if (LIMBS == 2) *(uint2*)(dst + j * LIMBS * 64 + 64) = mine ? make_uint2(low[0], low[1]) : make_uint2(0, 0);
    }

    #pragma unroll
    for (int o = 1; o < (SUM_BLOCK < X_BLOCK ? SUM_BLOCK : X_BLOCK) / 8; o <<= 1) sum += __shfl_xor_sync(~0u, sum, o);
    float scaled = d * (float)sum;
    #pragma unroll
    for (int o = X_BLOCK / 8; o < SUM_BLOCK / 8; o <<= 1) scaled += __shfl_xor_sync(~0u, scaled, o);
    float* factors = t.factors + (step * TABLE_ROWS + m) * FACTORS;
    if (SPLIT > 1) {
        if (lane % (UNIT / 8) == 0) ((float2*)factors)[unit] = make_float2(d * 0.0625f, scaled);
    } else {
        if (lane % (X_BLOCK / 8) == 0) factors[lane / (X_BLOCK / 8)] = d * 0.0625f;
        if (lane % (SUM_BLOCK / 8) == 0) factors[X_BLOCKS + lane / (SUM_BLOCK / 8)] = scaled;
    }
}

#if EXPERTS
// The plan, at p.table: first the number of blocks, then for each the expert, its first row of x and the number of its rows.
struct Place {
    int expert, begin, end;   // the expert of a row (experts if it has none), and the rows of that expert
    int first_block, blocks;  // the expert's first block, and the blocks of all experts
};
// Ends that fall, which no router gives, make a plan without sense, but never one that leads out of bounds.
__device__ __forceinline__ int end_of(const Params& p, int e) {
    int end = (e + 1) * p.rows_each;
    if (p.offs && e >= 0) end = p.offs[e];
    return e < 0 ? 0 : max(min(end, p.M), 0);
}
__device__ __forceinline__ int blocks_in(int begin, int end) { return (max(end - begin, 0) + BLOCK_ROWS - 1) / BLOCK_ROWS; }
// By a whole warp.
__device__ __forceinline__ Place place_of(const Params& p, int row, int lane) {
    int past_experts = 0, begin = 0, end = p.M, first_block = 0, blocks = 0;
    for (int e = lane; e < p.experts; e += 32) {
        const int from = end_of(p, e - 1), to = end_of(p, e), own = blocks_in(from, to);
        const bool past = to <= row;
        past_experts += past;
        begin = max(begin, past ? to : 0);
        end = min(end, past ? p.M : to);
        first_block += past ? own : 0;
        blocks += own;
    }
    Place found;
    found.expert = __reduce_add_sync(~0u, past_experts);
    found.begin = __reduce_max_sync(~0u, begin);
    found.end = __reduce_min_sync(~0u, end);
    found.first_block = __reduce_add_sync(~0u, first_block);
    found.blocks = min(__reduce_add_sync(~0u, blocks), p.max_blocks);
    return found;
}

// Grid: enough warps for M * steps, one (row, step) each. Rows of no expert get zeros as their result.
extern "C" __global__ void quantise_activations(const __grid_constant__ Params p) {
    launch_dependents();
    wait_for_previous_kernel();
    const int steps = (p.K + STEP_K - 1) / STEP_K;
    const int unit = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (unit >= steps * p.M) return;
    const int row = unit / steps, step = unit - row * steps;
    float f[8];
    load_octet(p, row, step * STEP_K + lane * 8, f);
    const Place place = place_of(p, row, lane);
    int4* plan = (int4*)p.table;
    if (unit == 0 && lane == 0) plan[0] = make_int4(place.blocks, 0, 0, 0);
    if (place.expert >= p.experts) {
        const int first = (i64)p.N * step / steps, end = (i64)p.N * (step + 1) / steps;
        for (int n = first + lane; n < end; n += 32) store_from_float(p.out, (i64)row * p.N + n, 0.f);
        return;
    }
    const int block = place.first_block + (row - place.begin) / BLOCK_ROWS, m = (row - place.begin) % BLOCK_ROWS;
    if (block >= p.max_blocks) return;
    if (m == 0 && step == 0 && lane == 0) plan[1 + block] = make_int4(place.expert, row, min(BLOCK_ROWS, place.end - row), 0);
    quantise_step(p, table_at(p.table + p.tables + block * p.table_block, steps), m, step, lane, f);
}
#else
// Grid: enough warps for M * steps, one (row, step) each.
extern "C" __global__ void quantise_activations(const __grid_constant__ Params p) {
    launch_dependents();
    wait_for_previous_kernel();
    const int steps = (p.K + STEP_K - 1) / STEP_K;
    const int unit = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (unit >= steps * p.M) return;
    const int m = unit / steps, step = unit - m * steps;
    float f[8];
    load_octet(p, m, step * STEP_K + lane * 8, f);
    quantise_step(p, table_at(p.table, steps), m, step, lane, f);
}
#endif
#endif

#if ROUNDED
// ------------------------------------------------------------------------------------------------------------------
// Rounded weights.
//
// A nibble u in the low bits of a bf16, at bit 0 or 4, is the number u * 2^-133 or u * 2^-129: bfloat16 has no seam between its
// subnormal and its first normal numbers. One fma, exact, makes (u - 8) / 64 or (u - 8) / 4 of it, and one product with scale or
// scale / 16 rounds it to bf16(q * scale) / 64; the sums take the 64 back. Dividing by powers of two is exact but for subnormal
// results: weights are off by at most 2^-126, and only those below 2^-119 are off at all. Weights past the largest bfloat16 stay
// finite.
//
// The nibbles of a word pair up as k (0, 4), (1, 5), (2, 6), (3, 7), so x does too: from 3 rows on, where every warp reads much of
// it, a small kernel has put it into the order of the lanes (ARRANGED); for fewer that would cost more than it saves.
// ------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ uint4 as_nibble_pairs(uint4 v) {  // 8 consecutive k
    return make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632),
                      __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632));
}
#if ARRANGED
// x as bf16 [steps, 8 chunks, COL_TILES, 32 lanes, 8]. Grid: enough warps for COLS * steps, one (column, step) each.
extern "C" __global__ void arrange_activations(const __grid_constant__ Params p) {
    launch_dependents();
    wait_for_previous_kernel();
    const int steps = (p.K + STEP_K - 1) / STEP_K;
    const int unit = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (unit >= steps * COLS) return;
    const int m = unit / steps, step = unit - m * steps, k = step * STEP_K + lane * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (k < p.K) v = *(const uint4*)(p.x + (min(m, p.M - 1) * p.x_row + k) * 2);
    const i64 tile = ((i64)step * 8 + lane / 4) * COL_TILES + m / 8;
    *(uint4*)(p.table + tile * 512 + (m % 8 * 4 + lane % 4) * 16) = as_nibble_pairs(v);
}
#endif
#endif

#if !MATVEC
// ------------------------------------------------------------------------------------------------------------------
// The product.
//
// Row order. A thread of a 16-row matrix instruction holds rows i and i + 8 (i = lane / 4). Which weight row that is is
// free to choose: here a thread's 2 * ROW_TILES rows are adjacent, row = i * 2 * ROW_TILES + 2 * tile + half, so that with
// plain scales they come with one shared memory load. ROUNDED is for scales of the other layout, and arithmetic limits it: there
// row = 16 * tile + 8 * half + i, so that the row tiles past the end of a CTA's rows can be left out. The 16-byte chunks of a row
// are XOR-ed with i: no bank conflicts.
// ------------------------------------------------------------------------------------------------------------------
// A bound above the threads launched leaves registers for the blocks of the next quantise_activations, which can then be
// resident before this kernel ends: 2 to 6 % where the kernel would else take them all.
constexpr int ROW_I = ROUNDED ? 1 : 2 * ROW_TILES, ROW_TILE = ROUNDED ? 16 : 2, ROW_HALF = ROUNDED ? 8 : 1;  // row's factors
constexpr int BOUND = WARPS * 32 + (COL_TILES == 2 && LIMBS == 2 && ROW_TILES == 1 ? 32 : 0);
extern "C" __global__ void __launch_bounds__(BOUND, MIN_CTAS) int4_decode(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int i8 = lane >> 2, t4 = lane & 3;
    const int steps = (p.K + STEP_K - 1) / STEP_K;
    const int cta = blockIdx.x;
#if EXPERTS
    // The weight rows of all blocks, one block after the other, are dealt out evenly: from `first_row` of block `load_block` to
    // `last_end` of `last_block`. (p.units_per_cta: units of one block.)
    launch_dependents();
    const int4* plan = (const int4*)p.table;
    wait_for_previous_kernel();
    const i64 units = (i64)plan[0].x * p.units_per_cta;
    const i64 first_unit = units * cta / gridDim.x, end_unit = units * (cta + 1) / gridDim.x;
    if (first_unit >= end_unit) return;
    int load_block = (int)(first_unit / p.units_per_cta);
    const int last_block = (int)((end_unit - 1) / p.units_per_cta);
    int first_row = (int)(first_unit - (i64)load_block * p.units_per_cta) * p.row_unit;
    const int last_end = min((int)(end_unit - (i64)last_block * p.units_per_cta) * p.row_unit, p.N);
    int end_row = load_block == last_block ? last_end : p.N;
    const auto expert_of = [&](int block) { return min((u32)plan[1 + block].x, p.experts - 1u); };  // always one of them
    const int expert = expert_of(load_block), first_block = load_block;
#else
    const int first_row = (cta * p.units_per_cta + min(cta, p.extra_units)) * p.row_unit;
    const int end_row = min(first_row + (p.units_per_cta + (cta < p.extra_units)) * p.row_unit, p.N);
    const int expert = 0;
#endif
    const u32 shared_address = (u32)__cvta_generic_to_shared(shared);
    const u32 ring = warp * RING_BYTES;                           // offsets into `shared`
    float* partial = (float*)(shared + WARPS * RING_BYTES);       // [2][WARPS][ROWS][SUMS]
#if !EXPERTS
    launch_dependents();
#endif

    // Producer: copies this warp's next (tile, step), WARPS steps after the one before it. A lane copies the same 16-byte chunk
    // of rows copy_row, copy_row + 4, ..., and a few scales; its pointers move along, rather than being computed anew.
    const int copy_chunk = lane & 7, copy_row = lane >> 3;
    const int chunk_steps = ((p.K >> 5) - copy_chunk + 7) >> 3;   // steps in which the lane's chunk lies inside K
    int load_step = warp, rows_left = end_row - first_row;
    const char* weights;
    const i64 weights_jump = ROWS * p.qdata_row - steps * 128;    // from past the end of a row tile to the next tile
    constexpr int PIECES = SCALE_VEC ? TENSORS * TENSOR_BYTES / SCALE_VEC : 0;  // copies of scales and zero points in one stage
    constexpr int SCALE_COPIES = (PIECES + 31) / 32;
    const char* scales_from[SCALE_COPIES + 1];
    int scale_row[SCALE_COPIES + 1], scale_group[SCALE_COPIES + 1], scale_steps[SCALE_COPIES + 1];
    const i64 scales_step = GROUPS * p.scale_group * SCALE_BYTES;
    const i64 scales_jump = ROWS * p.scale_row * SCALE_BYTES - steps * scales_step;
    #pragma unroll
    for (int j = 0; j < SCALE_COPIES; j++) {
        // a line is what is adjacent in memory: the groups of one row, or the rows of one group
        constexpr int LINE = (COALESCED ? GROUPS : ROWS) * SCALE_BYTES / (SCALE_VEC ? SCALE_VEC : 1);
        const int e = j * 32 + lane, piece = e % (PIECES / TENSORS), line = piece / LINE, at = piece % LINE * SCALE_VEC / SCALE_BYTES;
        scale_group[j] = COALESCED ? at : line;
        scale_row[j] = COALESCED ? line : at;
        scale_steps[j] = (p.K / GROUP - scale_group[j] + GROUPS - 1) / GROUPS;
    }
    auto point_at = [&](int expert, int row) {                    // the copies at `load_step` of the tile that begins at `row`
        weights = p.qdata + (row + copy_row) * p.qdata_row + load_step * 128 + copy_chunk * 16;
#if EXPERTS
        weights += expert * p.qdata_expert;
#endif
        #pragma unroll
        for (int j = 0; j < SCALE_COPIES; j++) {
            i64 element = (row + scale_row[j]) * p.scale_row + (load_step * GROUPS + scale_group[j]) * p.scale_group;
#if EXPERTS
            element += expert * p.scale_expert;
#endif
            scales_from[j] = (j * 32 + lane < PIECES / TENSORS ? p.scale : p.zero_point) + element * SCALE_BYTES;
        }
    };
    point_at(expert, first_row);
    auto issue = [&](u32 stage) {
        while (load_step >= steps) {
            load_step -= steps;
            rows_left -= ROWS;
            weights += weights_jump;
            #pragma unroll
            for (int j = 0; j < SCALE_COPIES; j++) scales_from[j] += scales_jump;
#if EXPERTS
            if (rows_left <= 0 && load_block < last_block) {
                load_block++;
                rows_left = load_block == last_block ? last_end : p.N;
                point_at(expert_of(load_block), 0);
            }
#endif
        }
        const int rows_here = load_step < chunk_steps ? rows_left - copy_row : 0;
        const char* from = weights;
        #pragma unroll
        for (int j = 0; j < 4 * ROW_TILES; j++) {
            const int row = 4 * j + copy_row, key = (row / ROW_I) & 7;
            copy_weights(shared_address + stage + (row * 128 + ((copy_chunk ^ key) << 4)), from, 4 * j < rows_here);
            from += 4 * p.qdata_row;
        }
        #pragma unroll
        for (int j = 0; j < SCALE_COPIES; j++) {
            const int e = j * 32 + lane;
            if (PIECES % 32 == 0 || e < PIECES)
                copy_scales<SCALE_VEC ? SCALE_VEC : 4>(shared_address + stage + ROWS * 128 + e * SCALE_VEC, scales_from[j],
                                                       load_step < scale_steps[j] && scale_row[j] < rows_left);
            scales_from[j] += WARPS * scales_step;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        weights += WARPS * 128;
        load_step += WARPS;
    };
    #pragma unroll
    for (int i = 0; i < STAGES - 1; i++) issue(ring + i * STAGE_BYTES);

#if !EXPERTS
    // Weights do not depend on the kernel before this one; activations do.
    wait_for_previous_kernel();
#endif
#if ROUNDED
    // A lane holds 8 k of each chunk of 32, of column i8. Columns past the last row of x repeat that row: nobody reads their sums.
    auto load_x = [&](int step, uint4 (&x)[8][COL_TILES]) {
        #pragma unroll
        for (int n = 0; n < COL_TILES; n++) {
#if ARRANGED
            const char* from = p.table + ((i64)step * 8 * COL_TILES + n) * 512 + lane * 16;
            #pragma unroll
            for (int e = 0; e < 8; e++) x[e][n] = *(const uint4*)(from + e * (COL_TILES * 512));
#else
            const char* from = p.x + (min(n * 8 + i8, p.M - 1) * p.x_row + step * STEP_K + t4 * 8) * 2;
            const int chunks = (p.K >> 5) - step * 8;
            if (chunks >= 8) {
                #pragma unroll
                for (int e = 0; e < 8; e++) x[e][n] = *(const uint4*)(from + e * 64);
            } else {
                #pragma unroll
                for (int e = 0; e < 8; e++) x[e][n] = e < chunks ? *(const uint4*)(from + e * 64) : make_uint4(0, 0, 0, 0);
            }
#endif
        }
    };
#elif FUSED
    const Table table = table_at(shared + WARPS * RING_BYTES + PARTIAL_BYTES, steps);
    constexpr int BATCH = 4;  // loads in flight
    for (int m = 0; m < p.M; m++)
        for (int base = warp; base < steps; base += BATCH * WARPS) {
            float f[BATCH][8];
            #pragma unroll
            for (int j = 0; j < BATCH; j++) load_octet(p, m, (base + j * WARPS) * STEP_K + lane * 8, f[j]);
            #pragma unroll
            for (int j = 0; j < BATCH; j++)
                if (base + j * WARPS < steps) quantise_step(p, table, m, base + j * WARPS, lane, f[j]);
        }
    __syncthreads();
#else
    Table table = table_at(p.table, steps);
#endif

    // A thread holds, per column tile and weight row, EACH sums: one limb pair, or two columns. Columns past the last one hold
    // nothing that is used.
    constexpr int EACH = 3 - LIMBS;
    const int sum0 = t4 * EACH;                                                      // its first sum in column tile 0
    const int matrix_row = (lane & 7) * ROW_I + ((lane >> 3) & 1) * ROW_HALF, matrix_chunk = lane >> 4;

    int step = warp, buffer = 0, turn = warp;
    u32 stage = ring, last_stage = ring + (STAGES - 1) * STAGE_BYTES;
    [[maybe_unused]] const char *scale_base = p.scale, *zero_base = p.zero_point;
    int x_rows = p.M, x_row0 = 0;                                                    // rows of x, and the first one
#if EXPERTS
    for (int block = first_block; block <= last_block; block++) {
    const int4 entry = plan[1 + block];
    const int stacked = expert_of(block);
    if (block > first_block) first_row = 0;
    end_row = block == last_block ? last_end : p.N;
    x_row0 = min((u32)entry.y, (u32)p.M), x_rows = min((u32)entry.z, min((u32)BLOCK_ROWS, (u32)(p.M - x_row0)));
    table = table_at(p.table + p.tables + block * p.table_block, steps);
    scale_base = p.scale + stacked * p.scale_expert * SCALE_BYTES;
    zero_base = p.zero_point + stacked * p.scale_expert * SCALE_BYTES;
#endif
#if !ROUNDED
    const char* x_lane = table.values + lane * 16;
    const float* factors_lane = table.factors + (sum0 / SPLIT) * FACTORS + (SPLIT > 1 ? sum0 % SPLIT * 2 : 0);
#endif
    for (int tile_row = first_row; tile_row < end_row; tile_row += ROWS) {
        float acc[ROW_TILES][COL_TILES][2][EACH];
        #pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
            #pragma unroll
            for (int n = 0; n < COL_TILES; n++)
                #pragma unroll
                for (int b = 0; b < 2; b++)
                    #pragma unroll
                    for (int i = 0; i < EACH; i++) acc[r][n][b][i] = 0.f;

        for (; step < steps; step += WARPS) {
            // Activations of this step: operands and factors.
#if ROUNDED
            uint4 x[8][COL_TILES];
            load_x(step, x);
#else
            uint4 x[4][COL_TILES];
            const char* x_from = x_lane + (i64)step * VALUES_STEP;
            #pragma unroll
            for (int c = 0; c < 4; c++)
                #pragma unroll
                for (int n = 0; n < COL_TILES; n++) x[c][n] = *(const uint4*)(x_from + c * (COLS * 64) + n * 512);
            const float* factors_from = factors_lane + step * FACTORS_STEP;
#if SPLIT > 1
            float unit_factors[UNITS / SPLIT][2 * EACH];  // (d / 16, d * sum) of the thread's unit(s)
            #pragma unroll
            for (int u = 0; u < UNITS / SPLIT; u++) {
                if (EACH == 2) {
                    float4 v = *(const float4*)(factors_from + u * SPLIT * 2);
                    unit_factors[u][0] = v.x;
                    unit_factors[u][1] = v.y;
                    unit_factors[u][2 * EACH - 2] = v.z;
                    unit_factors[u][2 * EACH - 1] = v.w;
                } else {
                    float2 v = *(const float2*)(factors_from + u * SPLIT * 2);
                    unit_factors[u][0] = v.x; unit_factors[u][1] = v.y;
                }
            }
#else
            float factors[COL_TILES][EACH][FACTORS];
            #pragma unroll
            for (int n = 0; n < COL_TILES; n++)
                #pragma unroll
                for (int i = 0; i < EACH; i++)
                    #pragma unroll
                    for (int j = 0; j < FACTORS / 4; j++) {
                        float4 v = *(const float4*)(factors_from + (n * (8 / LIMBS) + i) * FACTORS + 4 * j);
                        float* to = factors[n][i] + 4 * j;
                        to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
                    }
#endif
#endif
#if SCALE_VEC == 0
            u32 raw[TENSORS][ROW_TILES][2][GROUPS];
            #pragma unroll
            for (int g = 0; g < GROUPS; g++)
                #pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
                    #pragma unroll
                    for (int b = 0; b < 2; b++) {
                        const int row = tile_row + i8 * ROW_I + r * ROW_TILE + b * ROW_HALF, group = step * GROUPS + g;
                        const bool inside = row < end_row && group < p.K / GROUP;
                        const i64 at = row * p.scale_row + group * p.scale_group;
                        #pragma unroll
                        for (int z = 0; z < TENSORS; z++) {
                            const char* base = z ? zero_base : scale_base;
                            raw[z][r][b][g] = !inside ? 0 : SCALE_BYTES == 4 ? ((const u32*)base)[at] : ((const u16*)base)[at];
                        }
                    }
#endif
            __syncwarp();  // every lane is done with the stage that issue() overwrites
            issue(last_stage);
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
            __syncwarp();
            const char* scales = shared + stage + ROWS * 128;

#if SPLIT > 1
            // The thread's own units' groups: a lane-dependent address.
            auto scale_at = [&](int z, int r, int g, int i, float (&to)[2]) {
                const int lane_group = g + (sum0 % SPLIT + i) * UNIT / GROUP, row = i8 * (2 * ROW_TILES) + 2 * r;
                const char* of_tensor = scales + z * TENSOR_BYTES;
                if (COALESCED) {
                    #pragma unroll
                    for (int b = 0; b < 2; b++)
                        to[b] = load_as_float(of_tensor, (row + b) * GROUPS + lane_group, SCALE_TYPE);
                } else {
                    const char* from = of_tensor + (lane_group * ROWS + row) * SCALE_BYTES;
                    if (SCALE_BYTES == 4) { float2 v = *(const float2*)from; to[0] = v.x; to[1] = v.y; }
                    else { u32 v = *(const u32*)from; to[0] = pick<SCALE_TYPE>(v, 0); to[1] = pick<SCALE_TYPE>(v, 1); }
                }
            };
#else
            // A scale (z == 0) or zero point of row half b of tile r is one of the two 16-bit numbers of a word, or all of it.
#if SCALE_VEC == 0
            auto word_of = [&](int z, int r, int b, int g) { return raw[z][r][b][g]; };
            auto high_of = [](int b, int g) { return 0; };
#elif COALESCED
            constexpr int WORDS = GROUPS * SCALE_BYTES / 4;  // of one row
            u32 raw[TENSORS][ROW_TILES][2][WORDS];
            #pragma unroll
            for (int z = 0; z < TENSORS; z++)
                #pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
                    #pragma unroll
                    for (int b = 0; b < 2; b++)
                        load_words(scales + z * TENSOR_BYTES + (i8 * ROW_I + r * ROW_TILE + b * ROW_HALF) * (WORDS * 4), raw[z][r][b]);
            auto word_of = [&](int z, int r, int b, int g) { return raw[z][r][b][g * SCALE_BYTES / 4]; };
            auto high_of = [](int b, int g) { return g & 1; };
#else
            constexpr int WORDS = ROW_TILES * SCALE_BYTES / 2;  // of one group: a thread's rows are adjacent
            u32 raw[TENSORS][GROUPS][WORDS];
            #pragma unroll
            for (int z = 0; z < TENSORS; z++)
                #pragma unroll
                for (int g = 0; g < GROUPS; g++)
                    load_words(scales + z * TENSOR_BYTES + g * (ROWS * SCALE_BYTES) + i8 * (WORDS * 4), raw[z][g]);
            auto word_of = [&](int z, int r, int b, int g) { return raw[z][g][(2 * r + b) * SCALE_BYTES / 4]; };
            auto high_of = [](int b, int g) { return b; };
#endif
#endif
            u32 w[ROW_TILES][4];
            auto load_chunks = [&](int r, int e) {  // one ldmatrix brings chunks e and e + 1 of 32 k of row tile r
                ldmatrix_x4(w[r], shared_address + stage + (matrix_row + r * ROW_TILE) * 128 + (((e + matrix_chunk) ^ (lane & 7)) << 4));
            };
#if ROUNDED
#if !ARRANGED
            #pragma unroll
            for (int e = 0; e < 8; e++)
                #pragma unroll
                for (int n = 0; n < COL_TILES; n++) x[e][n] = as_nibble_pairs(x[e][n]);
#endif
            auto multiply = [&](int r, int e, int halves) {  // row tile r (one half of its rows or both), chunk e
                if (e % 2 == 0) load_chunks(r, e);
                u32 weights[2][4] = {};  // of both row halves: pairs of k (0, 4), (1, 5), (2, 6), (3, 7) of 8
                #pragma unroll
                for (int b = 0; b < halves; b++) {
                    const int g = e * 32 / GROUP;
                    const u32 word = w[r][e % 2 * 2 + b];
                    const u32 scale = __byte_perm(word_of(0, r, b, g), 0, high_of(b, g) ? 0x3232 : 0x1010);
                    const u32 low_scale = fma_bf16(scale, 0x3d803d80u, MINUS_0);  // / 16
                    #pragma unroll
                    for (int i = 0; i < 4; i += 2) {
                        const u32 pairs = word >> (4 * i);
                        const u32 q0 = fma_bf16(pairs & 0x000f000fu, TWO_127, 0xbe00be00u);  // (u - 8) / 64
                        const u32 q1 = fma_bf16(pairs & 0x00f000f0u, TWO_127, 0xc000c000u);  // (u - 8) / 4
                        weights[b][i] = fma_bf16(q0, scale, MINUS_0);
                        weights[b][i + 1] = fma_bf16(q1, low_scale, MINUS_0);
                    }
                }
                #pragma unroll
                for (int n = 0; n < COL_TILES; n++) {
                    const uint4 v = x[e][n];
                    mma_bf16(acc[r][n], weights[0][0], weights[1][0], weights[0][1], weights[1][1], v.x, v.y);
                    mma_bf16(acc[r][n], weights[0][2], weights[1][2], weights[0][3], weights[1][3], v.z, v.w);
                }
            };
#else
#if SPLIT == 1
            auto scale_of = [&](int z, int r, int b, int g) {
                const u32 word = word_of(z, r, b, g);
                return SCALE_BYTES == 4 ? __uint_as_float(word) : pick<SCALE_TYPE>(word, high_of(b, g));
            };
#endif
            int dot[ROW_TILES][COL_TILES][4];
#if SPLIT == 1
            float part[ROW_TILES][COL_TILES][2][EACH];  // sums that still lack one of their two scales
#endif
            auto multiply = [&](int r, int e) {  // row tile r, chunk e
                const bool begins = e * 32 % (UNIT * SPLIT) == 0, ends = (e + 1) * 32 % (UNIT * SPLIT) == 0;
                if (e % 2 == 0) load_chunks(r, e);
                const u32 v0 = w[r][e % 2 * 2] ^ FLIP, v1 = w[r][e % 2 * 2 + 1] ^ FLIP;
                // 16 * even k, 16 * odd k: a nibble in the top half of its byte is its own sign extension
                const u32 a[4] = {(v0 << 4) & 0xf0f0f0f0u, (v1 << 4) & 0xf0f0f0f0u, v0 & 0xf0f0f0f0u, v1 & 0xf0f0f0f0u};
                #pragma unroll
                for (int n = 0; n < COL_TILES; n++) {
                    const uint4 v = x[e / 2][n];
                    const int none[4] = {0, 0, 0, 0};
                    if (begins) mma_s8(dot[r][n], a, e % 2 ? v.z : v.x, e % 2 ? v.w : v.y, none);
                    else mma_s8(dot[r][n], a, e % 2 ? v.z : v.x, e % 2 ? v.w : v.y, dot[r][n]);
                }
                if (!ends) return;
#if SPLIT > 1
                const int u = e * 32 / (UNIT * SPLIT), g = u * (UNIT * SPLIT) / GROUP;
                #pragma unroll
                for (int i = 0; i < EACH; i++) {
                    float scale[2], zero[2];
                    scale_at(0, r, g, i, scale);
                    scale_at(TENSORS - 1, r, g, i, zero);
                    #pragma unroll
                    for (int b = 0; b < 2; b++) {
                        const int* c = dot[r][0] + 2 * b;
                        const float sum = LIMBS == 2 ? (float)(c[0] * 256 + c[1]) : (float)c[i];
                        acc[r][0][b][i] += sum * (scale[b] * unit_factors[u][2 * i]);
                        if (!SYMMETRIC) acc[r][0][b][i] += zero[b] * unit_factors[u][2 * i + 1];
                    }
                }
#else
                const int g = e * 32 / GROUP;
                const bool sum_ends = (e + 1) * 32 % SUM_BLOCK == 0;  // a group's end (or the middle of one of 256)
                const float scale[2] = {scale_of(0, r, 0, g), scale_of(0, r, 1, g)};
                const float zero[2] = {scale_of(TENSORS - 1, r, 0, g), scale_of(TENSORS - 1, r, 1, g)};
                #pragma unroll
                for (int n = 0; n < COL_TILES; n++)
                    #pragma unroll
                    for (int b = 0; b < 2; b++)
                        #pragma unroll
                        for (int i = 0; i < EACH; i++) {
                            const int* c = dot[r][n] + 2 * b;
                            const float sum = LIMBS == 2 ? (float)(c[0] * 256 + c[1]) : (float)c[i];
                            const float x_scale = factors[n][i][e * 32 / X_BLOCK];
                            float& total = acc[r][n][b][i];
                            float& f = part[r][n][b][i];
                            if (UNIT == X_BLOCK && UNIT == SUM_BLOCK) total += sum * (scale[b] * x_scale);
                            else if (UNIT < X_BLOCK) {  // several groups share an activation scale
                                f = e * 32 % X_BLOCK < UNIT ? sum * scale[b] : f + sum * scale[b];
                                if ((e + 1) * 32 % X_BLOCK == 0) total += f * x_scale;
                            } else {  // several activation scales share a group
                                f = e * 32 % SUM_BLOCK == 0 ? sum * x_scale : f + sum * x_scale;
                                if (sum_ends) total += f * scale[b];
                            }
                            if (sum_ends && !SYMMETRIC) total += zero[b] * factors[n][i][X_BLOCKS + e * 32 / SUM_BLOCK];
                        }
#endif
            };
#endif
#if ROUNDED
            const int live = end_row - tile_row;
            if (live > ROWS - 8) {
                #pragma unroll
                for (int e = 0; e < 8; e++)
                    #pragma unroll
                    for (int r = 0; r < ROW_TILES; r++) multiply(r, e, 2);
            } else {
                #pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
                    if (r * 16 + 8 < live) {
                        #pragma unroll
                        for (int e = 0; e < 8; e++) multiply(r, e, 2);
                    } else if (r * 16 < live) {
                        #pragma unroll
                        for (int e = 0; e < 8; e++) multiply(r, e, 1);
                    }
            }
#elif COL_TILES <= 2
            #pragma unroll
            for (int e = 0; e < 8; e++)
                #pragma unroll
                for (int r = 0; r < ROW_TILES; r++) multiply(r, e);
#else  // (fewer registers: one row tile's integer sums at a time)
            #pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
                #pragma unroll
                for (int e = 0; e < 8; e++) multiply(r, e);
#endif
            last_stage = stage;
            stage += STAGE_BYTES;
            if (stage == ring + RING_BYTES) stage = ring;
        }
        step -= steps;

        // The tile's partial sums of all warps. Two buffers: a fast warp may be writing the next tile's while a slow one reads.
        float* mine = partial + (buffer * WARPS + warp) * (ROWS * SUMS);
        #pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
            #pragma unroll
            for (int n = 0; n < COL_TILES; n++)
                #pragma unroll
                for (int b = 0; b < 2; b++)
                    #pragma unroll
                    for (int i = 0; i < EACH; i++)
                        mine[(i8 * ROW_I + r * ROW_TILE + b * ROW_HALF) * SUMS + n * (8 / LIMBS) + sum0 + i] = acc[r][n][b][i];
        __syncthreads();
        for (int i = turn * 32 + lane; i < ROWS * x_rows; i += WARPS * 32) {
            const int m = i / ROWS, row = tile_row + i % ROWS;
            if (row < end_row) {
                const float* from = partial + buffer * WARPS * (ROWS * SUMS) + i % ROWS * SUMS + m * SPLIT;
                float sum = 0.f;
                #pragma unroll
                for (int w = 0; w < WARPS; w++)
                    #pragma unroll
                    for (int j = 0; j < SPLIT; j++) sum += from[w * (ROWS * SUMS) + j];
                if (ROUNDED) sum *= 64.f;
                if (p.bias) sum += load_as_float(p.bias, row, p.bias_type);
                store_from_float(p.out, (i64)(x_row0 + m) * p.N + row, sum);
            }
        }
        buffer ^= 1;
        turn = (turn + 1) % WARPS;  // the few rows of a small M fall to another warp next time
    }
#if EXPERTS
    }
#endif
    asm volatile("cp.async.wait_all;" ::: "memory");
}
#else  // MATVEC

// ------------------------------------------------------------------------------------------------------------------
// M == 1 for weights that one wave of small CTAs holds in flight: no shared memory ring, no table, one kernel.
// A thread takes 32 k (16 bytes) of each of the CTA's ROW_BLOCK rows, quantises its own 32 activations, and multiplies with
// dp4a. The threads of the CTA lie along k. The integers are the same as in int4_decode.
// ------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ int dot4(u32 a, u32 b, int c) {
    int d;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ int dot4_unsigned_x(u32 a, u32 b, int c) {
    int d;
    asm("dp4a.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ uint4 load_once(const char* from, bool inside) {
    uint4 v;
    asm volatile(
        "{.reg .pred p; setp.ne.s32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
        "@p ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(from), "r"((int)inside));
    return v;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_CTAS) int4_matvec(const __grid_constant__ Params p) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row0 = blockIdx.x * ROW_BLOCK, chunks = p.K >> 5;
    constexpr int WORDS = ROW_BLOCK * SCALE_BYTES / 4;
    constexpr bool TWO = ACT_BITS == 16;  // limbs
    launch_dependents();
    float acc[ROW_BLOCK];
    #pragma unroll
    for (int r = 0; r < ROW_BLOCK; r++) acc[r] = 0.f;

    for (int first = 0; first < chunks; first += WARPS * 32 * UNROLL) {
        uint4 weights[UNROLL][ROW_BLOCK];
        u32 raw[UNROLL][TENSORS][WORDS];                    // scales and zero points, packed
        #pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int chunk = first + (u * WARPS + warp) * 32 + lane;
            #pragma unroll
            for (int r = 0; r < ROW_BLOCK; r++)
                weights[u][r] = load_once(p.qdata + min(row0 + r, p.N - 1) * p.qdata_row + chunk * 16, chunk < chunks);
        }
        #pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int chunk = first + (u * WARPS + warp) * 32 + lane, group = min(chunk, chunks - 1) * 32 / GROUP;
            #pragma unroll
            for (int z = 0; z < TENSORS; z++) {
                const char* base = (z ? p.zero_point : p.scale) + group * p.scale_group * SCALE_BYTES;
#if SCALE_VEC
                load_words(base + (i64)row0 * SCALE_BYTES, raw[u][z]);
#else
                #pragma unroll
                for (int r = 0; r < ROW_BLOCK; r++) {
                    const i64 at = min(row0 + r, p.N - 1) * p.scale_row;
                    if (SCALE_BYTES == 4) raw[u][z][r * SCALE_BYTES / 4] = ((const u32*)base)[at];
                    else if (r % 2 == 0) raw[u][z][r / 2] = ((const u16*)base)[at];
                    else raw[u][z][r / 2] |= (u32)((const u16*)base)[at] << 16;
                }
#endif
            }
        }
        if (first == 0) wait_for_previous_kernel();
        #pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int chunk = first + (u * WARPS + warp) * 32 + lane;
            float f[32];
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                float octet[8];
                load_octet(p, 0, chunk * 32 + j * 8, octet);
                apply_pre_scale(p, chunk * 32 + j * 8, octet);
                #pragma unroll
                for (int i = 0; i < 8; i++) f[j * 8 + i] = octet[i];
            }
            u32 amax_bits = magnitude(f), q[32];
            if (X_BLOCK == 128) {
                amax_bits = max(amax_bits, __shfl_xor_sync(~0u, amax_bits, 1));
                amax_bits = max(amax_bits, __shfl_xor_sync(~0u, amax_bits, 2));
            }
            const float d = to_integers(f, amax_bits, q);
            u32 sum = 0;
            #pragma unroll
            for (int i = 0; i < 32; i++) sum += q[i];
            const float x_scale = d * 0.0625f, x_sum = d * (float)(int)(sum - 32 * BIAS);
            u32 top[8], low[8];  // even k of 8, odd k of 8, ...: as the nibbles of a word
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                const u32* o = q + j / 2 * 8 + j % 2;
                // low bytes of both, then second bytes
                const u32 a = __byte_perm(o[0], o[2], 0x5140), b = __byte_perm(o[4], o[6], 0x5140);
                low[j] = __byte_perm(a, b, 0x5410);
                top[j] = TWO ? __byte_perm(a, b, 0x7632) : low[j];
            }
            #pragma unroll
            for (int r = 0; r < ROW_BLOCK; r++) {
                const u32 v[4] = {weights[u][r].x ^ FLIP, weights[u][r].y ^ FLIP, weights[u][r].z ^ FLIP, weights[u][r].w ^ FLIP};
                int dot = 0;
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    dot = dot4((v[j] << 4) & 0xf0f0f0f0u, top[2 * j], dot);
                    dot = dot4(v[j] & 0xf0f0f0f0u, top[2 * j + 1], dot);
                }
                if (TWO) {
                    dot <<= 8;
                    #pragma unroll
                    for (int j = 0; j < 4; j++) {
                        dot = dot4_unsigned_x((v[j] << 4) & 0xf0f0f0f0u, low[2 * j], dot);
                        dot = dot4_unsigned_x(v[j] & 0xf0f0f0f0u, low[2 * j + 1], dot);
                    }
                }
                float scale[TENSORS];
                #pragma unroll
                for (int z = 0; z < TENSORS; z++) {
                    const u32 word = raw[u][z][r * SCALE_BYTES / 4];
                    scale[z] = SCALE_BYTES == 4 ? __uint_as_float(word) : pick<SCALE_TYPE>(word, r & 1);
                }
                acc[r] += (float)dot * (scale[0] * x_scale);
                if (!SYMMETRIC) acc[r] += scale[TENSORS - 1] * x_sum;
            }
        }
    }

    // Sum over the lanes: each exchange halves the rows that a lane still holds, until one is left.
    #pragma unroll
    for (int rows = ROW_BLOCK / 2, o = 16; o; o >>= 1, rows >>= 1) {
        const bool upper = lane & o;
        if (rows) {
            #pragma unroll
            for (int r = 0; r < ROW_BLOCK / 2; r++) {
                if (r >= rows) break;
                const float send = upper ? acc[r] : acc[r + rows], keep = upper ? acc[r + rows] : acc[r];
                acc[r] = keep + __shfl_xor_sync(~0u, send, o);
            }
        } else acc[0] += __shfl_xor_sync(~0u, acc[0], o);
    }
    __shared__ float partial[WARPS][ROW_BLOCK];
    constexpr int LANES = 32 / ROW_BLOCK;  // that hold the same row
    if (lane % LANES == 0) partial[warp][lane / LANES] = acc[0];
    __syncthreads();
    const int row = row0 + threadIdx.x;
    if (threadIdx.x < ROW_BLOCK && row < p.N) {
        float sum = 0.f;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) sum += partial[w][threadIdx.x];
        if (p.bias) sum += load_as_float(p.bias, row, p.bias_type);
        store_from_float(p.out, row, sum);
    }
}
#endif
