#include "entropy.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The head of libjpeg's module for this, whose first fields are the same in every version; jpegint.h,
   which has it, is not installed everywhere. */
struct jpeg_entropy_decoder {
    void (*start_pass)(j_decompress_ptr info);
    boolean (*decode_mcu)(j_decompress_ptr info, JBLOCKROW *blocks);
};

enum {
    LOOK = 11,      /* bits looked at: its tables are made for each image and share the nearest cache */
    LOOKS = 3,      /* that 56 bits are enough for, the last one at a coefficient of 31 */
    WHOLE = 0x40,   /* of an entry: the coefficient is in it; the six bits below count its bits */
    END = 128,      /* the stride of an end-of-block */
    KEPT = 1 << 24, /* bytes of a scan, beyond which their memory goes with the image */
    PADDING = 4096, /* zero bytes behind a segment: more than a damaged MCU can eat */
};

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "refill swaps bytes");

#define INLINE inline __attribute__((always_inline)) /* into code for other instructions too */

/* A Huffman code. A stride is how many places a coefficient goes on, over zeros, in a block. */
struct table {
    bool ac;
    UINT8 lengths[17], symbols[256]; /* as in the file */
    uint32_t one[1 << LOOK];  /* value << 16 | stride << 8 | WHOLE | bits; where it does not fit in a look,
                                 symbol << 16 | bits of its code; 0 where the code does not fit */
    uint64_t two[1 << LOOK];  /* two coefficients, or one twice: value << 48 | stride << 32 of the first,
                                 value << 16 of the second, stride << 8 | bits of both; 0 where none fits */
    uint32_t limit[17];       /* codes of so many bits are below this, in 16 bits */
    int offset[17];           /* from such a code to its symbol's place */
};

struct bits {
    const uint8_t *next;
    uint64_t buffer; /* the next bit is its highest */
    int count;       /* of valid bits, at least */
};

struct entropy {
    struct table tables[2][NUM_HUFF_TBLS]; /* DC, AC; those of the last image */
    struct table *dc[D_MAX_BLOCKS_IN_MCU], *ac[D_MAX_BLOCKS_IN_MCU];
    struct bits bits;
    const uint8_t *source, *end;    /* of the file: behind the segment, and its end */
    uint8_t *segment, *segment_end; /* unstuffed */
    size_t room;
    int prediction[MAX_COMPS_IN_SCAN];
    int column, first, last;
    unsigned until_restart;
    int restart;
    void (*lost)(j_decompress_ptr info);
};

static const uint8_t natural_order[DCTSIZE2] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
};

/* T.81 F.2.2.1: the value of `size` bits. */
static inline int extended(int bits, int size) {
    return size && bits < 1 << (size - 1) ? bits - (1 << size) + 1 : bits;
}

/* Of an AC symbol. Any of size 0 but a run of sixteen ends the block, as for libjpeg. */
static inline int stride(int symbol) { return symbol & 15 || symbol == 0xF0 ? (symbol >> 4) + 1 : END; }

static void fill_one(struct table *t, int code, int length, int symbol) {
    int rest = LOOK - length, size = symbol & 15, on = t->ac ? stride(symbol) : 0;
    uint32_t *one = t->one + ((size_t)code << rest);
    for (int i = 0; i < 1 << rest; i++) {
        uint32_t value = size <= rest ? (uint16_t)extended(i >> (rest - size), size) : symbol;
        one[i] = value << 16 | (size <= rest ? on << 8 | WHOLE | (length + size) : length);
    }
}

static void fill_two(struct table *t) {
    for (int i = 0; i < 1 << LOOK; i++) {
        uint32_t a = t->one[i], b = t->one[i << (a & 0x3F) & ((1 << LOOK) - 1)];
        uint64_t value = a >> 16;
        int bits = a & 0x3F, more = b & 0x3F, on = a >> 8 & 0xFF, further = b >> 8 & 0xFF;
        if (!(a & WHOLE)) {
            t->two[i] = 0;
        } else if (on == END) {
            t->two[i] = END << 8 | bits;
        } else {
            bool fits = b & WHOLE && bits + more <= LOOK;
            uint32_t second = fits ? (b & 0xFFFF0000) | (on + further) << 8 | (bits + more) : a & ~WHOLE;
            t->two[i] = value << 48 | (uint64_t)on << 32 | second;
        }
    }
}

static void build(struct table *t, const JHUFF_TBL *from, bool ac) {
    t->ac = ac;
    memcpy(t->lengths, from->bits, sizeof t->lengths);
    memcpy(t->symbols, from->huffval, sizeof t->symbols);
    memset(t->one, 0, sizeof t->one);
    int code = 0, place = 0;
    for (int length = 1; length <= 16; length++, code <<= 1) {
        t->offset[length] = place - code;
        for (int i = 0; i < from->bits[length]; i++, code++, place++)
            if (length <= LOOK) fill_one(t, code, length, from->huffval[place]);
        t->limit[length] = (uint32_t)code << (16 - length);
    }
    if (ac) fill_two(t);
}

/* The table of this code: the last image's where it had the same. */
static struct table *table_of(struct entropy *e, j_decompress_ptr info, bool ac, int number) {
    const JHUFF_TBL *from = (ac ? info->ac_huff_tbl_ptrs : info->dc_huff_tbl_ptrs)[number];
    struct table *t = &e->tables[ac][number];
    if (memcmp(t->lengths + 1, from->bits + 1, 16) || memcmp(t->symbols, from->huffval, 256)) build(t, from, ac);
    return t;
}

/* Unstuffs the source up to a marker; false where memory ends. */
static bool begin_segment(struct entropy *e) {
    size_t need = e->end - e->source + PADDING;
    if (need > e->room) {
        free(e->segment);
        e->segment = malloc(need);
        e->room = e->segment ? need : 0;
        if (!e->segment) return false;
    }
    uint8_t *out = e->segment;
    const uint8_t *from = e->source;
    for (;;) {
        const uint8_t *stuffed = memchr(from, 0xFF, e->end - from);
        size_t plain = (stuffed ? stuffed : e->end) - from;
        memcpy(out, from, plain);
        out += plain;
        from += plain;
        if (e->end - from < 2 || from[1] != 0) break;
        *out++ = 0xFF;
        from += 2;
    }
    memset(out, 0, PADDING);
    e->source = from;
    /* libjpeg reads ahead, and says that a file without a marker at its end is truncated */
    e->segment_end = e->end - from >= 2 ? out : out - e->segment > 8 ? out - 8 : e->segment;
    e->bits = (struct bits){.next = e->segment};
    memset(e->prediction, 0, sizeof e->prediction);
    return true;
}

/* At least 56 bits. */
static INLINE void refill(struct bits *b) {
    uint64_t more;
    memcpy(&more, b->next, 8);
    b->buffer |= __builtin_bswap64(more) >> b->count;
    b->next += (63 - b->count) >> 3;
    b->count |= 56;
}

static INLINE void drop(struct bits *b, int bits) {
    b->buffer <<= bits;
    b->count -= bits;
}

/* The entry, whole, of a coefficient that does not fit in a look; 0 where there is no such code. */
static uint32_t long_entry(const struct table *t, uint64_t buffer) {
    uint32_t entry = t->one[buffer >> (64 - LOOK)], code = buffer >> 48;
    int length = entry & 0x3F, symbol = entry >> 16;
    if (!entry) {
        for (length = LOOK + 1; length <= 16 && code >= t->limit[length]; length++) continue;
        if (length > 16) return 0;
        symbol = t->symbols[(int)(code >> (16 - length)) + t->offset[length]];
    }
    int size = symbol & 15, value = size ? extended((int)(buffer << length >> (64 - size)), size) : 0;
    return (uint32_t)(uint16_t)value << 16 | (t->ac ? stride(symbol) : 0) << 8 | WHOLE | (length + size);
}

/* The next coefficient's entry; 0 where the data are damaged. */
static INLINE uint32_t entry_of(const struct table *t, const struct bits *b) {
    uint32_t entry = t->one[b->buffer >> (64 - LOOK)];
    return entry & WHOLE ? entry : long_entry(t, b->buffer);
}

/* The AC coefficients of a block, stored where it is `wanted`; false where the data are damaged. A look that
   would lead past the block's last place is taken a coefficient at a time. */
static INLINE bool ac_of_block(const struct table *t, struct bits *b, bool wanted, JCOEF *block) {
    for (int place = 1;;) {
        refill(b);
        for (int looks = 0; looks < LOOKS; looks++) {
            uint64_t two = t->two[b->buffer >> (64 - LOOK)];
            int first = place + (two >> 32 & 0xFF), to = place + (two >> 8 & 0xFF);
            if (two && to <= DCTSIZE2) {
                drop(b, two & 0x3F);
                if (wanted) block[natural_order[first - 1]] = (JCOEF)(two >> 48);
                if (wanted) block[natural_order[to - 1]] = (JCOEF)(two >> 16);
                place = to;
            } else if (to >= END && to < END + DCTSIZE2) {
                drop(b, two & 0x3F);
                if (wanted && first > place) block[natural_order[first - 1]] = (JCOEF)(two >> 48);
                return true;
            } else {
                uint32_t one = entry_of(t, b);
                drop(b, one & 0x3F);
                place += one >> 8 & 0xFF;
                if (!one || place > DCTSIZE2) return place >= END;
                if (wanted) block[natural_order[place - 1]] = (JCOEF)(one >> 16);
                looks = LOOKS;
            }
            if (place == DCTSIZE2) return true;
        }
    }
}

static INLINE bool read_mcu(j_decompress_ptr info, struct entropy *e, JBLOCKROW *blocks) {
    struct bits bits = e->bits;
    bool wanted = blocks && e->column >= e->first && e->column <= e->last;
    for (int i = 0; i < info->blocks_in_MCU; i++) {
        refill(&bits);
        uint32_t entry = entry_of(e->dc[i], &bits);
        if (!entry) return false;
        drop(&bits, entry & 0x3F);
        unsigned *dc = (unsigned *)&e->prediction[info->MCU_membership[i]];
        *dc += (int16_t)(entry >> 16);
        if (wanted) (*blocks[i])[0] = (JCOEF)*dc;
        if (!(wanted ? ac_of_block(e->ac[i], &bits, true, *blocks[i]) : ac_of_block(e->ac[i], &bits, false, NULL)))
            return false;
    }
    e->bits = bits;
    return (bits.next - e->segment) * 8 - bits.count <= (e->segment_end - e->segment) * 8;
}

static bool mcu_plain(j_decompress_ptr info, struct entropy *e, JBLOCKROW *blocks) { return read_mcu(info, e, blocks); }

#if defined(__x86_64__) && !defined(PLAIN)
__attribute__((target("bmi,bmi2"))) static bool mcu_bmi2(j_decompress_ptr info, struct entropy *e, JBLOCKROW *blocks) {
    return read_mcu(info, e, blocks);
}
static bool one_mcu(j_decompress_ptr info, struct entropy *e, JBLOCKROW *blocks) {
    return (__builtin_cpu_supports("bmi2") ? mcu_bmi2 : mcu_plain)(info, e, blocks);
}
#else
#define one_mcu mcu_plain
#endif

/* The next segment, where the marker before it is the one due and the last one is used up. */
static bool restart(struct entropy *e) {
    int64_t left = (e->segment_end - e->bits.next) * 8 + e->bits.count;
    if (left >= 8 || e->end - e->source < 2 || e->source[0] != 0xFF || e->source[1] != JPEG_RST0 + e->restart)
        return false;
    e->source += 2;
    e->restart = (e->restart + 1) % 8;
    return begin_segment(e);
}

/* libjpeg's hook: one MCU into zeroed blocks, or passed over where `blocks` is NULL. */
static boolean decode_mcu(j_decompress_ptr info, JBLOCKROW *blocks) {
    struct entropy *e = info->client_data;
    if (info->restart_interval && e->until_restart-- == 0) {
        if (!restart(e)) e->lost(info);
        e->until_restart = info->restart_interval - 1;
    }
    if (!one_mcu(info, e, blocks)) e->lost(info);
    if (++e->column == (int)info->MCUs_per_row) e->column = 0;
    return TRUE;
}

bool entropy_takes(j_decompress_ptr info) {
    return !info->progressive_mode && !info->arith_code && !jpeg_has_multiple_scans(info) && info->data_precision == 8;
}

void entropy_begin(struct entropy *e, j_decompress_ptr info, int first, int last, void (*lost)(j_decompress_ptr)) {
    info->client_data = e;
    e->lost = lost;
    e->first = first;
    e->last = last;
    e->column = e->restart = 0;
    e->until_restart = info->restart_interval;
    for (int i = 0; i < info->blocks_in_MCU; i++) {
        const jpeg_component_info *component = info->cur_comp_info[info->MCU_membership[i]];
        e->dc[i] = table_of(e, info, false, component->dc_tbl_no);
        e->ac[i] = table_of(e, info, true, component->ac_tbl_no);
    }
    e->source = info->src->next_input_byte;
    e->end = e->source + info->src->bytes_in_buffer;
    if (!begin_segment(e)) lost(info);
    info->entropy->decode_mcu = decode_mcu;
}

void entropy_rest(struct entropy *e) {
    if (e->room <= KEPT) return;
    free(e->segment);
    e->segment = NULL;
    e->room = 0;
}

struct entropy *entropy_new(void) { return calloc(1, sizeof(struct entropy)); }

void entropy_free(struct entropy *e) {
    if (e) free(e->segment);
    free(e);
}
