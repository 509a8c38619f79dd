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

// A nibble at bit 4 i of the bits of 2^(23 - 4 i) is the number 2^(23 - 4 i) + u: subtracting
// 2^(23 - 4 i) + 8 leaves u - 8, exact. Neither a shift nor a conversion for each weight.
const NIBBLES = vec4<u32>(0x000Fu, 0x00F0u, 0x0F00u, 0xF000u);
const POWERS = vec4<u32>(0x4B000000u, 0x49000000u, 0x47000000u, 0x45000000u);
const CENTRES = vec4<f32>(8388616.0, 524296.0, 32776.0, 2056.0);

// 16 neighbouring k of a row of x.
struct Activations {
  a: vec4<f32>,
  b: vec4<f32>,
  c: vec4<f32>,
  d: vec4<f32>,
}

fn quad(word: u32) -> vec4<f32> {
  return bitcast<vec4<f32>>((vec4<u32>(word) & NIBBLES) | POWERS) - CENTRES;
}

fn sum(v: vec4<f32>) -> f32 {
  return (v.x + v.y) + (v.z + v.w);
}

// Products are fused by hand here and below: drivers leave `a * b + c` alone.
fn products(word: u32, low: vec4<f32>, high: vec4<f32>) -> vec4<f32> {
  return fma(quad(word >> 16u), high, quad(word) * low);
}

// Two words of 8 weights each against the first and the last 8 k, summed on their own.
fn dot_halves(w: vec2<u32>, x: Activations) -> vec2<f32> {
  return vec2<f32>(sum(products(w.x, x.a, x.b)), sum(products(w.y, x.c, x.d)));
}

// The same as one sum.
fn dot16(w: vec2<u32>, x: Activations) -> f32 {
  return sum(fma(quad(w.y >> 16u), x.d, fma(quad(w.y), x.c, products(w.x, x.a, x.b))));
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
    let a = Activations(x[from_], x[from_ + 1u], x[from_ + 2u], x[from_ + 3u]);
    let stride = shape.padded_columns / 4u;
    let scale = (2u * pair) / (GROUP_SIZE / 8u) * stride + n / 4u;
    let s0 = vec4<f32>(scales[scale]);
    let s1 = vec4<f32>(scales[scale + 1u]);
    if (GROUP_SIZE >= 16u) {
      first = fma(s0, vec4<f32>(dot16(w0, a), dot16(w1, a), dot16(w2, a), dot16(w3, a)), first);
      second = fma(s1, vec4<f32>(dot16(w4, a), dot16(w5, a), dot16(w6, a), dot16(w7, a)), second);
    } else {  // each half has a scale of its own
      let left = transpose(mat4x2<f32>(dot_halves(w0, a), dot_halves(w1, a), dot_halves(w2, a),
                                       dot_halves(w3, a)));
      let right = transpose(mat4x2<f32>(dot_halves(w4, a), dot_halves(w5, a), dot_halves(w6, a),
                                        dot_halves(w7, a)));
      let s2 = vec4<f32>(scales[scale + stride]);
      let s3 = vec4<f32>(scales[scale + stride + 1u]);
      first = fma(s2, left[1], fma(s0, left[0], first));
      second = fma(s3, right[1], fma(s1, right[0], second));
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
