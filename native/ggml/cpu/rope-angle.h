// Angles of rotary positions as model code makes them: the product of the position and a frequency, both float32.
//
// Upstream multiplies the position by the same factor once per pair, so that the rounding errors of all earlier pairs
// add up; at long positions they turn keys and queries by more than the product's one rounding does.

#pragma once

#include <math.h>
#include <stdint.h>

// The angle of the pair of channels (i, i + 1), i even, of n_dims that are rotated.
static inline float dsv4_rope_angle(float position, float base, int64_t i, int64_t n_dims) {
    const float frequency = (float) pow(base, -(double) i/n_dims);
    return position*frequency;
}
