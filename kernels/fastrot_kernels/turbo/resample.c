#include "resample.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && !defined(PLAIN)
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
        free(axis->exact);
        axis->weights = malloc(sizeof(int16_t) * weights);
        axis->spread = malloc(sizeof(int16_t) * weights * 4);
        axis->exact = malloc(sizeof(double) * weights);
        axis->room_weights = axis->weights && axis->spread && axis->exact ? weights : 0;
    }
    return axis->room_outputs >= outputs && axis->room_weights >= weights;
}

void axis_free(struct axis *axis) {
    free(axis->first);
    free(axis->count);
    free(axis->weights);
    free(axis->spread);
    free(axis->exact);
}

static int floor_of(double x) { /* libm's is a call */
    int truncated = (int)x;
    return truncated - (truncated > x);
}

/* Input samples under the triangle of output i. */
static void reach(double start, double scale, int i, int low, int high, int *first, int *count) {
    double support = scale >= 1 ? scale : 1, centre = start + scale * (i + 0.5);
    *first = most(floor_of(centre - support + 0.5), low);
    *count = most(least(floor_of(centre + support + 0.5), high) - *first, 0);
}

static double triangle(double x) {
    x = x < 0 ? -x : x;
    return x < 1 ? 1 - x : 0;
}

bool axis_plan(struct axis *axis, double start, double extent, int low, int high, int outputs) {
    double scale = extent / outputs, shrink = scale >= 1 ? 1 / scale : 1, largest = 0;
    int taps = 0;
    for (int i = 0, first, count; i < outputs; i++) {
        reach(start, scale, i, low, high, &first, &count);
        taps = most(taps, count);
    }
    taps = (taps + 1) & ~1;
    if (taps == 0 || !room(axis, outputs, outputs * taps)) return false;
    axis->outputs = outputs;
    axis->taps = taps;
    for (int i = 0; i < outputs; i++) {
        double centre = start + scale * (i + 0.5), sum = 0, *exact = axis->exact + i * taps;
        int first, count;
        reach(start, scale, i, low, high, &first, &count);
        for (int j = 0; j < count; j++) sum += exact[j] = triangle((first + j - centre + 0.5) * shrink);
        if (sum == 0) return false;
        for (int j = 0; j < count; j++) {
            exact[j] /= sum;
            if (exact[j] > largest) largest = exact[j];
        }
        for (int j = count; j < taps; j++) exact[j] = 0;
        axis->first[i] = first;
        axis->count[i] = count;
    }
    for (axis->precision = 0; axis->precision < 22; axis->precision++)
        if ((int)(0.5 + largest * (1 << (axis->precision + 1))) >= 1 << 15) break;
    int one = 1 << axis->precision;
    for (int k = 0; k < outputs * taps; k++) axis->weights[k] = (int16_t)(0.5 + axis->exact[k] * one);
    for (int k = 0; k < outputs * taps * 4; k++) axis->spread[k] = axis->weights[k / 8 * 2 + k % 2];
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

#if defined(__x86_64__) && !defined(PLAIN)

/* Two taps of a pixel as words (a0 b0)(a1 b1)(a2 b2)(- -), for _mm_madd_epi16 with a pair of weights. */
#define PAIRS 0, 3, 1, 4, 2, 5, -1, -1
#define AVX2 __attribute__((target("avx2")))

/* Sums of one output pixel, [R G B -] as int32: four taps a turn, and two for the rest. */
AVX2 static inline __m128i pixel(const struct axis *axis, const uint8_t *row, int i) {
    const __m128i four = _mm_setr_epi8(PAIRS, 6, 9, 7, 10, 8, 11, -1, -1);
    const uint8_t *at = row + axis->first[i] * 3;
    const int16_t *weights = axis->spread + i * axis->taps * 4;
    __m256i sums = _mm256_setzero_si256();
    int j = 0;
    for (; j + 4 <= axis->taps; j += 4, at += 12, weights += 16) {
        __m256i words = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)at), four));
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(words, _mm256_loadu_si256((const __m256i *)weights)));
    }
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    if (j == axis->taps) return sum;
    __m128i words = _mm_cvtepu8_epi16(_mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)at), four));
    return _mm_add_epi32(sum, _mm_madd_epi16(words, _mm_loadu_si128((const __m128i *)weights)));
}

/* Two output pixels of two taps each, [R G B - R G B -]: what enlarging takes. */
AVX2 static inline __m256i two_pixels(const struct axis *axis, const uint8_t *row, int i) {
    const __m128i both = _mm_setr_epi8(PAIRS, 8, 11, 9, 12, 10, 13, -1, -1);
    __m128i left = _mm_loadl_epi64((const __m128i *)(row + axis->first[i] * 3));
    __m128i right = _mm_loadl_epi64((const __m128i *)(row + axis->first[i + 1] * 3));
    __m256i words = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(_mm_unpacklo_epi64(left, right), both));
    return _mm256_madd_epi16(words, _mm256_loadu_si256((const __m256i *)(axis->spread + i * 8)));
}

AVX2 static void across_avx2(const struct axis *axis, const uint8_t *row, uint8_t *out) {
    const __m256i half = _mm256_set1_epi32(1 << axis->precision >> 1);
    const __m128i shift = _mm_cvtsi32_si128(axis->precision);
    const __m128i dense = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    int i = 0;
    for (; i + 4 <= axis->outputs; i += 4) {
        __m256i left, right;
        if (axis->taps == 2) {
            left = two_pixels(axis, row, i);
            right = two_pixels(axis, row, i + 2);
        } else {
            left = _mm256_set_m128i(pixel(axis, row, i + 1), pixel(axis, row, i));
            right = _mm256_set_m128i(pixel(axis, row, i + 3), pixel(axis, row, i + 2));
        }
        left = _mm256_sra_epi32(_mm256_add_epi32(left, half), shift);
        right = _mm256_sra_epi32(_mm256_add_epi32(right, half), shift);
        /* lanes hold pixels (0, 2 | 1, 3) after the pack */
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(left, right), 0xD8);
        __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i *)(out + i * 3), _mm_shuffle_epi8(bytes, dense));
    }
    for (; i < axis->outputs; i++) {
        int32_t sums[4];
        _mm_storeu_si128((__m128i *)sums, _mm_add_epi32(pixel(axis, row, i), _mm256_castsi256_si128(half)));
        for (int c = 0; c < 3; c++) out[i * 3 + c] = byte_of(sums[c], axis->precision);
    }
}

AVX2 static void down_avx2(const struct axis *axis, int i, uint8_t *const *rows, int ring, int width, uint8_t *out) {
    const __m256i half = _mm256_set1_epi32(1 << axis->precision >> 1);
    const __m128i shift = _mm_cvtsi32_si128(axis->precision);
    const int16_t *weights = axis->weights + i * axis->taps;
    int count = axis->count[i], pairs = (count + 1) / 2;
    const uint8_t *lines[2 * pairs];
    for (int j = 0; j < 2 * pairs; j++) lines[j] = rows[(axis->first[i] + least(j, count - 1)) % ring];
    for (int x = 0; x < width; x += 16) {
        __m256i left = half, right = half;
        for (int j = 0; j < pairs; j++) {
            uint32_t both = (uint16_t)weights[2 * j] | (uint32_t)(uint16_t)weights[2 * j + 1] << 16;
            __m256i weight = _mm256_set1_epi32((int)both);
            __m128i a = _mm_loadu_si128((const __m128i *)(lines[2 * j] + x));
            __m128i b = _mm_loadu_si128((const __m128i *)(lines[2 * j + 1] + x));
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
