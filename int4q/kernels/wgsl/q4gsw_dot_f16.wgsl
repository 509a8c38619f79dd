// The arithmetic of q4gsw_decode.wgsl in float16 pairs: x is rounded to float16, and so are sums of
// up to 8 products. |x| must stay under 1000, or they may pass float16's largest number.

// A nibble in the low bits of 1024.0 is the number 1024 + u; 4 bits further up, 1024 + 16 u.
const LOW = 0x000F000Fu;
const HIGH = 0x00F000F0u;
const TWO_10 = 0x64006400u;

// 16 neighbouring k of a row of x, in the order in which pairs of nibbles come out of a word.
struct Activations {
  a: array<vec2<f16>, 4>,
  b: array<vec2<f16>, 4>,
}

fn pairs(low: vec4<f32>, high: vec4<f32>) -> array<vec2<f16>, 4> {
  return array<vec2<f16>, 4>(
    vec2<f16>(vec2<f32>(low.x, high.x)), vec2<f16>(vec2<f32>(low.y, high.y)),
    vec2<f16>(vec2<f32>(low.z, high.z)), vec2<f16>(vec2<f32>(low.w, high.w)));
}

fn activations(a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>) -> Activations {
  return Activations(pairs(a, b), pairs(c, d));
}

// The same as a bitcast, which some compilers lack for these types.
fn as_halves(bits: u32) -> vec2<f16> {
  return vec2<f16>(unpack2x16float(bits));
}

fn low_nibbles(word: u32) -> vec2<f16> {
  return as_halves((word & LOW) | TWO_10) - vec2<f16>(1032.0h);
}

fn high_nibbles(word: u32) -> vec2<f16> {
  return fma(as_halves((word & HIGH) | TWO_10), vec2<f16>(0.0625h), vec2<f16>(-72.0h));
}

fn products(word: u32, x: array<vec2<f16>, 4>, start: vec2<f16>) -> vec2<f16> {
  let first = fma(high_nibbles(word), x[1], fma(low_nibbles(word), x[0], start));
  return fma(high_nibbles(word >> 8u), x[3], fma(low_nibbles(word >> 8u), x[2], first));
}

fn sum(v: vec2<f16>) -> f32 {
  return f32(v.x) + f32(v.y);
}

// Two words of 8 weights each against the first and the last 8 k, summed on their own.
fn dot_halves(w: vec2<u32>, x: Activations) -> vec2<f32> {
  return vec2<f32>(sum(products(w.x, x.a, vec2<f16>())), sum(products(w.y, x.b, vec2<f16>())));
}

// The same as one sum.
fn dot16(w: vec2<u32>, x: Activations) -> f32 {
  return sum(products(w.y, x.b, products(w.x, x.a, vec2<f16>())));
}
