// linear_q4gsw for many rows: y[m, n] = sum_k x[m, k] (u[n, k] - 8) scale[k / GROUP_SIZE, n] + bias[n]
//
// A workgroup of 128 threads computes a tile of 64 rows m by 64 columns n, 32 k at a time: both
// operands go to shared memory (the weight dequantised), each thread keeps 8 rows by 4 columns in
// registers and sums in float32.
//
// Before this file the host puts `alias Scale = f32;` and `alias Tile = f32;` (the type in shared
// memory), or `enable f16;` and f16 for one or both. It pads: K to 32 (u = 8), N to 8.

override GROUP_SIZE: u32;  // 8, 16, or a multiple of 32

const TILE = 64u;
const TILE_K = 32u;
const QUADS = TILE / 4u;

struct Shape {
  rows: u32,            // M
  columns: u32,         // N
  padded_columns: u32,  // N, rounded up to 8
  blocks: u32,          // K / 32, rounded up
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;         // [M, K/4]
@group(0) @binding(1) var<storage, read> weights: array<u32>;         // [N, K/8], 8 nibbles each
@group(0) @binding(2) var<storage, read> scales: array<vec4<Scale>>;  // [K/GROUP_SIZE, N/4]
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;      // [N/4]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;         // [M, columns]
@group(0) @binding(5) var<uniform> shape: Shape;

var<workgroup> tile_x: array<vec4<Tile>, TILE_K * QUADS>;  // [k, m/4]
var<workgroup> tile_w: array<vec4<Tile>, TILE_K * QUADS>;  // [k, n/4]

// Four k of a row of x; rows past M repeat the last one, and are not stored.
fn load_x(row: u32, k: u32) -> vec4<f32> {
  return x[min(row, shape.rows - 1u) * 8u * shape.blocks + k / 4u];
}

// Four values u - 8 of column n from k on.
fn load_q(n: u32, k: u32) -> vec4<f32> {
  let word = weights[n * 4u * shape.blocks + k / 8u] >> (4u * (k % 8u));
  return vec4<f32>((vec4<u32>(word) >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u)) - 8.0;
}

fn store(row: u32, n: u32, sum: vec4<f32>) {
  if (row >= shape.rows || n >= shape.columns) {
    return;
  }
  let value = sum + bias[n / 4u];
  let to = row * shape.columns + n;
  for (var i = 0u; i < min(4u, shape.columns - n); i++) {
    y[to + i] = value[i];
  }
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let quad = thread % QUADS;
  let eighth = thread / QUADS;
  // What this thread brings in: 4 rows of x and 4 columns of the weight, 4 k each. Columns past N
  // repeat the last ones.
  let source_m = group.y * TILE + 4u * quad;
  let source_n = min(group.x * TILE + 4u * quad, shape.padded_columns - 4u);
  let slot = 4u * eighth * QUADS + quad;
  // What it computes: 8 rows, 4 columns.
  let m = group.y * TILE + 8u * eighth;
  let n = group.x * TILE + 4u * quad;
  var s0 = vec4<f32>(0.0);
  var s1 = vec4<f32>(0.0);
  var s2 = vec4<f32>(0.0);
  var s3 = vec4<f32>(0.0);
  var s4 = vec4<f32>(0.0);
  var s5 = vec4<f32>(0.0);
  var s6 = vec4<f32>(0.0);
  var s7 = vec4<f32>(0.0);

  for (var begin = 0u; begin < TILE_K * shape.blocks; begin += TILE_K) {
    let k = begin + 4u * eighth;
    let rows = transpose(mat4x4<f32>(load_x(source_m, k), load_x(source_m + 1u, k),
                                     load_x(source_m + 2u, k), load_x(source_m + 3u, k)));
    let scale = vec4<f32>(scales[(k / GROUP_SIZE) * (shape.padded_columns / 4u) + source_n / 4u]);
    let columns = transpose(mat4x4<f32>(load_q(source_n, k), load_q(source_n + 1u, k),
                                        load_q(source_n + 2u, k), load_q(source_n + 3u, k)));
    workgroupBarrier();
    tile_x[slot] = vec4<Tile>(rows[0]);
    tile_x[slot + QUADS] = vec4<Tile>(rows[1]);
    tile_x[slot + 2u * QUADS] = vec4<Tile>(rows[2]);
    tile_x[slot + 3u * QUADS] = vec4<Tile>(rows[3]);
    tile_w[slot] = vec4<Tile>(columns[0] * scale);
    tile_w[slot + QUADS] = vec4<Tile>(columns[1] * scale);
    tile_w[slot + 2u * QUADS] = vec4<Tile>(columns[2] * scale);
    tile_w[slot + 3u * QUADS] = vec4<Tile>(columns[3] * scale);
    workgroupBarrier();
    for (var i = 0u; i < TILE_K; i++) {
      let a = vec4<f32>(tile_x[i * QUADS + 2u * eighth]);
      let b = vec4<f32>(tile_x[i * QUADS + 2u * eighth + 1u]);
      let w = vec4<f32>(tile_w[i * QUADS + quad]);
      s0 = fma(vec4<f32>(a.x), w, s0);
      s1 = fma(vec4<f32>(a.y), w, s1);
      s2 = fma(vec4<f32>(a.z), w, s2);
      s3 = fma(vec4<f32>(a.w), w, s3);
      s4 = fma(vec4<f32>(b.x), w, s4);
      s5 = fma(vec4<f32>(b.y), w, s5);
      s6 = fma(vec4<f32>(b.z), w, s6);
      s7 = fma(vec4<f32>(b.w), w, s7);
    }
  }

  store(m, n, s0);
  store(m + 1u, n, s1);
  store(m + 2u, n, s2);
  store(m + 3u, n, s3);
  store(m + 4u, n, s4);
  store(m + 5u, n, s5);
  store(m + 6u, n, s6);
  store(m + 7u, n, s7);
}
