/* Antialiased bilinear resampling of rows of RGB bytes, in two passes: across, then down.

   The arithmetic is torch's for uint8 images (and so within a level of Pillow's): triangle weights in
   double, rounded to 16-bit integers at the finest precision that fits, one rounding to a byte after
   each pass. */
#ifndef FASTROT_RESAMPLE_H
#define FASTROT_RESAMPLE_H

#include <stdbool.h>
#include <stdint.h>

/* How one axis is resampled: output i is the sum of weights[i * taps + j] * input[first[i] + j]. */
struct axis {
    int outputs;
    int taps;      /* even, the unused ones zero */
    int precision; /* weights are multiples of 2^-precision */
    int *first, *count;
    int16_t *weights;
    int16_t *spread; /* for the across pass: each pair of weights four times */
    double *exact;   /* tap by tap, and behind them their sums */
    int block;       /* bytes that hold the taps of any 16 neighbouring outputs: 64, 128, or 0 where it takes more */
    int32_t *places; /* of 16 outputs, for each byte of theirs: where its first two taps lie in the block */
    int32_t *pairs;  /* of 16 outputs and two taps, for each byte of theirs: the weights */
    int room_outputs, room_weights;
};

/* Output i covers [start + i * extent / outputs, ...) of the input; no tap leaves [low, high).
   The axis is zeroed or used before. False where memory ends. */
bool axis_plan(struct axis *axis, double start, double extent, int low, int high, int outputs);
void axis_free(struct axis *axis);

/* Bytes that the across pass may read behind the last input sample, and write behind the last output. */
int axis_slack(const struct axis *axis);

/* One row of input (sample 0 at `row`) -> outputs * 3 bytes. */
void resample_across(const struct axis *axis, const uint8_t *row, uint8_t *out);

/* Output row i of the down pass from rows[first[i] .. first[i] + taps) of `width` bytes each;
   rows[k % ring] holds row k. Writes whole blocks of 16 bytes. */
void resample_down(const struct axis *axis, int i, uint8_t *const *rows, int ring, int width, uint8_t *out);

#endif
