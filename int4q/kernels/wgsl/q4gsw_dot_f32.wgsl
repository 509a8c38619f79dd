// The arithmetic of q4gsw_decode.wgsl in float32: nothing is rounded below it.

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

fn activations(a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>) -> Activations {
  return Activations(a, b, c, d);
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
