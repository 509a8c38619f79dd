// What a BERT layer needs beside its linear layers: attention, add + layer norm, GELU.

struct Shape {
  tokens: u32,  // T, at most MAX_TOKENS
  hidden: u32,  // H
  heads: u32,
  epsilon: f32,
}

const THREADS = 64u;
const MAX_TOKENS = 512u;

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read_write> output: array<f32>;
@group(0) @binding(2) var<uniform> shape: Shape;
@group(0) @binding(3) var<storage, read> residual: array<f32>;  // add_norm: [T, H]
@group(0) @binding(4) var<storage, read> gain: array<f32>;      // add_norm: [H]
@group(0) @binding(5) var<storage, read> offset: array<f32>;    // add_norm: [H]

var<workgroup> partial: array<f32, THREADS>;
var<workgroup> scores: array<f32, MAX_TOKENS>;

fn sum_of_all(value: f32, thread: u32) -> f32 {
  partial[thread] = value;
  for (var half = THREADS / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (thread < half) {
      partial[thread] += partial[thread + half];
    }
  }
  workgroupBarrier();
  let total = partial[0];
  workgroupBarrier();
  return total;
}

fn max_of_all(value: f32, thread: u32) -> f32 {
  partial[thread] = value;
  for (var half = THREADS / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (thread < half) {
      partial[thread] = max(partial[thread], partial[thread + half]);
    }
  }
  workgroupBarrier();
  let largest = partial[0];
  workgroupBarrier();
  return largest;
}

// input [T, 3 H] (queries, keys, values) -> output [T, H]; a workgroup takes one token and head.
@compute @workgroup_size(THREADS)
fn attention(@builtin(workgroup_id) group: vec3<u32>,
             @builtin(local_invocation_index) thread: u32) {
  let width = shape.hidden / shape.heads;
  let stride = 3u * shape.hidden;
  let query = group.x * stride + group.y * width;
  let keys = shape.hidden + group.y * width;
  var largest = -3.0e38;
  for (var t = thread; t < shape.tokens; t += THREADS) {
    var dot = 0.0;
    for (var i = 0u; i < width; i++) {
      dot += input[query + i] * input[t * stride + keys + i];
    }
    scores[t] = dot * inverseSqrt(f32(width));
    largest = max(largest, scores[t]);
  }
  largest = max_of_all(largest, thread);
  var sum = 0.0;
  for (var t = thread; t < shape.tokens; t += THREADS) {
    scores[t] = exp(scores[t] - largest);
    sum += scores[t];
  }
  sum = sum_of_all(sum, thread);
  for (var i = thread; i < width; i += THREADS) {
    var value = 0.0;
    for (var t = 0u; t < shape.tokens; t++) {
      value += scores[t] * input[t * stride + keys + shape.hidden + i];
    }
    output[group.x * shape.hidden + group.y * width + i] = value / sum;
  }
}

// output = layer_norm(input + residual) * gain + offset; a workgroup takes one token.
@compute @workgroup_size(THREADS)
fn add_norm(@builtin(workgroup_id) group: vec3<u32>,
            @builtin(local_invocation_index) thread: u32) {
  let row = group.x * shape.hidden;
  var sum = 0.0;
  for (var i = thread; i < shape.hidden; i += THREADS) {
    sum += input[row + i] + residual[row + i];
  }
  let mean = sum_of_all(sum, thread) / f32(shape.hidden);
  var squares = 0.0;
  for (var i = thread; i < shape.hidden; i += THREADS) {
    let centred = input[row + i] + residual[row + i] - mean;
    squares += centred * centred;
  }
  let variance = sum_of_all(squares, thread) / f32(shape.hidden);
  let scale = inverseSqrt(variance + shape.epsilon);
  for (var i = thread; i < shape.hidden; i += THREADS) {
    let centred = input[row + i] + residual[row + i] - mean;
    output[row + i] = centred * scale * gain[i] + offset[i];
  }
}

// Abramowitz and Stegun 7.1.26: within 1.5e-7.
fn erf(x: f32) -> f32 {
  let t = 1.0 / (1.0 + 0.3275911 * abs(x));
  let p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t
           + 0.254829592) * t;
  return sign(x) * (1.0 - p * exp(-x * x));
}

@compute @workgroup_size(THREADS)
fn gelu(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  for (var i = group.x * THREADS + thread; i < arrayLength(&input); i += groups.x * THREADS) {
    output[i] = 0.5 * input[i] * (1.0 + erf(input[i] * 0.70710678118));
  }
}
