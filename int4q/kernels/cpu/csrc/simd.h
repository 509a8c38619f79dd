/* Decode, dequantisation and search for instruction sets of 16- and 32-byte registers, written once.
 *
 * A file that includes this has defined
 *   SIMD       the function attribute that names the instruction set
 *   LANES      32-bit lanes of a register: 4 or 8
 *   floats, ints, bytes   registers; bytes16 is one of 16 bytes
 *   load_bytes, load_ints, load_floats, zero_ints, set_all (a float), spread (see row_scale),
 *   to_floats, add_ints, times_256, multiply, multiply_add (a * b + c), sum_of (lanes)
 *   unpack_unsigned       u = q + 8 of the even and the odd k in a register of weights
 *   dot_bytes             acc + sums over the four bytes of a lane, unsigned ones times x
 *   load_bytes16, store_bytes16, unpack_nibbles, look_up (a table of 16 bytes), interleave (low,
 *   high bytes of two registers), interleave_pairs (of 16 bits)
 *   least, greatest, where_less (see simd_search.h)
 *   half_to_float, float_to_half, load_halves (8 of them as floats)
 *   KERNELS, FEATURE      the name of the table of functions, and what the CPU must have
 *
 * The numbers are those of avx512_decode.c, as common.h defines them; only the order of float32 sums
 * differs.
 */
#include <string.h>

#include "common.h"

enum { PARTS = 16 / LANES, PART_BYTES = 4 * LANES }; /* of a unit's 64 bytes of weights */

#include "simd_x.h"
#include "simd_decode.h"
#include "simd_dequant.h"
#include "simd_search.h"

const kernels_of KERNELS = {FEATURE, has_outlier, turn_span, decode_blocks, dequant_rows,
                            search_rows};
