// linear_q4gsw for few rows: y[m, n] = sum_k x[m, k] (u[n, k] - 8) scale[k / GROUP_SIZE, n] + bias[n]
//
// A workgroup computes 8 neighbouring outputs n of one row m. Its threads walk along k side by
// side, 16 weights (8 bytes) of each of the 8 columns at a time. Wider loads were slower: they pull
// the threads' parts of x (through the cache, shared by 8 columns) further apart.
//
// Before this file the host puts `alias Scale = f32;`, or `enable f16; alias Scale = f16;`.
// It pads: K to 32 (with u = 8, so that the value is 0), N to 8.

override GROUP_SIZE: u32;  // 8, 16, or a multiple of 32

const THREADS = 32u;
const COLUMNS = 8u;
const PARTS = 8u;  // threads that add up each quad of columns

struct Shape {
  rows: u32,            // M
  columns: u32,         // N
  padded_columns: u32,  // N, rounded up to 8
  blocks: u32,          // K / 32, rounded up
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;         // [M, K/4]
@group(0) @binding(1) var<storage, read> weights: array<vec2<u32>>;   // [N, K/16], 16 nibbles each
@group(0) @binding(2) var<storage, read> scales: array<vec4<Scale>>;  // [K/GROUP_SIZE, N/4]
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;      // [N/4]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;         // [M, columns]
@group(0) @binding(5) var<uniform> shape: Shape;

var<workgroup> sums: array<vec4<f32>, 2u * THREADS>;  // [quad of columns, thread]

// A nibble at bit 4 i of the bits of 2^23 is the number 2^23 + u * 16^i. Subtracting 2^23 + 8 * 16^i
// leaves (u - 8) * 16^i, exact; 16^-i is multiplied into x. No shift and no conversion a weight.
const NIBBLES = vec4<u32>(0x000Fu, 0x00F0u, 0x0F00u, 0xF000u);
const TWO_23 = vec4<u32>(0x4B000000u);
const CENTRE = vec4<f32>(8388616.0, 8388736.0, 8390656.0, 8421376.0);
const PLACE = vec4<f32>(1.0, 0.0625, 0.00390625, 0.000244140625);

fn quad(word: u32) -> vec4<f32> {
  return bitcast<vec4<f32>>((vec4<u32>(word) & NIBBLES) | TWO_23) - CENTRE;
}

fn sum(v: vec4<f32>) -> f32 {
  return (v.x + v.y) + (v.z + v.w);
}

// 8 weights. Products are fused by hand: drivers leave `a * b + c` alone.
fn products(word: u32, low: vec4<f32>, high: vec4<f32>) -> vec4<f32> {
  return fma(quad(word >> 16u), high, quad(word) * low);
}

// 8 weights of each of four columns.
fn four(a: u32, b: u32, c: u32, d: u32, low: vec4<f32>, high: vec4<f32>) -> vec4<f32> {
  return vec4<f32>(sum(products(a, low, high)), sum(products(b, low, high)),
                   sum(products(c, low, high)), sum(products(d, low, high)));
}

// 16 weights that share a scale.
fn dot16(w: vec2<u32>, x0: vec4<f32>, x1: vec4<f32>, x2: vec4<f32>, x3: vec4<f32>) -> f32 {
  return sum(fma(quad(w.y >> 16u), x3, fma(quad(w.y), x2, products(w.x, x0, x1))));
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let row = group.y;
  let n = group.x * COLUMNS;
  let pairs = 2u * shape.blocks;
  var first = vec4<f32>(0.0);   // columns n .. n + 3
  var second = vec4<f32>(0.0);  // columns n + 4 .. n + 7

  for (var pair = thread; pair < pairs; pair += THREADS) {
    let at = n * pairs + pair;
    let w0 = weights[at];
    let w1 = weights[at + pairs];
    let w2 = weights[at + 2u * pairs];
    let w3 = weights[at + 3u * pairs];
    let w4 = weights[at + 4u * pairs];
    let w5 = weights[at + 5u * pairs];
    let w6 = weights[at + 6u * pairs];
    let w7 = weights[at + 7u * pairs];
    let from_ = 4u * (row * pairs + pair);
    let x0 = x[from_] * PLACE;
    let x1 = x[from_ + 1u] * PLACE;
    let x2 = x[from_ + 2u] * PLACE;
    let x3 = x[from_ + 3u] * PLACE;
    let stride = shape.padded_columns / 4u;
    let scale = (2u * pair) / (GROUP_SIZE / 8u) * stride + n / 4u;
    let a = vec4<f32>(scales[scale]);
    let b = vec4<f32>(scales[scale + 1u]);
    if (GROUP_SIZE >= 16u) {
      first = fma(a, vec4<f32>(dot16(w0, x0, x1, x2, x3), dot16(w1, x0, x1, x2, x3),
                               dot16(w2, x0, x1, x2, x3), dot16(w3, x0, x1, x2, x3)), first);
      second = fma(b, vec4<f32>(dot16(w4, x0, x1, x2, x3), dot16(w5, x0, x1, x2, x3),
                                dot16(w6, x0, x1, x2, x3), dot16(w7, x0, x1, x2, x3)), second);
    } else {  // each word of 8 has a scale of its own
      let c = vec4<f32>(scales[scale + stride]);
      let d = vec4<f32>(scales[scale + stride + 1u]);
      first = fma(a, four(w0.x, w1.x, w2.x, w3.x, x0, x1), first);
      first = fma(c, four(w0.y, w1.y, w2.y, w3.y, x2, x3), first);
      second = fma(b, four(w4.x, w5.x, w6.x, w7.x, x0, x1), second);
      second = fma(d, four(w4.y, w5.y, w6.y, w7.y, x2, x3), second);
    }
  }

  sums[thread] = first;
  sums[THREADS + thread] = second;
  workgroupBarrier();
  var part = vec4<f32>(0.0);
  if (thread < 2u * PARTS) {
    for (var i = thread % PARTS; i < THREADS; i += PARTS) {
      part += sums[(thread / PARTS) * THREADS + i];
    }
  }
  workgroupBarrier();
  sums[thread] = part;
  workgroupBarrier();
  if (thread < COLUMNS && n + thread < shape.columns) {
    var total = bias[n / 4u + thread / 4u];
    for (var i = 0u; i < PARTS; i++) {
      total += sums[(thread / 4u) * PARTS + i];
    }
    y[row * shape.columns + n + thread] = total[thread % 4u];
  }
}
