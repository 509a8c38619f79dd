// int4 weight-only linear layer for a small batch (Hopper): out[M, N] = x[M, K] @ W[N, K].T + bias, M <= COLS <= 64.
//
//   value[n, k] = q[n, k] * scale[k / GROUP, n] + zero_point[k / GROUP, n]
//
// qdata holds two's complement nibbles, even k in the low one. Weights are dequantised in registers, rounded once to the dtype
// of x, and multiplied as the left operand of wgmma (rows of the instruction are rows of W, columns are rows of x); sums are
// float32. A small kernel in front (arrange_activations) puts x into the order in which wgmma reads it.
//
// Work split. A tile is up to ROWS consecutive weight rows; all tiles get nearly the same number, so that one wave of blocks
// fills the device. A block walks over its tiles in steps of 128 k, which its K_PARTS parts take in turn. With SPLIT > 1 a
// cluster of SPLIT blocks shares one tile, each block a part of K. Sums of all parts meet in (distributed) shared memory and
// are added up in a fixed order. Every thread has its own ring of weights (STAGES deep, cp.async); x comes through a ring of
// whole steps (X_STAGES deep, bulk copies) with a pair of barriers a stage. Warpgroups do not wait for one another.
//
// Order of k. The matrix instruction only needs its two operands to agree on the order of k, so the order is the one that
// makes the weights free of shuffles: of each step a thread (t = lane % 4) owns k = 32 t .. 32 t + 31 of its rows. That is 16
// bytes a row: it copies them to shared memory itself (cp.async), reads them back itself, and needs one group's scale. Word j
// of the 16 bytes holds k = 32 t + 8 j + 0..7, and `(word >> 4 i) & 0x000f000f` the pair (i, i + 4), which becomes two
// numbers of the operand with one more instruction (see `unpack`). So x is arranged as pairs (x[i], x[i + 4]).
//
// Order of rows. A thread of a warp holds rows i and i + 8 of 16 (i = lane / 4), of each of ROW_TILES instructions. Which weight
// rows those are is free as well: they are the 2 * ROW_TILES adjacent rows from 2 * ROW_TILES * i on, which makes the scales of
// a thread one load, and its outputs one store.
//
// Compile-time parameters (set by small_batch.py):
//   GROUP        32, 64, 128, 256
//   X_TYPE       dtype of x and out: 0 bfloat16, 1 float16; SCALE_TYPE that of scale and zero_point: these or 2 float32
//   SCALE_COPY   1: scales of a thread's rows are adjacent and aligned, and travel with the weights; 0: any layout, read one
//                by one a step ahead
//   COLS         rows of x rounded up to 8
//   WARPGROUPS, ROW_TILES, K_PARTS, STAGES, X_STAGES, SPLIT, MIN_CTAS    the shape of the work split
//   SYMMETRIC    1: nibbles are offset binary (q + 8) and there are no zero points; `zero_point` is not read

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;

struct Params {
    const char* qdata;        // int8 [N, K/2]
    const char* scale;        // [n_groups, N], by the two strides
    const char* zero_point;   // as scale
    const char* x;            // [M, K]
    const char* bias;         // [N] or null
    const char* pre_scale;    // [K] or null: multiplies x, in float32, rounded to the dtype of x
    char* out;                // [M, N], contiguous
    char* arranged;           // scratch: x as arrange_activations leaves it
    i64 qdata_row;            // bytes from one weight row to the next
    i64 scale_row;            // elements from one row's scale to the next row's
    i64 scale_group;          // elements from one group's scale to the next group's
    i64 x_row;                // elements
    int M, N, K;
    int row_unit;             // rows are dealt to tiles in units of so many:
    int units_per_tile;       // every block (cluster) takes so many units,
    int extra_units;          // the first `extra_units` one more
    int bias_type, pre_type;  // dtype codes as SCALE_TYPE
    int x_vector;             // 1: rows of x allow 16-byte loads
    int unused;
};

constexpr int STEP_K = 128;
constexpr int WARPS = 4 * WARPGROUPS;
constexpr int THREADS = 32 * WARPS;
constexpr int PART_WARPS = WARPS / K_PARTS;                // of a block that share rows take turns at the steps
[[maybe_unused]] constexpr int PART_THREADS = 32 * PART_WARPS;
constexpr int ROWS = 16 * PART_WARPS * ROW_TILES;
constexpr int OWN = 2 * ROW_TILES;                         // rows of a thread
constexpr int SCALE_BYTES = SCALE_TYPE == 2 ? 4 : 2;
constexpr int PIECE = OWN * SCALE_BYTES;                   // a thread's scales of one step
constexpr int TENSORS = SYMMETRIC ? 1 : 2;                 // scale, zero_point
constexpr bool PACKED = SCALE_TYPE == X_TYPE;              // dequantise two weights at a time
constexpr int WEIGHT_BYTES = THREADS * OWN * 16;
constexpr int STAGE_BYTES = WEIGHT_BYTES + SCALE_COPY * THREADS * TENSORS * PIECE;
constexpr int CHUNK_BYTES = COLS * 16;                     // 8 k of all columns
constexpr int X_BYTES = STEP_K / 8 * CHUNK_BYTES;
constexpr int SUMS = COLS / 2;                             // float32 sums of a thread, for each row tile
constexpr int COLUMNS = COLS / 4;                          // columns of a thread
constexpr u32 BIASED = X_TYPE == 0 || !PACKED ? 0x43084308u : 0x64086408u;  // 136 (bfloat16) or 1032 (float16), twice
constexpr u32 MAGIC = SYMMETRIC ? BIASED & 0xff00ff00u : BIASED;

__device__ __forceinline__ float to_float(u32 bits, int type) {
    if (type == 2) return __uint_as_float(bits);
    if (type == 0) return __uint_as_float(bits << 16);
    float f;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(bits));
    return f;
}
__device__ __forceinline__ u32 load_bits(const char* base, i64 i, int type) {
    return type == 2 ? ((const u32*)base)[i] : (u32)((const u16*)base)[i];
}
// Two floats, rounded to the dtype of x; the first in the low half.
__device__ __forceinline__ u32 round_pair(float low, float high) {
    u32 d;
    if (X_TYPE == 0) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// Asynchronous copies into shared memory; what is not `inside` is zeroed, and its address never read.
__device__ __forceinline__ void copy_weights(u32 dst, const char* src, bool inside) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(inside ? 16 : 0) : "memory");
}
template <int bytes> __device__ __forceinline__ void copy_scales(u32 dst, const char* src, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(dst), "l"(src), "r"(inside ? bytes : 0), "n"(bytes)
                 : "memory");
}
template <int words> __device__ __forceinline__ void load_words(const char* from, u32 (&to)[words]) {
    if constexpr (words == 4) {
        const uint4 v = *(const uint4*)from;
        to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
    } else if constexpr (words == 2) {
        const uint2 v = *(const uint2*)from;
        to[0] = v.x; to[1] = v.y;
    } else to[0] = *(const u32*)from;
}

// ------------------------------------------------------------------------------------------------------------------
// wgmma: d[64 rows of W, COLS] += a (registers, 64 x 16) * b (shared memory, 16 x COLS)
// ------------------------------------------------------------------------------------------------------------------
#if X_TYPE == 0
#define X_NAME "bf16"
#else
#define X_NAME "f16"
#endif
#define D4 "%0, %1, %2, %3"
#define D8 D4 ", %4, %5, %6, %7"
#define D12 D8 ", %8, %9, %10, %11"
#define D16 D12 ", %12, %13, %14, %15"
#define D20 D16 ", %16, %17, %18, %19"
#define D24 D20 ", %20, %21, %22, %23"
#define D28 D24 ", %24, %25, %26, %27"
#define D32 D28 ", %28, %29, %30, %31"
#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F8 F4(0), F4(4)
#define F12 F8, F4(8)
#define F16 F12, F4(12)
#define F20 F16, F4(16)
#define F24 F20, F4(20)
#define F28 F24, F4(24)
#define F32 F28, F4(28)
#define WGMMA(cols, sums, registers, a0, a1, a2, a3, desc)                                                              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" cols "k16.f32." X_NAME "." X_NAME                                  \
                 " {" sums "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" desc ", 1, 1, 1, 0;"                            \
                 : registers : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

__device__ __forceinline__ void multiply(float (&d)[SUMS], const u32* a, u64 b) {
#if COLS == 8
    WGMMA("8", D4, F4(0), "4", "5", "6", "7", "8");
#elif COLS == 16
    WGMMA("16", D8, F8, "8", "9", "10", "11", "12");
#elif COLS == 24
    WGMMA("24", D12, F12, "12", "13", "14", "15", "16");
#elif COLS == 32
    WGMMA("32", D16, F16, "16", "17", "18", "19", "20");
#elif COLS == 40
    WGMMA("40", D20, F20, "20", "21", "22", "23", "24");
#elif COLS == 48
    WGMMA("48", D24, F24, "24", "25", "26", "27", "28");
#elif COLS == 56
    WGMMA("56", D28, F28, "28", "29", "30", "31", "32");
#else
    WGMMA("64", D32, F32, "32", "33", "34", "35", "36");
#endif
}
__device__ __forceinline__ void begin_multiplies() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_multiplies() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int in_flight> __device__ __forceinline__ void wait_for_multiplies() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(in_flight) : "memory");
}
// Registers that a multiply may still be using stay where they are up to here.
template <int n> __device__ __forceinline__ void hold(u32 (&r)[n]) {
    #pragma unroll
    for (int i = 0; i < n; i++) asm volatile("" : "+r"(r[i])::"memory");
}
template <int n> __device__ __forceinline__ void hold(float (&r)[n]) {
    #pragma unroll
    for (int i = 0; i < n; i++) asm volatile("" : "+f"(r[i])::"memory");
}
// x in shared memory: no swizzle; 8 columns of 8 k are 128 adjacent bytes, the next 8 columns follow. (The upper bits of an
// address are the block's place in its cluster.)
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)((address & 0x3ffffu) >> 4) | (u64)(CHUNK_BYTES >> 4) << 16 | (u64)(128 >> 4) << 32;
}

// ------------------------------------------------------------------------------------------------------------------
// Weights: 8 nibbles of one row -> 4 registers of pairs (i, i + 4)
// ------------------------------------------------------------------------------------------------------------------
struct Factors {  // of one row: packed pairs if PACKED, else floats
    u32 scale, zero;
};
__device__ __forceinline__ u32 dequantise(u32 biased, const Factors& f) {
    if (PACKED) {
        u32 q, d;
        if (X_TYPE == 0) {
            asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(q) : "r"(biased), "r"(BIASED));
            if (SYMMETRIC) asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(q), "r"(f.scale));
            else asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(q), "r"(f.scale), "r"(f.zero));
        } else {
            asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(q) : "r"(biased), "r"(BIASED));
            if (SYMMETRIC) asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(q), "r"(f.scale));
            else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(q), "r"(f.scale), "r"(f.zero));
        }
        return d;
    }
    const float scale = __uint_as_float(f.scale), zero = SYMMETRIC ? 0.f : __uint_as_float(f.zero);
    const float low = __uint_as_float(biased << 16) - 136.f, high = __uint_as_float(biased & 0xffff0000u) - 136.f;
    return round_pair(fmaf(low, scale, zero), fmaf(high, scale, zero));
}
// Number i of a thread's scales as a factor; they are packed as they were copied, or one a word.
template <int words> __device__ __forceinline__ u32 factor(const u32 (&packed)[words], int i) {
    const bool pairs = SCALE_COPY && SCALE_BYTES == 2;
    const u32 word = packed[pairs ? i / 2 : i];
    const bool high = pairs && i % 2;
    if (PACKED) return __byte_perm(word, 0, high ? 0x3232 : 0x1010);
    return __float_as_uint(to_float(SCALE_BYTES == 4 ? word : high ? word >> 16 : word & 0xffffu, SCALE_TYPE));
}
// a[0..7]: the operands of two multiplies; this row's halves of each are at 0 and 2.
__device__ __forceinline__ void unpack(u32 word, const Factors& f, u32* a) {
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 biased;  // ((word >> 4i) & 0x000f000f) ^ MAGIC: BIASED + q, exactly (as C++, two instructions)
        asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(biased) : "r"(word >> (4 * i)), "r"(0x000f000fu), "r"(MAGIC));
        a[i / 2 * 4 + i % 2 * 2] = dequantise(biased, f);
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Activations
// arranged: [steps, 16 chunks, COLS, 4 t] pairs; those of chunk 4 j + i are (x[m, k + i], x[m, k + i + 4]), k = 32 t + 8 j.
// Each step is one copy into shared memory, as wgmma reads it. Rows and k past the last are zeros.
// ------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void load_octet(const Params& p, int m, int k, u32 (&v)[4]) {
    #pragma unroll
    for (int i = 0; i < 4; i++) v[i] = 0;
    if (m >= p.M || k >= p.K) return;
    const char* from = p.x + (m * p.x_row + k) * 2;
    if (p.x_vector) load_words(from, v);
    else {
        #pragma unroll
        for (int i = 0; i < 4; i++) v[i] = (u32)((const u16*)from)[2 * i] | (u32)((const u16*)from)[2 * i + 1] << 16;
    }
}
__device__ __forceinline__ void apply_pre_scale(const Params& p, int k, u32 (&v)[4]) {
    if (!p.pre_scale || k >= p.K) return;
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const float low = to_float(load_bits(p.pre_scale, k + 2 * i, p.pre_type), p.pre_type);
        const float high = to_float(load_bits(p.pre_scale, k + 2 * i + 1, p.pre_type), p.pre_type);
        v[i] = round_pair(to_float(v[i] & 0xffffu, X_TYPE) * low, to_float(v[i] >> 16, X_TYPE) * high);
    }
}
// Grid: a warp for each step, j and 8 rows.
extern "C" __global__ void arrange_activations(const __grid_constant__ Params p) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int unit = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31, t = lane & 3;
    const int j = unit % 4, step = unit / (COLS / 2), m = unit / 4 % (COLS / 8) * 8 + (lane >> 2), k = step * STEP_K + 32 * t + 8 * j;
    if (step * STEP_K >= p.K) return;
    u32 v[4];
    load_octet(p, m, k, v);
    apply_pre_scale(p, k, v);
    u32* to = (u32*)(p.arranged + (i64)step * X_BYTES + 4 * j * CHUNK_BYTES + m * 16 + t * 4);
    #pragma unroll
    for (int c = 0; c < 4; c++) to[c * (CHUNK_BYTES / 4)] = __byte_perm(v[c / 2], v[c / 2 + 2], c % 2 ? 0x7632 : 0x5410);
}

// Barriers in shared memory.
__device__ __forceinline__ void init_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_at(u32 barrier, u32 phase) {
    asm volatile("{.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;}" ::"r"(barrier), "r"(phase) : "memory");
}
// The copy of a step into shared memory arrives at a barrier.
__device__ __forceinline__ void copy_step(u32 dst, const char* src, u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(X_BYTES) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src),
                 "n"(X_BYTES), "r"(barrier) : "memory");
}
// The outputs of OWN adjacent rows of W for activation row m.
__device__ __forceinline__ void store_rows(const Params& p, int m, int row, int end_row, const float (&sum)[OWN]) {
    if (m >= p.M) return;
    char* to = p.out + ((i64)m * p.N + row) * 2;
    if (p.N % OWN == 0 && row + OWN <= end_row) {
        if (OWN == 4) *(uint2*)to = make_uint2(round_pair(sum[0], sum[1]), round_pair(sum[OWN - 2], sum[OWN - 1]));
        else *(u32*)to = round_pair(sum[0], sum[1]);
        return;
    }
    #pragma unroll
    for (int i = 0; i < OWN; i++)
        if (row + i < end_row) ((u16*)to)[i] = (u16)round_pair(sum[i], 0.f);
}

// ------------------------------------------------------------------------------------------------------------------
// Clusters
// ------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void add_remote(u32 address, int rank, float (&sum)[OWN]) {
    u32 remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    #pragma unroll
    for (int i = 0; i < OWN; i += 2) {
        float a, b;
        asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "r"(remote + i * 4) : "memory");
        sum[i] += a;
        sum[i + 1] += b;
    }
}

#if SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, MIN_CTAS) int4_small_batch(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, t = lane & 3;
    const int tile = blockIdx.x / SPLIT, rank = blockIdx.x % SPLIT;
    const int first_row = (tile * p.units_per_tile + min(tile, p.extra_units)) * p.row_unit;
    const int end_row = min(first_row + (p.units_per_tile + (tile < p.extra_units)) * p.row_unit, p.N);
    const int all_steps = (p.K + STEP_K - 1) / STEP_K;
    const int begin = rank * all_steps / SPLIT, end = (rank + 1) * all_steps / SPLIT;
    const int part = warp / PART_WARPS, steps = (end - begin + K_PARTS - 1) / K_PARTS;  // steps of each part
    const int total = (end_row - first_row + ROWS - 1) / ROWS * steps;
    const int own_row = first_row + warp % PART_WARPS * (16 * ROW_TILES) + (lane >> 2) * OWN;  // the thread's first row, in the first tile
    const u32 shared_address = (u32)__cvta_generic_to_shared(shared);
    const u32 x_address = shared_address + STAGES * STAGE_BYTES;
    const u32 filled = x_address + X_STAGES * X_BYTES, emptied = filled + 8 * X_STAGES;  // barriers of the stages of x
    asm volatile("griddepcontrol.launch_dependents;");
    if (tid == 0) {
        #pragma unroll
        for (int i = 0; i < X_STAGES; i++) {
            init_barrier(filled + 8 * i, 1);
            init_barrier(emptied + 8 * i, PART_WARPS);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    // Weights (and scales) of the thread's next step into a stage; a thread reads only what it copied itself.
    const int inside_steps = min(((p.K >> 5) - t + 3) >> 2, end);  // up to where its 32 k lie inside
    int load_step = begin + part, load_row = own_row, loads = 0;
    u32 load_stage = 0;
    const char* weights = p.qdata + own_row * p.qdata_row + load_step * (STEP_K / 2) + t * 16;
    const i64 next_tile = ROWS * p.qdata_row - steps * (K_PARTS * STEP_K / 2);
    constexpr int GROUPS = K_PARTS * STEP_K / GROUP;               // from one step to the next; 0 is a half
    const i64 scale_step_bytes = max(GROUPS, 1) * p.scale_group * SCALE_BYTES;
    const i64 scale_begin = ((load_step * STEP_K + t * 32) / GROUP * p.scale_group + own_row) * SCALE_BYTES;
    i64 scale_at = scale_begin;
    auto issue = [&]() {
        if (loads < total) {
            const bool inside = load_step < inside_steps;
            const u32 to = shared_address + load_stage + tid * 16;
            #pragma unroll
            for (int i = 0; i < OWN; i++)
                copy_weights(to + i * (THREADS * 16), weights + i * p.qdata_row, inside && load_row + i < end_row);
            if (SCALE_COPY) {
                const u32 scales = shared_address + load_stage + WEIGHT_BYTES + tid * PIECE;
                copy_scales<PIECE>(scales, p.scale + scale_at, inside && load_row < end_row);
                if (!SYMMETRIC)
                    copy_scales<PIECE>(scales + THREADS * PIECE, p.zero_point + scale_at, inside && load_row < end_row);
                if (GROUPS || load_step % 2) scale_at += scale_step_bytes;
            }
            weights += K_PARTS * STEP_K / 2;
            load_step += K_PARTS;
            if (load_step >= end + part) {
                load_step = begin + part;
                load_row += ROWS;
                weights += next_tile;
                scale_at = scale_begin + (load_row - own_row) * SCALE_BYTES;
            }
            loads++;
            load_stage = load_stage == (STAGES - 1) * STAGE_BYTES ? 0 : load_stage + STAGE_BYTES;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    #pragma unroll
    for (int i = 0; i < STAGES - 1; i++) issue();

    // The same for scales in any layout, one step ahead, in registers.
    u32 raw[TENSORS][OWN];
    int scale_step = begin + part, scale_row = own_row;
    auto load_scales = [&]() {
        const i64 group = (scale_step * STEP_K + t * 32) / GROUP;
        #pragma unroll
        for (int i = 0; i < OWN; i++) {
            const bool inside = scale_step < inside_steps && scale_row + i < end_row;
            const i64 at = group * p.scale_group + (scale_row + i) * p.scale_row;
            raw[0][i] = inside ? load_bits(p.scale, at, SCALE_TYPE) : 0;
            if (!SYMMETRIC) raw[TENSORS - 1][i] = inside ? load_bits(p.zero_point, at, SCALE_TYPE) : 0;
        }
        scale_step += K_PARTS;
        if (scale_step >= end + part) {
            scale_step = begin + part;
            scale_row += ROWS;
        }
    };
    if (!SCALE_COPY && total > 0) load_scales();

    // Weights do not depend on the kernel before this one; activations do, and so does the memory of `out`.
    asm volatile("griddepcontrol.wait;" ::: "memory");

    // Activations, some steps ahead; one thread brings them for all.
    int x_step = begin, x_loads = 0, x_to = 0;
    u32 x_to_phase = 1;
    auto issue_x = [&]() {
        if (x_loads++ >= total * K_PARTS) return;
        wait_at(emptied + 8 * x_to, x_to_phase);
        copy_step(x_address + x_to * X_BYTES, p.arranged + (i64)min(x_step, end - 1) * X_BYTES, filled + 8 * x_to);
        if (++x_step == begin + steps * K_PARTS) x_step = begin;
        if (++x_to == X_STAGES) {
            x_to = 0;
            x_to_phase ^= 1;
        }
    };
    if (tid == 0) {
        #pragma unroll
        for (int i = 0; i < X_STAGES - 2 * K_PARTS; i++) issue_x();
    }

    u32 a[2][16];  // operands of the multiplies in flight, and of the next ones
    #pragma unroll
    for (int i = 0; i < 16; i++) a[0][i] = a[1][i] = 0;

    u32 stage = 0, x_stage = part, x_phase = 0;
    int left = total;  // steps not yet done
    for (int tile_row = own_row; tile_row - own_row + first_row < end_row; tile_row += ROWS) {
        float acc[ROW_TILES][SUMS];
        #pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
            #pragma unroll
            for (int i = 0; i < SUMS; i++) acc[r][i] = 0.f;

        for (int step = 0; step < steps; step++, left--) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");

            u32 words[OWN][4];
            #pragma unroll
            for (int i = 0; i < OWN; i++) load_words(shared + stage + (i * THREADS + tid) * 16, words[i]);
            Factors factors[OWN];
            u32 packed[TENSORS][SCALE_COPY ? PIECE / 4 : OWN];
            #pragma unroll
            for (int z = 0; z < TENSORS; z++) {
                if constexpr (SCALE_COPY) load_words(shared + stage + WEIGHT_BYTES + (z * THREADS + tid) * PIECE, packed[z]);
                else {
                    #pragma unroll
                    for (int i = 0; i < OWN; i++) packed[z][i] = raw[z][i];
                }
            }
            #pragma unroll
            for (int i = 0; i < OWN; i++) {
                factors[i].scale = factor(packed[0], i);
                factors[i].zero = factor(packed[TENSORS - 1], i);
            }
            issue();
            if (tid == 0) {
                #pragma unroll
                for (int i = 0; i < K_PARTS; i++) issue_x();
            }
            if (!SCALE_COPY && left > 1) load_scales();
            wait_at(filled + 8 * x_stage, x_phase);

            const u64 x = descriptor(x_address + x_stage * X_BYTES);
            #pragma unroll
            for (int half = 0; half < 2; half++)
                #pragma unroll
                for (int r = 0; r < ROW_TILES; r++) {
                    u32(&operand)[16] = a[(half * ROW_TILES + r) % 2];
                    wait_for_multiplies<1>();
                    hold(operand);
                    if (half * ROW_TILES + r == 1 && left < total && lane == 0)  // the step before is done
                        arrive(emptied + 8 * (x_stage < K_PARTS ? x_stage + X_STAGES - K_PARTS : x_stage - K_PARTS));
                    #pragma unroll
                    for (int j = 0; j < 2; j++)
                        #pragma unroll
                        for (int b = 0; b < 2; b++)
                            unpack(words[2 * r + b][2 * half + j], factors[2 * r + b], operand + 8 * j + b);
                    begin_multiplies();
                    #pragma unroll
                    for (int i = 0; i < 4; i++)
                        multiply(acc[r], operand + 4 * i, x + (half * 4 + i) * (2 * CHUNK_BYTES >> 4));
                    commit_multiplies();
                }
            stage = stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
            x_stage += K_PARTS;
            if (x_stage >= X_STAGES) {
                x_stage -= X_STAGES;
                x_phase ^= 1;
            }
        }
        wait_for_multiplies<0>();
        #pragma unroll
        for (int i = 0; i < 2; i++) hold(a[i]);
        #pragma unroll
        for (int r = 0; r < ROW_TILES; r++) hold(acc[r]);

        float bias[OWN];
        #pragma unroll
        for (int i = 0; i < OWN; i++)
            bias[i] = p.bias && tile_row + i < end_row
                          ? to_float(load_bits(p.bias, tile_row + i, p.bias_type), p.bias_type) : 0.f;
#if SPLIT * K_PARTS == 1
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            float sum[OWN];
            #pragma unroll
            for (int i = 0; i < OWN; i++) sum[i] = acc[i / 2][c / 2 * 4 + i % 2 * 2 + c % 2] + bias[i];
            store_rows(p, c / 2 * 8 + t * 2 + c % 2, tile_row, end_row, sum);
        }
#else
        // Parts of the sums meet in shared memory; each part of each block of the cluster adds up some of the columns.
        if (SPLIT > 1) __syncthreads();  // they lie where the ring was
        const int own = tid % PART_THREADS;
        const u32 parts = shared_address + (SPLIT > 1 ? 0 : STAGES * STAGE_BYTES + X_STAGES * (X_BYTES + 16));
        constexpr int PARTS_BYTES = COLUMNS * PART_THREADS * OWN * 4;  // [K_PARTS][COLUMNS][PART_THREADS][OWN]
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++)
            #pragma unroll
            for (int i = 0; i < OWN; i += 2) {
                const int at = c / 2 * 4 + c % 2;
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(parts + part * PARTS_BYTES + ((c * PART_THREADS + own) * OWN + i) * 4),
                             "f"(acc[i / 2][at]), "f"(acc[i / 2][at + 2]) : "memory");
            }
        SPLIT > 1 ? cluster_barrier() : __syncthreads();
        constexpr int SHARERS = SPLIT * K_PARTS;
        #pragma unroll
        for (int j = 0; j < (COLUMNS + SHARERS - 1) / SHARERS; j++) {
            const int c = j * SHARERS + rank * K_PARTS + part;
            if (COLUMNS % SHARERS && c >= COLUMNS) break;
            float sum[OWN];
            #pragma unroll
            for (int i = 0; i < OWN; i++) sum[i] = 0.f;
            #pragma unroll
            for (int other = 0; other < SHARERS; other++)
                add_remote(parts + other % K_PARTS * PARTS_BYTES + (c * PART_THREADS + own) * (OWN * 4), other / K_PARTS, sum);
            #pragma unroll
            for (int i = 0; i < OWN; i++) sum[i] += bias[i];
            store_rows(p, c / 2 * 8 + t * 2 + c % 2, tile_row, end_row, sum);
        }
        SPLIT > 1 ? cluster_barrier() : __syncthreads();  // the parts stay until all have read them
#endif
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}
