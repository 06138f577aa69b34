#include "resample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static int least(int a, int b) { return a < b ? a : b; }
static int most(int a, int b) { return a > b ? a : b; }

static bool room(struct axis *axis, int outputs, int weights) {
    if (outputs > axis->room_outputs) {
        free(axis->first);
        free(axis->count);
        axis->first = malloc(sizeof(int) * outputs);
        axis->count = malloc(sizeof(int) * outputs);
        axis->room_outputs = axis->first && axis->count ? outputs : 0;
    }
    if (weights > axis->room_weights) {
        free(axis->weights);
        free(axis->spread);
        axis->weights = malloc(sizeof(int16_t) * weights);
        axis->spread = malloc(sizeof(int16_t) * weights * 4);
        axis->room_weights = axis->weights && axis->spread ? weights : 0;
    }
    return axis->room_outputs >= outputs && axis->room_weights >= weights;
}

void axis_free(struct axis *axis) {
    free(axis->first);
    free(axis->count);
    free(axis->weights);
    free(axis->spread);
}

/* Input samples under the triangle of output i. */
static void reach(double start, double scale, int i, int low, int high, int *first, int *count) {
    double support = scale >= 1 ? scale : 1, centre = start + scale * (i + 0.5);
    *first = most((int)floor(centre - support + 0.5), low);
    *count = most(least((int)floor(centre + support + 0.5), high) - *first, 0);
}

static double triangle(double x) {
    x = fabs(x);
    return x < 1 ? 1 - x : 0;
}

bool axis_plan(struct axis *axis, double start, double extent, int low, int high, int outputs) {
    double scale = extent / outputs, shrink = scale >= 1 ? 1 / scale : 1, largest = 0;
    int taps = 0;
    for (int i = 0, first, count; i < outputs; i++) {
        reach(start, scale, i, low, high, &first, &count);
        taps = most(taps, count);
    }
    taps = (taps + 3) & ~3;
    if (taps == 0 || !room(axis, outputs, outputs * taps)) return false;
    axis->outputs = outputs;
    axis->taps = taps;
    double exact[taps];
    /* Twice over the outputs: the precision is known when the largest weight is. */
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < outputs; i++) {
            double centre = start + scale * (i + 0.5), sum = 0;
            int first, count;
            reach(start, scale, i, low, high, &first, &count);
            for (int j = 0; j < count; j++) sum += exact[j] = triangle((first + j - centre + 0.5) * shrink);
            if (sum == 0) return false;
            if (pass == 0) {
                for (int j = 0; j < count; j++) largest = fmax(largest, exact[j] / sum);
                continue;
            }
            axis->first[i] = first;
            axis->count[i] = count;
            for (int j = 0; j < taps; j++)
                axis->weights[i * taps + j] = j < count ? (int16_t)(0.5 + exact[j] / sum * (1 << axis->precision)) : 0;
        }
        for (axis->precision = 0; axis->precision < 22; axis->precision++)
            if ((int)(0.5 + largest * (1 << (axis->precision + 1))) >= 1 << 15) break;
    }
    /* For the across pass: four taps of three channels and a spare as pairs (w0 w1)x4 (w2 w3)x4. */
    for (int i = 0; i < outputs * taps / 4; i++)
        for (int k = 0; k < 16; k++) axis->spread[i * 16 + k] = axis->weights[i * 4 + k / 8 * 2 + k % 2];
    return true;
}

int axis_slack(const struct axis *axis) { return axis->taps * 3 + 16; }

static uint8_t byte_of(int32_t sum, int precision) {
    int32_t value = sum >> precision;
    return value < 0 ? 0 : value > 255 ? 255 : value;
}

static void across_plain(const struct axis *axis, const uint8_t *row, uint8_t *out) {
    for (int i = 0; i < axis->outputs; i++)
        for (int c = 0; c < 3; c++) {
            int32_t sum = 1 << axis->precision >> 1;
            for (int j = 0; j < axis->count[i]; j++)
                sum += axis->weights[i * axis->taps + j] * row[(axis->first[i] + j) * 3 + c];
            out[i * 3 + c] = byte_of(sum, axis->precision);
        }
}

static void down_plain(const struct axis *axis, int i, uint8_t *const *rows, int ring, int width, uint8_t *out) {
    for (int x = 0; x < width; x++) {
        int32_t sum = 1 << axis->precision >> 1;
        for (int j = 0; j < axis->count[i]; j++)
            sum += axis->weights[i * axis->taps + j] * rows[(axis->first[i] + j) % ring][x];
        out[x] = byte_of(sum, axis->precision);
    }
}

#if defined(__x86_64__)

/* Sums of one output pixel: [R G B -] as int32. Four taps a turn, from 12 of 16 bytes read. */
__attribute__((target("avx2"))) static inline __m128i pixel(const struct axis *axis, const uint8_t *row, int i) {
    const __m128i pairs = _mm_setr_epi8(0, 3, 1, 4, 2, 5, -1, -1, 6, 9, 7, 10, 8, 11, -1, -1);
    const uint8_t *at = row + axis->first[i] * 3;
    const int16_t *weights = axis->spread + i * axis->taps * 4;
    __m256i sums = _mm256_setzero_si256();
    for (int j = 0; j < axis->taps; j += 4, at += 12, weights += 16) {
        __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)at), pairs);
        __m256i words = _mm256_cvtepu8_epi16(bytes);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(words, _mm256_loadu_si256((const __m256i *)weights)));
    }
    return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

__attribute__((target("avx2"))) static void across_avx2(const struct axis *axis, const uint8_t *row, uint8_t *out) {
    const __m128i half = _mm_set1_epi32(1 << axis->precision >> 1), shift = _mm_cvtsi32_si128(axis->precision);
    const __m128i dense = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    int i = 0;
    for (; i + 4 <= axis->outputs; i += 4) {
        __m128i four[4];
        for (int k = 0; k < 4; k++)
            four[k] = _mm_sra_epi32(_mm_add_epi32(pixel(axis, row, i + k), half), shift);
        __m128i bytes = _mm_packus_epi16(_mm_packs_epi32(four[0], four[1]), _mm_packs_epi32(four[2], four[3]));
        _mm_storeu_si128((__m128i *)(out + i * 3), _mm_shuffle_epi8(bytes, dense));
    }
    for (; i < axis->outputs; i++) {
        int32_t sums[4];
        _mm_storeu_si128((__m128i *)sums, _mm_add_epi32(pixel(axis, row, i), half));
        for (int c = 0; c < 3; c++) out[i * 3 + c] = byte_of(sums[c], axis->precision);
    }
}

__attribute__((target("avx2"))) static void down_avx2(const struct axis *axis, int i, uint8_t *const *rows, int ring,
                                                      int width, uint8_t *out) {
    const __m256i half = _mm256_set1_epi32(1 << axis->precision >> 1);
    const __m128i shift = _mm_cvtsi32_si128(axis->precision);
    const int16_t *weights = axis->weights + i * axis->taps;
    int pairs = (axis->count[i] + 1) / 2;
    for (int x = 0; x < width; x += 16) {
        __m256i left = half, right = half;
        for (int j = 0; j < pairs; j++) {
            int first = axis->first[i] + 2 * j, second = least(first + 1, axis->first[i] + axis->count[i] - 1);
            uint32_t both = (uint16_t)weights[2 * j] | (uint32_t)(uint16_t)weights[2 * j + 1] << 16;
            __m256i weight = _mm256_set1_epi32((int)both);
            __m128i a = _mm_loadu_si128((const __m128i *)(rows[first % ring] + x));
            __m128i b = _mm_loadu_si128((const __m128i *)(rows[second % ring] + x));
            left = _mm256_add_epi32(left, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)), weight));
            right = _mm256_add_epi32(right, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b)), weight));
        }
        __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(left, shift), _mm256_sra_epi32(right, shift));
        words = _mm256_permute4x64_epi64(words, 0xD8);
        __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i *)(out + x), bytes);
    }
}

void resample_across(const struct axis *axis, const uint8_t *row, uint8_t *out) {
    (__builtin_cpu_supports("avx2") ? across_avx2 : across_plain)(axis, row, out);
}

void resample_down(const struct axis *axis, int i, uint8_t *const *rows, int ring, int width, uint8_t *out) {
    (__builtin_cpu_supports("avx2") ? down_avx2 : down_plain)(axis, i, rows, ring, width, out);
}

#else

void resample_across(const struct axis *axis, const uint8_t *row, uint8_t *out) { across_plain(axis, row, out); }

void resample_down(const struct axis *axis, int i, uint8_t *const *rows, int ring, int width, uint8_t *out) {
    down_plain(axis, i, rows, ring, width, out);
}

#endif
