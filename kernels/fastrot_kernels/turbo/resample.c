#include "resample.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && !defined(PLAIN)
#include <immintrin.h>
#endif

/* Outputs of a block, and its bytes. */
enum { BLOCK = 16, BYTES = 3 * BLOCK };

static int least(int a, int b) { return a < b ? a : b; }
static int most(int a, int b) { return a > b ? a : b; }

static int blocks(int outputs) { return (outputs + BLOCK - 1) / BLOCK; }

static bool room_for_outputs(struct axis *axis, int outputs) {
    if (outputs > axis->room_outputs) {
        free(axis->first);
        free(axis->count);
        free(axis->places);
        axis->first = malloc(sizeof(int) * outputs);
        axis->count = malloc(sizeof(int) * outputs);
        axis->places = malloc(sizeof(int32_t) * BYTES * blocks(outputs));
        axis->room_outputs = axis->first && axis->count && axis->places ? outputs : 0;
    }
    return axis->room_outputs >= outputs;
}

static bool room_for_weights(struct axis *axis, int weights) {
    if (weights > axis->room_weights) {
        free(axis->weights);
        free(axis->spread);
        free(axis->exact);
        free(axis->pairs);
        axis->weights = malloc(sizeof(int16_t) * weights);
        axis->spread = malloc(sizeof(int16_t) * weights * 4);
        axis->exact = malloc(sizeof(double) * weights * 3 / 2);
        axis->pairs = malloc(sizeof(int32_t) * weights * 3 / 2);
        axis->room_weights = axis->weights && axis->spread && axis->exact && axis->pairs ? weights : 0;
    }
    return axis->room_weights >= weights;
}

void axis_free(struct axis *axis) {
    free(axis->first);
    free(axis->count);
    free(axis->weights);
    free(axis->spread);
    free(axis->exact);
    free(axis->places);
    free(axis->pairs);
}

static int floor_of(double x) { /* libm's is a call */
    int truncated = (int)x;
    return truncated - (truncated > x);
}

/* Where the taps of each output begin, and how many they are; the most of any. */
static inline __attribute__((always_inline)) int reach(struct axis *axis, double start, double scale, int low, int high) {
    double support = scale >= 1 ? scale : 1;
    int taps = 0;
    for (int i = 0; i < axis->outputs; i++) {
        double centre = start + scale * (i + 0.5);
        int first = most(floor_of(centre - support + 0.5), low);
        int count = most(least(floor_of(centre + support + 0.5), high) - first, 0);
        axis->first[i] = first;
        axis->count[i] = count;
        taps = most(taps, count);
    }
    return (taps + 1) & ~1;
}

/* Triangles of area 1, tap by tap: exact[j * outputs + i]; the largest, or 0 where an output has none. */
static inline __attribute__((always_inline)) double weigh(struct axis *axis, double start, double scale) {
    int outputs = axis->outputs;
    double shrink = scale >= 1 ? 1 / scale : 1, largest = 0, least_sum = 1, *sum = axis->exact + axis->taps * outputs;
    for (int i = 0; i < outputs; i++) sum[i] = 0;
    for (int j = 0; j < axis->taps; j++)
        for (int i = 0; i < outputs; i++) {
            double x = (axis->first[i] + j - (start + scale * (i + 0.5)) + 0.5) * shrink, beside = 1 - (x < 0 ? -x : x);
            double weight = beside > 0 && j < axis->count[i] ? beside : 0;
            axis->exact[j * outputs + i] = weight;
            sum[i] += weight;
        }
    for (int i = 0; i < outputs; i++) least_sum = sum[i] < least_sum ? sum[i] : least_sum;
    if (least_sum == 0) return 0;
    for (int j = 0; j < axis->taps; j++)
        for (int i = 0; i < outputs; i++) {
            double exact = axis->exact[j * outputs + i] /= sum[i];
            largest = exact > largest ? exact : largest;
        }
    return largest;
}

/* Integer weights, output by output, of as many bits as an int16 holds of the largest. */
static inline __attribute__((always_inline)) void round_off(struct axis *axis, double largest) {
    for (axis->precision = 0; axis->precision < 22; axis->precision++)
        if ((int)(0.5 + largest * (1 << (axis->precision + 1))) >= 1 << 15) break;
    double one = 1 << axis->precision;
    for (int j = 0; j < axis->taps; j++)
        for (int i = 0; i < axis->outputs; i++)
            axis->weights[i * axis->taps + j] = (int16_t)(int)(0.5 + axis->exact[j * axis->outputs + i] * one);
}

#if defined(__x86_64__) && !defined(PLAIN) && !defined(AVX2_ALONE)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))

/* Whether whole blocks can be gathered from registers. */
static bool gathers(void) {
    return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

static void plan_blocks(struct axis *axis) {
    int widest = 0, outputs = axis->outputs, pairs = axis->taps / 2;
    for (int i = 0; i < outputs; i += BLOCK) {
        int end = axis->first[least(i + BLOCK, outputs) - 1] + axis->taps;
        widest = most(widest, 3 * (end - axis->first[i]));
    }
    axis->block = widest <= 64 ? 64 : widest <= 128 ? 128 : 0;
    if (!axis->block) return;
    for (int i = 0; i < blocks(outputs) * BLOCK; i++) {
        int32_t *place = axis->places + 3 * i, *both = axis->pairs + i / BLOCK * pairs * BYTES + i % BLOCK * 3;
        int at = i < outputs ? 3 * (axis->first[i] - axis->first[i / BLOCK * BLOCK]) : 0;
        place[0] = at | (at + 3) << 16;
        place[1] = (at + 1) | (at + 4) << 16;
        place[2] = (at + 2) | (at + 5) << 16;
        for (int p = 0; p < pairs; p++, both += BYTES) {
            const int16_t *weights = axis->weights + i * axis->taps + 2 * p;
            both[0] = both[1] = both[2] = i < outputs ? weights[0] | weights[1] << 16 : 0;
        }
    }
}

AVX512 static double weigh_avx512(struct axis *axis, double start, double scale) { return weigh(axis, start, scale); }
AVX512 static void round_off_avx512(struct axis *axis, double largest) { round_off(axis, largest); }

#endif

bool axis_plan(struct axis *axis, double start, double extent, int low, int high, int outputs) {
    double scale = extent / outputs, largest;
    axis->block = 0;
    axis->outputs = outputs;
    if (!room_for_outputs(axis, outputs)) return false;
    axis->taps = reach(axis, start, scale, low, high);
    if (axis->taps == 0 || !room_for_weights(axis, blocks(outputs) * BLOCK * axis->taps)) return false;
#ifdef AVX512
    if (gathers()) {
        if ((largest = weigh_avx512(axis, start, scale)) == 0) return false;
        round_off_avx512(axis, largest);
        plan_blocks(axis);
        if (axis->block) return true;
    } else
#endif
    {
        if ((largest = weigh(axis, start, scale)) == 0) return false;
        round_off(axis, largest);
    }
    for (int k = 0; k < outputs * axis->taps * 4; k++) axis->spread[k] = axis->weights[k / 8 * 2 + k % 2];
    return true;
}

int axis_slack(const struct axis *axis) { return most(axis->taps * 3 + 16, 128); }

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

#ifdef AVX512

/* 16 outputs a turn: their 48 bytes' taps are gathered out of a block of input, two at a time, as words. */
AVX512 static void across_avx512(const struct axis *axis, const uint8_t *row, uint8_t *out) {
    const __mmask64 words = 0x5555555555555555;
    const __m512i half = _mm512_set1_epi32(1 << axis->precision >> 1), two_taps = _mm512_set1_epi32(6 | 6 << 16);
    const __m128i shift = _mm_cvtsi32_si128(axis->precision);
    const int32_t *places = axis->places, *pairs = axis->pairs;
    for (int i = 0; i < axis->outputs; i += BLOCK, places += BYTES, out += BYTES) {
        const uint8_t *at = row + axis->first[i] * 3;
        __m512i block = _mm512_loadu_si512(at), behind = axis->block > 64 ? _mm512_loadu_si512(at + 64) : block;
        __m512i place[3], sum[3];
        for (int z = 0; z < 3; z++) {
            place[z] = _mm512_loadu_si512(places + 16 * z);
            sum[z] = half;
        }
        for (int p = 0; p < axis->taps; p += 2, pairs += BYTES)
            for (int z = 0; z < 3; z++) {
                __m512i taps = axis->block > 64 ? _mm512_maskz_permutex2var_epi8(words, block, place[z], behind)
                                                : _mm512_maskz_permutexvar_epi8(words, place[z], block);
                sum[z] = _mm512_add_epi32(sum[z], _mm512_madd_epi16(taps, _mm512_loadu_si512(pairs + 16 * z)));
                place[z] = _mm512_add_epi16(place[z], two_taps);
            }
        for (int z = 0; z < 3; z++)
            _mm_storeu_si128((__m128i *)(out + 16 * z), _mm512_cvtusepi32_epi8(_mm512_sra_epi32(sum[z], shift)));
    }
}

AVX512 static void down_avx512(const struct axis *axis, int i, uint8_t *const *rows, int ring, int width, uint8_t *out) {
    const __m512i half = _mm512_set1_epi32(1 << axis->precision >> 1), zero = _mm512_setzero_si512();
    const __m128i shift = _mm_cvtsi32_si128(axis->precision);
    const int16_t *weights = axis->weights + i * axis->taps;
    int count = axis->count[i], pairs = (count + 1) / 2;
    const uint8_t *lines[2 * pairs];
    for (int j = 0; j < 2 * pairs; j++) lines[j] = rows[(axis->first[i] + least(j, count - 1)) % ring];
    for (int x = 0; x < width; x += 64) {
        __mmask64 there = width - x >= 64 ? ~0ULL : (1ULL << (width - x)) - 1;
        __m512i sum[4] = {half, half, half, half};
        for (int j = 0; j < pairs; j++) {
            uint32_t both = (uint16_t)weights[2 * j] | (uint32_t)(uint16_t)weights[2 * j + 1] << 16;
            __m512i weight = _mm512_set1_epi32((int)both);
            __m512i a = _mm512_maskz_loadu_epi8(there, lines[2 * j] + x);
            __m512i b = _mm512_maskz_loadu_epi8(there, lines[2 * j + 1] + x);
            __m512i low = _mm512_unpacklo_epi8(a, b), high = _mm512_unpackhi_epi8(a, b);
            sum[0] = _mm512_add_epi32(sum[0], _mm512_madd_epi16(_mm512_unpacklo_epi8(low, zero), weight));
            sum[1] = _mm512_add_epi32(sum[1], _mm512_madd_epi16(_mm512_unpackhi_epi8(low, zero), weight));
            sum[2] = _mm512_add_epi32(sum[2], _mm512_madd_epi16(_mm512_unpacklo_epi8(high, zero), weight));
            sum[3] = _mm512_add_epi32(sum[3], _mm512_madd_epi16(_mm512_unpackhi_epi8(high, zero), weight));
        }
        for (int k = 0; k < 4; k++) sum[k] = _mm512_sra_epi32(sum[k], shift);
        __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(sum[0], sum[1]), _mm512_packs_epi32(sum[2], sum[3]));
        _mm512_mask_storeu_epi8(out + x, there, bytes);
    }
}

void resample_across(const struct axis *axis, const uint8_t *row, uint8_t *out) {
    if (axis->block) across_avx512(axis, row, out);
    else (__builtin_cpu_supports("avx2") ? across_avx2 : across_plain)(axis, row, out);
}

void resample_down(const struct axis *axis, int i, uint8_t *const *rows, int ring, int width, uint8_t *out) {
    if (gathers()) down_avx512(axis, i, rows, ring, width, out);
    else (__builtin_cpu_supports("avx2") ? down_avx2 : down_plain)(axis, i, rows, ring, width, out);
}

#else

void resample_across(const struct axis *axis, const uint8_t *row, uint8_t *out) {
    (__builtin_cpu_supports("avx2") ? across_avx2 : across_plain)(axis, row, out);
}

void resample_down(const struct axis *axis, int i, uint8_t *const *rows, int ring, int width, uint8_t *out) {
    (__builtin_cpu_supports("avx2") ? down_avx2 : down_plain)(axis, i, rows, ring, width, out);
}

#endif

#else

void resample_across(const struct axis *axis, const uint8_t *row, uint8_t *out) { across_plain(axis, row, out); }

void resample_down(const struct axis *axis, int i, uint8_t *const *rows, int ring, int width, uint8_t *out) {
    down_plain(axis, i, rows, ring, width, out);
}

#endif
