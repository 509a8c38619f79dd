// linear_q4gsw for few rows: y[m, n] = sum_k x[m, k] (u[n, k] - 8) scale[k / GROUP_SIZE, n] + bias[n]
//
// A workgroup computes 8 neighbouring outputs n of one row m. Each of its 64 threads takes a block
// of 32 k: 16 bytes of each of the 8 rows of the weight, all loaded before anything waits. The
// activation goes through shared memory, 2048 k at a time.
//
// Before this file the host puts `alias Scale = f32;`, or `enable f16; alias Scale = f16;`.
// It pads: K to 32 (with u = 8, so that the value is 0), N to 8.

override GROUP_SIZE: u32;  // 8, 16, or a multiple of 32

const THREADS = 64u;
const COLUMNS = 8u;
const PARTS = THREADS / COLUMNS;
const X_STRIDE = THREADS + 1u;   // shared rows lie apart so that no two threads meet in a bank
const SUM_STRIDE = THREADS + 8u;

struct Shape {
  rows: u32,            // M
  columns: u32,         // N
  padded_columns: u32,  // N, rounded up to 8
  blocks: u32,          // K / 32, rounded up
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;         // [M, K/4]
@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;   // [N, K/32], 32 nibbles each
@group(0) @binding(2) var<storage, read> scales: array<vec4<Scale>>;  // [K/GROUP_SIZE, N/4]
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;      // [N/4]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;         // [M, columns]
@group(0) @binding(5) var<uniform> shape: Shape;

var<workgroup> turned_x: array<vec4<f32>, 8u * X_STRIDE>;  // [8, block]: quarter j of its block's 32
var<workgroup> sums: array<f32, COLUMNS * SUM_STRIDE>;     // [column, thread]

// A nibble at bit 4 i of the bits of 2^23 is the number 2^23 + u * 16^i. Subtracting 2^23 + 8 * 16^i
// leaves (u - 8) * 16^i, exact; 16^-i is multiplied into x. No shift and no conversion a weight.
const NIBBLES = vec4<u32>(0x000Fu, 0x00F0u, 0x0F00u, 0xF000u);
const TWO_23 = vec4<u32>(0x4B000000u);
const CENTRE = vec4<f32>(8388616.0, 8388736.0, 8390656.0, 8421376.0);
const PLACE = vec4<f32>(1.0, 0.0625, 0.00390625, 0.000244140625);

fn quad(word: u32) -> vec4<f32> {
  return bitcast<vec4<f32>>((vec4<u32>(word) & NIBBLES) | TWO_23) - CENTRE;
}

fn dot8(word: u32, low: vec4<f32>, high: vec4<f32>) -> f32 {
  let products = fma(quad(word >> 16u), high, quad(word) * low);
  return (products.x + products.y) + (products.z + products.w);
}

// The four words of one block of one column against x, each on its own (a group may be 8 wide).
fn dots(words: vec4<u32>, a: array<vec4<f32>, 8>) -> vec4<f32> {
  return vec4<f32>(dot8(words.x, a[0], a[1]), dot8(words.y, a[2], a[3]),
                   dot8(words.z, a[4], a[5]), dot8(words.w, a[6], a[7]));
}

// Groups 32 and wider: one scale serves all four words.
fn wide(a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>, scale: vec4<f32>) -> vec4<f32> {
  return scale * vec4<f32>((a.x + a.y) + (a.z + a.w), (b.x + b.y) + (b.z + b.w),
                           (c.x + c.y) + (c.z + c.w), (d.x + d.y) + (d.z + d.w));
}

// Groups of 8 or 16: a scale for each word.
fn narrow(a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>, block: u32, at: u32)
    -> vec4<f32> {
  let sum = scale_of(4u * block, at) * vec4<f32>(a.x, b.x, c.x, d.x)
          + scale_of(4u * block + 1u, at) * vec4<f32>(a.y, b.y, c.y, d.y);
  return sum + scale_of(4u * block + 2u, at) * vec4<f32>(a.z, b.z, c.z, d.z)
             + scale_of(4u * block + 3u, at) * vec4<f32>(a.w, b.w, c.w, d.w);
}

// Scales of columns 4 at .. 4 at + 3 for the 8 k from 8 eighth on.
fn scale_of(eighth: u32, at: u32) -> vec4<f32> {
  return vec4<f32>(scales[(eighth / (GROUP_SIZE / 8u)) * (shape.padded_columns / 4u) + at]);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let row = group.y;
  let n = group.x * COLUMNS;
  let at = n / 4u;
  var first = vec4<f32>(0.0);   // columns n .. n + 3
  var second = vec4<f32>(0.0);  // columns n + 4 .. n + 7

  for (var begin = 0u; begin < shape.blocks; begin += THREADS) {
    let block = begin + thread;
    let inside = block < shape.blocks;
    let from_ = n * shape.blocks + min(block, shape.blocks - 1u);
    let w0 = weights[from_];
    let w1 = weights[from_ + shape.blocks];
    let w2 = weights[from_ + 2u * shape.blocks];
    let w3 = weights[from_ + 3u * shape.blocks];
    let w4 = weights[from_ + 4u * shape.blocks];
    let w5 = weights[from_ + 5u * shape.blocks];
    let w6 = weights[from_ + 6u * shape.blocks];
    let w7 = weights[from_ + 7u * shape.blocks];

    workgroupBarrier();
    let quads = 8u * min(shape.blocks - begin, THREADS);
    for (var i = thread; i < quads; i += THREADS) {
      turned_x[(i % 8u) * X_STRIDE + i / 8u] = x[8u * (row * shape.blocks + begin) + i] * PLACE;
    }
    workgroupBarrier();

    if (inside) {
      let a = array<vec4<f32>, 8>(
        turned_x[thread], turned_x[X_STRIDE + thread],
        turned_x[2u * X_STRIDE + thread], turned_x[3u * X_STRIDE + thread],
        turned_x[4u * X_STRIDE + thread], turned_x[5u * X_STRIDE + thread],
        turned_x[6u * X_STRIDE + thread], turned_x[7u * X_STRIDE + thread]);
      let d0 = dots(w0, a);
      let d1 = dots(w1, a);
      let d2 = dots(w2, a);
      let d3 = dots(w3, a);
      let d4 = dots(w4, a);
      let d5 = dots(w5, a);
      let d6 = dots(w6, a);
      let d7 = dots(w7, a);
      if (GROUP_SIZE >= 32u) {
        first += wide(d0, d1, d2, d3, scale_of(4u * block, at));
        second += wide(d4, d5, d6, d7, scale_of(4u * block, at + 1u));
      } else {
        first += narrow(d0, d1, d2, d3, block, at);
        second += narrow(d4, d5, d6, d7, block, at + 1u);
      }
    }
  }

  sums[thread] = first.x;
  sums[SUM_STRIDE + thread] = first.y;
  sums[2u * SUM_STRIDE + thread] = first.z;
  sums[3u * SUM_STRIDE + thread] = first.w;
  sums[4u * SUM_STRIDE + thread] = second.x;
  sums[5u * SUM_STRIDE + thread] = second.y;
  sums[6u * SUM_STRIDE + thread] = second.z;
  sums[7u * SUM_STRIDE + thread] = second.w;
  workgroupBarrier();

  // PARTS threads a column add every PARTS-th sum, then one thread a column adds those.
  let own = (thread / PARTS) * SUM_STRIDE + thread % PARTS;
  var part = sums[own];
  for (var i = PARTS; i < THREADS; i += PARTS) {
    part += sums[own + i];
  }
  workgroupBarrier();
  sums[thread] = part;
  workgroupBarrier();
  if (thread < COLUMNS && n + thread < shape.columns) {
    var total = bias[at + thread / 4u][thread % 4u];
    for (var i = 0u; i < PARTS; i++) {
      total += sums[PARTS * thread + i];
    }
    y[row * shape.columns + n + thread] = total;
  }
}
