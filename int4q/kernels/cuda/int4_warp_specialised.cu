// int4 weight-only linear layer for 8 to 64 rows of x (Hopper): out[M, N] = x[M, K] @ W[N, K].T + bias, M <= COLS <= 64.
//
//   value[n, k] = q[n, k] * scale[k / GROUP, n] + zero_point[k / GROUP, n]
//
// qdata holds two's complement nibbles, even k in the low one. Weights are the left operand of wgmma, from registers (rows of the
// instruction are rows of W, columns are rows of x); sums are float32. A small kernel in front (arrange_activations) puts x into
// the order in which wgmma reads it.
//
// Roles. One warpgroup copies: a single thread asks the copy engine (TMA) for a ring of STAGES steps of 256 k: a box of weights,
// one of scales, one of zero points, straight from the tensors, and the step's x. WARPGROUPS others multiply, 64 weight rows each;
// registers move from the first to the others (setmaxnreg). A stage is `full` when its bytes are there and `empty` when every warp
// that multiplies it is done with it. Scales that the copy engine cannot read (odd strides, [N, n_groups] in memory) come through
// the three warps beside the copying one.
//
// Work split. The work is a list of steps, tile after tile of TILE_ROWS weight rows. With SPLIT * K_PARTS = 1 every block takes an
// equal share of the list, so that no multiprocessor waits for another; blocks that share a tile leave their sums in memory, and
// the one that comes last adds them up in the order of k: no block waits, and results repeat bit for bit. For few rows, a cluster
// of SPLIT blocks shares a tile by parts of K instead, and in a block K_PARTS parts of the warpgroups take the steps in turn; the
// sums meet in (distributed) shared memory.
//
// Order of k. wgmma only needs its operands to agree on it. A word of 8 nibbles is k = 32 c + 8 t + 0..7 of chunk c (t = lane % 4),
// as ldmatrix hands raw bytes to the lanes; `(word >> 4 i) & 0x000f000f` is the pair (i, i + 4). So x is arranged as pairs
// (x[i], x[i + 4]), and the 32 k of a chunk are two consecutive multiplies: every group of 32 or more is some of them.
//
// Order of rows. A thread of a warp holds rows i and i + 8 of 16 (i = lane / 4) of the instruction. They are rows 2 i and 2 i + 1
// of the weight (for i >= 4 the other way round, which keeps ldmatrix free of bank conflicts under the 128-byte swizzle): their
// scales are one load and their outputs one store.
//
// Two ways to scale:
//   SCALE_SUMS 1: wgmma multiplies BASE + q, exactly; each group's sums are scaled afterwards, in float32, and BASE and the zero
//                 point leave through the sums of x over the group, which travel behind x. Weights are not rounded.
//   SCALE_SUMS 0: weights are scaled in registers, rounded once to the dtype of x. Takes fewer registers.
//
// Compile-time parameters (set by warp_specialised.py):
//   GROUP        32, 64, 128, 256
//   X_TYPE       dtype of x and out: 0 bfloat16, 1 float16; SCALE_TYPE that of scale and zero_point: these or 2 float32
//   SCALE_BYTES_LOADED   0: the copy engine brings the scales; else bytes of one load of them (of adjacent groups)
//   SYMMETRIC    1: nibbles are offset binary (q + 8) and there are no zero points; `zero_point` is not read
//   COLS         rows of x rounded up to 8
//   WARPGROUPS, K_PARTS, SPLIT, STAGES (a multiple of K_PARTS)
//   EARLY        stages (fewer than all) whose weights are asked for before x is there; x would have to queue behind more of them
//   SCALE_SUMS, CHUNKS   (1 or 2) of 32 k that are multiplied at a time
//   REGISTERS    of a thread at launch, a multiple of 8; with what is left over a block of arrange_activations fits beside this one

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
    char* scratch;            // x as arrange_activations leaves it; then the counters and sums of shared tiles
    i64 qdata_row;            // bytes from one weight row to the next
    i64 scale_row;            // elements from one row's scale to the next row's
    i64 scale_group;          // elements from one group's scale to the next group's
    i64 x_row;                // elements
    int M, N, K;
    int tile_rows;            // rows of a tile, a multiple of 8
    int steps_per_block;      // SPLIT * K_PARTS = 1: every block takes so many steps,
    int extra_steps;          // the first `extra_steps` one more
    int bias_type, pre_type;  // dtype codes as SCALE_TYPE
    int x_vector;             // 1: rows of x allow 16-byte loads
    int unused;
};
struct alignas(64) TensorMap { u64 words[16]; };
struct Maps {
    TensorMap weights;
#if !SCALE_BYTES_LOADED
    TensorMap scales, zero_points;
#endif
};

constexpr int STEP_K = 256;
constexpr int WARPS = 4 * WARPGROUPS;                       // that multiply
constexpr int PART_WARPS = WARPS / K_PARTS;                 // of them share a step
constexpr int TILE_ROWS = 16 * PART_WARPS;                  // the most rows of a tile
constexpr bool STREAM = SPLIT * K_PARTS == 1;               // blocks share the list of steps evenly
constexpr int TENSORS = SYMMETRIC ? 1 : 2;                  // scale, zero_point
constexpr int SCALE_ITEM = SCALE_TYPE == 2 ? 4 : 2;
constexpr int GROUPS = STEP_K / GROUP;                      // of a step
constexpr int PART_K = GROUP < 128 ? GROUP : 128;           // k that are summed up before they are scaled (SCALE_SUMS)
constexpr int PARTS = STEP_K / PART_K;
constexpr int BATCHES = 8 / CHUNKS;                         // of a step, each committed at once
constexpr int SETS = 32 * CHUNKS > PART_K ? 4 : 2;          // of sums that are in use at a time (SCALE_SUMS)
constexpr int SUMS = COLS / 2;                              // float32 sums of a thread
constexpr int UNITS = COLS / 4;                             // pairs of them that are adjacent outputs
constexpr bool PACKED = SCALE_TYPE == X_TYPE && !SCALE_SUMS;  // two weights are scaled at a time
constexpr bool RELEASE_AT_ONCE = SCALE_SUMS || K_PARTS > 1;   // a stage, not during the step after it

// A stage of the ring: weights [TILE_ROWS, 128 bytes] swizzled, x, sums of x, scales [GROUPS, TILE_ROWS], zero points.
constexpr int CHUNK_BYTES = COLS * 16;                      // 8 k of all columns
constexpr int X_SUMS_AT = STEP_K / 8 * CHUNK_BYTES;
constexpr int X_BYTES = X_SUMS_AT + SCALE_SUMS * PARTS * COLS * 4;
constexpr int X_AT = TILE_ROWS * 128;
constexpr int SCALES_AT = X_AT + (X_BYTES + 127) / 128 * 128;
constexpr int SCALES_BYTES = GROUPS * TILE_ROWS * SCALE_ITEM;
constexpr int STAGE_BYTES = (SCALES_AT + TENSORS * SCALES_BYTES + 1023) / 1024 * 1024;
constexpr int BARRIERS_AT = STAGES * STAGE_BYTES;           // `full` and `empty` of each stage

// Registers: setmaxnreg waits for ever if there are not so many, so what the consumers get is what the launch had, less COPYING.
constexpr int COPYING = SCALE_BYTES_LOADED ? 32 : 24;
constexpr int MULTIPLYING_ALL = ((WARPGROUPS + 1) * REGISTERS - COPYING) / WARPGROUPS / 8 * 8;
constexpr int MULTIPLYING = MULTIPLYING_ALL < 240 ? MULTIPLYING_ALL : 240;
static_assert(STAGES % K_PARTS == 0 && EARLY < STAGES && REGISTERS % 8 == 0, "see above");

// A nibble becomes a number by replacing low bits of a mantissa: of 128 in bfloat16, and of 64 in float16 (four bits further up).
// Two's complement nibbles have their sign bit flipped on the way, which makes all of them q + 8: BASE + q.
constexpr bool BFLOAT = X_TYPE == 0 || !(SCALE_SUMS || PACKED);  // (what is scaled as float32 is unpacked as bfloat16)
constexpr u32 BASE_PAIR = BFLOAT ? 0x43084308u : 0x54805480u;
constexpr float BASE = BFLOAT ? 136.f : 72.f;
constexpr u32 MASK = BFLOAT ? 0x000f000fu : 0x00f000f0u;
constexpr u32 MAGIC = SYMMETRIC ? BASE_PAIR & 0xff00ff00u : BASE_PAIR;

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

// ------------------------------------------------------------------------------------------------------------------
// Activations
// scratch: for each step 32 chunks [COLS, 4 t] of pairs; chunk 4 c + i holds (x[m, k + i], x[m, k + i + 4]), k = 32 c + 8 t.
// With SCALE_SUMS float32 sums [PARTS, COLS] of x follow. Rows and k past the last are zeros.
// ------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ int steps_of(const Params& p) { return (p.K + STEP_K - 1) / STEP_K; }
__device__ __forceinline__ int tiles_of(const Params& p) { return (p.N + p.tile_rows - 1) / p.tile_rows; }
__device__ __forceinline__ int* counters_of(const Params& p) { return (int*)(p.scratch + (i64)steps_of(p) * X_BYTES); }

__device__ __forceinline__ uint4 load_octet(const Params& p, int m, int k) {
    if (m >= p.M || k >= p.K) return make_uint4(0, 0, 0, 0);
    const char* from = p.x + (m * p.x_row + k) * 2;
    if (p.x_vector) return *(const uint4*)from;
    const u16* one = (const u16*)from;
    return make_uint4(one[0] | one[1] << 16, one[2] | one[3] << 16, one[4] | one[5] << 16, one[6] | one[7] << 16);
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
__device__ __forceinline__ float sum_of(const u32 (&v)[4]) {
    float sum = 0.f;
    #pragma unroll
    for (int i = 0; i < 4; i++) sum += to_float(v[i] & 0xffffu, X_TYPE) + to_float(v[i] >> 16, X_TYPE);
    return sum;
}
// 32 k of a row each thread, 128 a warp.
__device__ __forceinline__ void arrange_half_step(const Params& p, int half, int m, int t) {
    uint4 loaded[4];
    #pragma unroll
    for (int c = 0; c < 4; c++) loaded[c] = load_octet(p, m, half * 128 + c * 32 + t * 8);
    char* step = p.scratch + (i64)(half >> 1) * X_BYTES;
    float total = 0.f;
    #pragma unroll
    for (int c = 0; c < 4; c++) {
        u32 v[4] = {loaded[c].x, loaded[c].y, loaded[c].z, loaded[c].w};
        apply_pre_scale(p, half * 128 + c * 32 + t * 8, v);
        u32* to = (u32*)(step + ((half & 1) * 16 + 4 * c) * CHUNK_BYTES + m * 16 + t * 4);
        #pragma unroll
        for (int i = 0; i < 4; i++) to[i * (CHUNK_BYTES / 4)] = __byte_perm(v[i / 2], v[i / 2 + 2], i % 2 ? 0x7632 : 0x5410);
        if (!SCALE_SUMS) continue;
        float sum = sum_of(v);
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        total += sum;
        if ((c + 1) * 32 % PART_K) continue;
        const int part = (half & 1) * 128 / PART_K + c * 32 / PART_K;
        if (t == 0) ((float*)(step + X_SUMS_AT))[part * COLS + m] = total;
        total = 0.f;
    }
}
// Grid: a warp for 8 rows and 128 k. (32 registers a thread, so that a block fits beside one of the product before.)
extern "C" __global__ void __launch_bounds__(128, 16) arrange_activations(const __grid_constant__ Params p) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int thread = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x & 31, unit = thread >> 5;
    const int half = unit / (COLS / 8), m = unit % (COLS / 8) * 8 + (lane >> 2);
    if (STREAM)
        for (int i = thread; i < tiles_of(p) * WARPS; i += gridDim.x * blockDim.x) counters_of(p)[i] = 0;
    if (half < 2 * steps_of(p)) arrange_half_step(p, half, m, lane & 3);
}

// ------------------------------------------------------------------------------------------------------------------
// Instructions
// ------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void init_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_at(u32 barrier, u32 phase) {
    asm volatile("{.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;}" ::"r"(barrier), "r"(phase) : "memory");
}
__device__ __forceinline__ void copy_box(u32 dst, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(dst), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_bytes(u32 dst, const char* src, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src),
                 "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void multiplying_barrier() {  // of the warpgroups that multiply
    asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory");
}
__device__ __forceinline__ u32 rank_in_cluster() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void load_matrices(u32 (&w)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ u32 load_word(u32 address) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ float2 load_floats(u32 address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}

// wgmma: d[64 rows of W, COLS] = a (registers, 64 x 16) * b (shared memory, 16 x COLS), plus d if `add`
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
#define WGMMA(cols, sums, registers, a0, a1, a2, a3, desc, plus)                                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" cols "k16.f32." X_NAME "." X_NAME                                  \
                 " {" sums "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" desc ", %" plus ", 1, 1, 0;"                    \
                 : registers : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add))
template <int add> __device__ __forceinline__ void multiply(float (&d)[SUMS], const u32* a, u64 b) {
#if COLS == 8
    WGMMA("8", D4, F4(0), "4", "5", "6", "7", "8", "9");
#elif COLS == 16
    WGMMA("16", D8, F8, "8", "9", "10", "11", "12", "13");
#elif COLS == 24
    WGMMA("24", D12, F12, "12", "13", "14", "15", "16", "17");
#elif COLS == 32
    WGMMA("32", D16, F16, "16", "17", "18", "19", "20", "21");
#elif COLS == 40
    WGMMA("40", D20, F20, "20", "21", "22", "23", "24", "25");
#elif COLS == 48
    WGMMA("48", D24, F24, "24", "25", "26", "27", "28", "29");
#elif COLS == 56
    WGMMA("56", D28, F28, "28", "29", "30", "31", "32", "33");
#else
    WGMMA("64", D32, F32, "32", "33", "34", "35", "36", "37");
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
// The list of steps
// ------------------------------------------------------------------------------------------------------------------
struct Work {
    int steps;       // of a tile
    int begin, end;  // this block's part of the list
};
__device__ __forceinline__ int first_step_of(const Params& p, int block) {
    return block * p.steps_per_block + min(block, p.extra_steps);
}
__device__ __forceinline__ int block_of(const Params& p, int step) {
    const int longer = p.extra_steps * (p.steps_per_block + 1);
    return step < longer ? step / (p.steps_per_block + 1) : p.extra_steps + (step - longer) / p.steps_per_block;
}
__device__ __forceinline__ Work work_of(const Params& p) {
    const int steps = steps_of(p);
    if (STREAM) return {steps, first_step_of(p, blockIdx.x), first_step_of(p, blockIdx.x + 1)};
    const int rank = blockIdx.x % SPLIT, first = blockIdx.x / SPLIT * steps;
    return {steps, first + rank * steps / SPLIT, first + (rank + 1) * steps / SPLIT};
}
__device__ __forceinline__ u32 full(u32 ring, int stage) { return ring + BARRIERS_AT + 16 * stage; }
__device__ __forceinline__ u32 empty(u32 ring, int stage) { return full(ring, stage) + 8; }

// ------------------------------------------------------------------------------------------------------------------
// Copying
// ------------------------------------------------------------------------------------------------------------------
struct Cursor {  // over the list of steps
    int row, step;  // first row of the tile; step of the tile
    __device__ __forceinline__ Cursor(const Params& p, const Work& work)
        : row(work.begin / work.steps * p.tile_rows), step(work.begin % work.steps) {}
    __device__ __forceinline__ void advance(const Params& p, const Work& work) {
        if (++step == work.steps) step = 0, row += p.tile_rows;
    }
};
__device__ __forceinline__ void copy_steps(const Params& p, const Maps& maps, u32 ring) {
    const Work work = work_of(p);
    auto copy_weights = [&](const Cursor& at, int stage) {
        const u32 to = ring + stage * STAGE_BYTES, barrier = full(ring, stage);
        expect(barrier, p.tile_rows * 128 + X_BYTES + (SCALE_BYTES_LOADED ? 0 : TENSORS * SCALES_BYTES));
        copy_box(to, &maps.weights, at.step * 128, at.row, barrier);
#if !SCALE_BYTES_LOADED
        copy_box(to + SCALES_AT, &maps.scales, at.row, at.step * GROUPS, barrier);
        if (!SYMMETRIC) copy_box(to + SCALES_AT + SCALES_BYTES, &maps.zero_points, at.row, at.step * GROUPS, barrier);
#endif
    };
    auto copy_x = [&](const Cursor& at, int stage) {
        copy_bytes(ring + stage * STAGE_BYTES + X_AT, p.scratch + (i64)at.step * X_BYTES, X_BYTES, full(ring, stage));
    };
    const int total = work.end - work.begin, early = min(EARLY, total);
    Cursor at(p, work), x_at = at;
    #pragma unroll 1
    for (int i = 0; i < early; i++, at.advance(p, work)) copy_weights(at, i);
    // Weights do not depend on the kernel before this one; activations do.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    #pragma unroll 1
    for (int i = 0; i < early; i++, x_at.advance(p, work)) copy_x(x_at, i);
    int stage = early;
    u32 phase = 1;  // the first time round no stage is waited for
    #pragma unroll 1
    for (int i = early; i < total; i++, at.advance(p, work)) {
        wait_at(empty(ring, stage), phase);
        copy_weights(at, stage);
        copy_x(at, stage);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

#if SCALE_BYTES_LOADED
// Scales in any layout, SCALE_BYTES_LOADED of a row at a time, into the place where the copy engine would put them.
constexpr int LOADED = SCALE_BYTES_LOADED / SCALE_ITEM;  // adjacent groups of one load
constexpr int LOADERS = 96;
__device__ __forceinline__ void load_piece(u32 (&piece)[LOADED], const char* from, bool inside) {
    u32 words[4] = {0, 0, 0, 0};
    if (inside) {
        if constexpr (SCALE_BYTES_LOADED == 16) {
            const uint4 v = *(const uint4*)from;
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else if constexpr (SCALE_BYTES_LOADED == 8) {
            const uint2 v = *(const uint2*)from;
            words[0] = v.x, words[1] = v.y;
        } else if constexpr (SCALE_BYTES_LOADED == 4) words[0] = *(const u32*)from;
        else words[0] = *(const u16*)from;
    }
    #pragma unroll
    for (int i = 0; i < LOADED; i++) piece[i] = SCALE_ITEM == 4 ? words[i] : words[i / 2] >> (i % 2 * 16);
}
__device__ __forceinline__ void store_piece(const u32 (&piece)[LOADED], u32 to) {
    #pragma unroll
    for (int i = 0; i < LOADED; i++) {
        const u32 at = to + i * (TILE_ROWS * SCALE_ITEM);
        if (SCALE_ITEM == 4) asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(piece[i]) : "memory");
        else asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"((u16)piece[i]) : "memory");
    }
}
__device__ __forceinline__ void load_scales(const Params& p, u32 ring, int thread) {
    const Work work = work_of(p);
    const int groups = p.K / GROUP;
    Cursor at(p, work);
    int stage = 0;
    u32 phase = 1;  // the first time round no stage is waited for
    for (int s = work.begin; s < work.end; s++, at.advance(p, work)) {
        const u32 to = ring + stage * STAGE_BYTES + SCALES_AT;
        wait_at(empty(ring, stage), phase);
        #pragma unroll 2
        for (int i = thread; i < TILE_ROWS * (GROUPS / LOADED); i += LOADERS) {
            const int r = i % TILE_ROWS, g = i / TILE_ROWS * LOADED;
            const int row = at.row + r, group = at.step * GROUPS + g;
            const bool inside = row < p.N && group < groups;
            const i64 from = (group * p.scale_group + row * p.scale_row) * SCALE_ITEM;
            u32 scale[LOADED], zero[LOADED];
            load_piece(scale, p.scale + from, inside);
            if (!SYMMETRIC) load_piece(zero, p.zero_point + from, inside);
            store_piece(scale, to + (g * TILE_ROWS + r) * SCALE_ITEM);
            if (!SYMMETRIC) store_piece(zero, to + SCALES_BYTES + (g * TILE_ROWS + r) * SCALE_ITEM);
        }
        __syncwarp();
        if (thread % 32 == 0) arrive(full(ring, stage));
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}
#endif

// ------------------------------------------------------------------------------------------------------------------
// Multiplying
// ------------------------------------------------------------------------------------------------------------------
struct Place {  // of a thread in its part of the block
    int part, row;       // which part; the first of its two rows in the tile
    int t;
    bool swapped;        // the instruction's first row is the second of the two
    u32 weights;         // address of what it gives ldmatrix, in the first stage
    u32 scales;          // address of its rows' scales of a step's first group, in the first stage
};
__device__ __forceinline__ Place place_of(u32 ring, int warp, int lane) {
    const int slot = warp % PART_WARPS, octet = lane >> 2;
    const int row = 2 * (lane & 7) + (((lane >> 3) & 1) ^ (octet & 1));  // whose address ldmatrix gets
    Place place;
    place.part = warp / PART_WARPS;
    place.row = slot * 16 + 2 * octet;
    place.t = lane & 3;
    place.swapped = octet >= 4;
    place.weights = ring + (slot * 16 + row) * 128 + (((lane >> 4) ^ (row & 7)) * 16);
    place.scales = ring + SCALES_AT + place.row * SCALE_ITEM;
    return place;
}

struct Factors {  // of the instruction's two rows: packed pairs if PACKED, else floats
    u32 scale[2], zero[2];
};
__device__ __forceinline__ void load_pair(u32 address, bool swapped, u32 (&f)[2]) {
    if constexpr (SCALE_ITEM == 4) {
        const float2 pair = load_floats(address);
        f[0] = __float_as_uint(swapped ? pair.y : pair.x), f[1] = __float_as_uint(swapped ? pair.x : pair.y);
    } else {
        // a half twice (PACKED), in the upper half (bfloat16 as a float), or in the lower one
        constexpr u32 first = PACKED ? 0x1010 : SCALE_TYPE == 0 ? 0x1044 : 0x4410;
        constexpr u32 second = PACKED ? 0x3232 : SCALE_TYPE == 0 ? 0x3244 : 0x4432;
        const u32 pair = load_word(address);
        f[0] = __byte_perm(pair, 0, swapped ? second : first), f[1] = __byte_perm(pair, 0, swapped ? first : second);
        if constexpr (!PACKED && SCALE_TYPE == 1)
            f[0] = __float_as_uint(to_float(f[0], 1)), f[1] = __float_as_uint(to_float(f[1], 1));
    }
}
__device__ __forceinline__ Factors load_factors(const Place& place, u32 offset, int group) {
    const u32 at = place.scales + offset + group * (TILE_ROWS * SCALE_ITEM);
    Factors f;
    load_pair(at, place.swapped, f.scale);
    if (SYMMETRIC) f.zero[0] = f.zero[1] = 0;
    else load_pair(at + SCALES_BYTES, place.swapped, f.zero);
    return f;
}

// Pair i of 8 nibbles, as BASE + q. (The logical operation as C++ would be two instructions.)
__device__ __forceinline__ u32 unpack(u32 word, int i) {
    u32 pair;
    const u32 shifted = BFLOAT ? word >> (4 * i) : i == 0 ? word << 4 : word >> (4 * i - 4);
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(pair) : "r"(shifted), "r"(MASK), "r"(MAGIC));
    return pair;
}
// Such a pair scaled, and rounded once to the dtype of x.
__device__ __forceinline__ u32 scaled(u32 pair, u32 scale, u32 zero) {
    if (!PACKED) {
        const float s = __uint_as_float(scale), z = __uint_as_float(zero);
        const float low = __uint_as_float(pair << 16) - BASE, high = __uint_as_float(pair & 0xffff0000u) - BASE;
        return round_pair(fmaf(low, s, z), fmaf(high, s, z));
    }
    u32 q, d;
    if (X_TYPE == 0) {
        asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(q) : "r"(pair), "r"(BASE_PAIR));
        if (SYMMETRIC) asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(q), "r"(scale));
        else asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(q), "r"(scale), "r"(zero));
    } else {
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(q) : "r"(pair), "r"(BASE_PAIR));
        if (SYMMETRIC) asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(q), "r"(scale));
        else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(q), "r"(scale), "r"(zero));
    }
    return d;
}

struct Sums {
    float all[SUMS];
    float parts[SETS][SUMS];     // of PART_K each, not yet scaled (SCALE_SUMS)
    u32 operands[2][8 * CHUNKS]; // of the multiplies in flight, and of the next ones
};
// The sums of a step's part into those of the tile.
__device__ __forceinline__ void scale_part(Sums& v, const Place& place, u32 ring, u32 offset, int part) {
    const Factors f = load_factors(place, offset, part * PART_K / GROUP);
    const u32 x_sums = ring + offset + X_AT + X_SUMS_AT + (part * COLS + 2 * place.t) * 4;
    float(&d)[SUMS] = v.parts[part % SETS];
    hold(d);
    float scale[2], zero[2];
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        scale[r] = __uint_as_float(f.scale[r]);
        zero[r] = fmaf(-BASE, scale[r], __uint_as_float(f.zero[r]));
    }
    #pragma unroll
    for (int j = 0; j < COLS / 8; j++) {
        const float2 x = load_floats(x_sums + j * 32);
        #pragma unroll
        for (int i = 0; i < 4; i++)
            v.all[4 * j + i] = fmaf(zero[i / 2], i % 2 ? x.y : x.x, fmaf(scale[i / 2], d[4 * j + i], v.all[4 * j + i]));
    }
}

// One step, in batches of CHUNKS * 32 k: the next one is unpacked while one multiplies. `before` runs once the multiplies of the
// step before are done.
template <class Before>
__device__ __forceinline__ void multiply_step(Sums& v, const Place& place, u32 ring, u32 offset, const Before& before) {
    u32 words[4][4];  // of 64 k each
    #pragma unroll
    for (int q = 0; q < 4; q++) load_matrices(words[q], (place.weights + offset) ^ (q * 32));
    const u64 x = descriptor(ring + offset + X_AT);
    [[maybe_unused]] Factors factors[CHUNKS];
    #pragma unroll
    for (int b = 0; b < BATCHES; b++) {
        u32(&a)[8 * CHUNKS] = v.operands[b % 2];
        if (!SCALE_SUMS) {
            #pragma unroll
            for (int j = 0; j < CHUNKS; j++) {
                const int k = (b * CHUNKS + j) * 32;
                factors[j] = k % GROUP ? factors[(j + CHUNKS - 1) % CHUNKS] : load_factors(place, offset, k / GROUP);
            }
        }
        wait_for_multiplies<1>();
        hold(a);
        if (SCALE_SUMS) {
            #pragma unroll
            for (int part = 0; part < PARTS; part++)  // that ended with the last batch but one
                if (((part + 1) * PART_K - 1) / (32 * CHUNKS) == b - 2) scale_part(v, place, ring, offset, part);
        }
        if (b == 1) before();
        #pragma unroll
        for (int j = 0; j < CHUNKS; j++)
            #pragma unroll
            for (int r = 0; r < 2; r++)
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int chunk = b * CHUNKS + j;
                    const u32 pair = unpack(words[chunk / 2][chunk % 2 * 2 + r], i);
                    a[j * 8 + i / 2 * 4 + i % 2 * 2 + r] = SCALE_SUMS ? pair : scaled(pair, factors[j].scale[r], factors[j].zero[r]);
                }
        begin_multiplies();
        #pragma unroll
        for (int i = 0; i < 2 * CHUNKS; i++) {
            const int sixteen = b * 2 * CHUNKS + i;  // k / 16 in the step
            const u64 at = x + sixteen * (2 * CHUNK_BYTES >> 4);
            if (!SCALE_SUMS) multiply<1>(v.all, a + 4 * i, at);
            else if (sixteen * 16 % PART_K == 0) multiply<0>(v.parts[sixteen * 16 / PART_K % SETS], a + 4 * i, at);
            else multiply<1>(v.parts[sixteen * 16 / PART_K % SETS], a + 4 * i, at);
        }
        commit_multiplies();
    }
    if (SCALE_SUMS) {
        wait_for_multiplies<0>();
        #pragma unroll
        for (int part = 0; part < PARTS; part++)
            if (((part + 1) * PART_K - 1) / (32 * CHUNKS) >= BATCHES - 2) scale_part(v, place, ring, offset, part);
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Sums to outputs. Unit u of a thread are the sums of its two rows for column 8 (u / 2) + 2 t + u % 2.
// ------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float2 unit_of(const float (&sums)[SUMS], int u) {
    return make_float2(sums[u / 2 * 4 + u % 2], sums[u / 2 * 4 + u % 2 + 2]);
}
struct Rows {  // of a thread
    int row;        // the first of two adjacent ones
    int count;      // 0 to 2 that exist
    float bias[2];
};
__device__ __forceinline__ Rows rows_of(const Params& p, const Place& place, int tile) {
    Rows rows;
    rows.row = tile * p.tile_rows + place.row;
    rows.count = place.row < p.tile_rows ? max(0, min(2, p.N - rows.row)) : 0;
    #pragma unroll
    for (int i = 0; i < 2; i++)
        rows.bias[i] = p.bias && i < rows.count ? to_float(load_bits(p.bias, rows.row + i, p.bias_type), p.bias_type) : 0.f;
    return rows;
}
__device__ __forceinline__ void store(const Params& p, const Place& place, const Rows& rows, int u, float2 sum) {
    const int m = u / 2 * 8 + 2 * place.t + u % 2;
    if (m >= p.M || rows.count == 0) return;
    const float first = place.swapped ? sum.y : sum.x, second = place.swapped ? sum.x : sum.y;
    const u32 pair = round_pair(first + rows.bias[0], second + rows.bias[1]);
    char* to = p.out + ((i64)m * p.N + rows.row) * 2;
    if (p.N % 2 == 0) *(u32*)to = pair;
    else {
        *(u16*)to = (u16)pair;
        if (rows.count == 2) ((u16*)to)[1] = (u16)(pair >> 16);
    }
}
__device__ __forceinline__ void store_all(const Params& p, const Place& place, const Rows& rows, const float (&sums)[SUMS]) {
    #pragma unroll
    for (int u = 0; u < UNITS; u++) store(p, place, rows, u, unit_of(sums, u));
}

#if SPLIT * K_PARTS == 1
// A tile that several blocks share: each warp leaves its sums in memory, and the last one adds up and stores. A block leaves at
// most two such sums; of a tile's blocks only the first began at or before the tile.
__device__ __forceinline__ float2* sums_of(const Params& p, int* counters, int block, bool began_before, int warp, int lane) {
    float2* sums = (float2*)(counters + (tiles_of(p) * WARPS + 63) / 64 * 64);
    return sums + ((i64)(2 * block + began_before) * WARPS + warp) * (UNITS * 32) + lane;
}
__device__ __forceinline__ void share_tile(const Params& p, const Place& place, const Work& work, int tile, const Rows& rows,
                                           const float (&sums)[SUMS]) {
    const int start = tile * work.steps, first = block_of(p, start), last = block_of(p, start + work.steps - 1), me = blockIdx.x;
    int thread, *counters = counters_of(p);
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread), "+l"(counters));  // here, not before the steps, which need the registers
    const int warp = thread >> 5, lane = thread & 31;
    int* counter = counters + tile * WARPS + warp;
    int others = 0;  // that have left their sums
    // The first block comes to the tile at the end of its work, the others at the beginning of theirs: it is the last, most often.
    if (me == first && lane == 0) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(others) : "l"(counter) : "memory");
    if (__shfl_sync(~0u, others, 0) < last - first) {
        float2* mine = sums_of(p, counters, me, me == first, warp, lane);
        #pragma unroll
        for (int u = 0; u < UNITS; u++) __stcg(mine + u * 32, unit_of(sums, u));
        __syncwarp();
        if (lane == 0) asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(others) : "l"(counter) : "memory");
        if (__shfl_sync(~0u, others, 0) < last - first) return;
    }
    __syncwarp();
    constexpr int at_once = UNITS > 8 ? UNITS / 2 : UNITS;  // are loaded before one is used
    #pragma unroll
    for (int u = 0; u < UNITS; u += at_once) {
        float2 total[at_once], part[at_once];
        #pragma unroll
        for (int i = 0; i < at_once; i++) total[i] = make_float2(0.f, 0.f);
        #pragma unroll 1
        for (int block = first; block <= last; block++) {
            const float2* theirs = sums_of(p, counters, block, block == first, warp, lane) + u * 32;
            #pragma unroll
            for (int i = 0; i < at_once; i++) part[i] = block == me ? unit_of(sums, u + i) : __ldcg(theirs + i * 32);
            #pragma unroll
            for (int i = 0; i < at_once; i++) total[i].x += part[i].x, total[i].y += part[i].y;
        }
        #pragma unroll
        for (int i = 0; i < at_once; i++) store(p, place, rows, u + i, total[i]);
    }
}
#else
// Parts of the sums meet in shared memory, where the ring was; each part of each block of the cluster adds up some of the columns.
__device__ __forceinline__ void share_columns(const Params& p, const Place& place, u32 ring, const Rows& rows, const float (&sums)[SUMS]) {
    const int rank = SPLIT > 1 ? rank_in_cluster() : 0, warp = (threadIdx.x >> 5) % PART_WARPS, lane = threadIdx.x & 31;
    constexpr int part_bytes = PART_WARPS * UNITS * 256;
    const u32 own = ring + warp * (UNITS * 256) + lane * 8;
    multiplying_barrier();
    #pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const float2 sum = unit_of(sums, u);
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(own + place.part * part_bytes + u * 256), "f"(sum.x), "f"(sum.y) : "memory");
    }
    SPLIT > 1 ? cluster_barrier() : multiplying_barrier();
    constexpr int sharers = K_PARTS * SPLIT;
    #pragma unroll
    for (int i = 0; i < (UNITS + sharers - 1) / sharers; i++) {
        const int u = i * sharers + rank * K_PARTS + place.part;
        if (UNITS % sharers && u >= UNITS) break;
        float2 sum = make_float2(0.f, 0.f);
        #pragma unroll
        for (int other = 0; other < sharers; other++) {
            u32 at = own + other % K_PARTS * part_bytes + u * 256;
            float2 part;
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(at), "r"(other / K_PARTS));
            asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(part.x), "=f"(part.y) : "r"(at) : "memory");
            sum.x += part.x, sum.y += part.y;
        }
        store(p, place, rows, u, sum);
    }
    if (SPLIT > 1) cluster_barrier();  // a block's sums stay until all have read them
}
#endif

// Steps `part`, `part` + K_PARTS, .. of the block's.
__device__ __forceinline__ void multiply_steps(const Params& p, u32 ring) {
    const Work work = work_of(p);
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
    const Place place = place_of(ring, warp, lane);
    Sums v;
    #pragma unroll
    for (int i = 0; i < 8 * CHUNKS; i++) v.operands[0][i] = v.operands[1][i] = 0;
    #pragma unroll
    for (int i = 0; i < SETS * SUMS; i++) v.parts[i / SUMS][i % SUMS] = 0.f;
    int stage = place.part;
    u32 phase = 0;
    // The bias may come from the kernel before, and `out` may be memory that it uses.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int begin = work.begin;
    do {  // (once, even for the block of a cluster that has no step)
        const int tile = begin / work.steps, end = min(work.end, (tile + 1) * work.steps);
        #pragma unroll
        for (int i = 0; i < SUMS; i++) v.all[i] = 0.f;
        auto release_last = [&]() {
            if (lane == 0) arrive(empty(ring, stage == 0 ? STAGES - 1 : stage - 1));
        };
        for (int s = begin + place.part; s < end; s += K_PARTS) {
            wait_at(full(ring, stage), phase);
            multiply_step(v, place, ring, stage * STAGE_BYTES, [&]() {
                if (!RELEASE_AT_ONCE && s > begin) release_last();
            });
            if (RELEASE_AT_ONCE) {
                wait_for_multiplies<0>();
                __syncwarp();
                if (lane == 0) arrive(empty(ring, stage));
            }
            stage += K_PARTS;
            if (stage >= STAGES) stage -= STAGES, phase ^= 1;
        }
        wait_for_multiplies<0>();
        hold(v.operands[0]);
        hold(v.operands[1]);
        hold(v.all);
        __syncwarp();
        if (!RELEASE_AT_ONCE && begin < end) release_last();
        const Rows rows = rows_of(p, place, tile);
#if SPLIT * K_PARTS > 1
        share_columns(p, place, ring, rows, v.all);
#else
        if (end - begin == work.steps) store_all(p, place, rows, v.all);
        else share_tile(p, place, work, tile, rows, v.all);
#endif
        begin = end;
    } while (begin < work.end);
}

#if SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif
extern "C" __global__ void CLUSTER __maxnreg__(REGISTERS)
int4_warp_specialised(const __grid_constant__ Params p, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) char shared[];
    const u32 ring = ((u32)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == 0) {
        #pragma unroll
        for (int i = 0; i < STAGES; i++) {
            init_barrier(full(ring, i), SCALE_BYTES_LOADED ? 4 : 1);
            init_barrier(empty(ring, i), PART_WARPS);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (warp < WARPS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLYING));
        multiply_steps(p, ring);
        return;
    }
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPYING));
    if (warp == WARPS) {
        if (threadIdx.x % 32 == 0) copy_steps(p, maps, ring);
    }
#if SCALE_BYTES_LOADED
    else load_scales(p, ring, threadIdx.x - 32 * (WARPS + 1));
#endif
    if (SPLIT > 1) {  // as those that multiply do
        __syncwarp();
        cluster_barrier();
        cluster_barrier();
    }
}
