/* Entropy-decoder states inside JPEG tiles (see _states.h): a scanner, a maker of streams, a table.
 *
 * Covered are baseline streams of 8 bits with one scan of all components, without restart intervals, on
 * tiles of whole MCUs: what scanners write. The scanner reads every code of a tile and is stricter than
 * libjpeg: whatever it doubts is refused, and then decoded as if there were no states. What libjpeg could
 * complain about further on in a tile is therefore seen here before the tile is remembered.
 *
 * A stream of MCU columns ca..cb and rows ra..rb is made of pieces, one a row: an invented MCU, the
 * stored bytes from the state at ca to the state at cb, a restart marker. Restarts reset the DC
 * predictors to 0; the invented MCU's DC differences set them to what the state says, and its AC codes fill
 * up to the bit at which the stored bits go on. So nothing is shifted and the bytes are copied as they are.
 *
 * Bytes come from strangers. Every read and write is bounded here, whatever they say.
 */

#include "_states.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define QUICK_BITS 10
#define MAX_BLOCKS 10 /* in an MCU: libjpeg's D_MAX_BLOCKS_IN_MCU */
#define MAX_SIDE_PX 65500
#define MAX_TILE (1 << 24) /* bytes: a state has 24 bits for its byte */
#define NEAR_PX 2 /* fancy upsampling reads one chroma sample beyond: two pixels of 2:1 */
#define SPARE 512 /* bytes that reading one block may run past the end: 64 codes of 31 bits */
#define PIECE_BYTES 512 /* an invented MCU (10 DC of 27 bits, 7 AC of 31, 10 ends of 16), stuffed; a marker */
#define MAX_DC 2047

/* --- Huffman tables and headers --------------------------------------------------------------- */

typedef struct {
  uint8_t bits[16], symbols[256];
  int n;                 /* of symbols */
  uint16_t code[256];    /* by symbol */
  uint8_t length[256];   /* by symbol; 0: has no code */
  int32_t maxcode[17], offset[17];
  uint16_t quick[1 << QUICK_BITS]; /* by the next bits, 0: longer or invalid. DC: length << 8 | symbol.
                                      AC: how far k moves << 8 | bits of code and value together */
} Table;

#define BLOCK_ENDS 128 /* in place of how far k moves */

typedef struct {
  Table dc[2], ac[2];
  unsigned defined; /* 1 and 2: DC, 4 and 8: AC */
  int components, h[3], v[3], dc_of[3], ac_of[3], ids[3];
  int blocks, of_block[MAX_BLOCKS]; /* component of each block of an MCU */
  int mcu_width, mcu_height, columns, rows;
  size_t frame, sos, scan; /* where these begin; `scan` is the first entropy-coded byte */
} Header;

struct Scratch {
  Header header;
  uint8_t *clean, *made;
  uint32_t *stuffed;
  uint64_t *raw;
  size_t clean_size, made_size, stuffed_size, raw_size;
};

static int room(void *block, size_t *have, size_t want) {
  void **place = block;
  if (*have >= want) return 0;
  free(*place);
  *place = malloc(want);
  *have = *place ? want : 0;
  return *place ? 0 : -1;
}

static uint16_t quick_ac(int length, int symbol) {
  int run = symbol >> 4, bits = symbol & 15;
  if (symbol == 0) return (uint16_t)(BLOCK_ENDS << 8 | length);
  if (bits == 0 && run != 15) return 0; /* no code of a sequential frame */
  return (uint16_t)((run + 1) << 8 | (length + bits));
}

/* 0 when libjpeg would take the table too. */
static int set_table(Table *t, int is_ac, const uint8_t *bits, const uint8_t *symbols, int n) {
  if (t->n == n && !memcmp(t->bits, bits, 16) && !memcmp(t->symbols, symbols, (size_t)n)) return 0;
  memset(t, 0, sizeof *t);
  int32_t code = 0;
  int k = 0;
  for (int l = 1; l <= 16; l++, code <<= 1) {
    t->offset[l] = k - code;
    t->maxcode[l] = -1;
    for (int i = 0; i < bits[l - 1]; i++, k++, code++) {
      if (code >= (1 << l) - 1) goto bad; /* a code of ones only is not allowed */
      int symbol = symbols[k];
      if (!is_ac && symbol > 15) goto bad;
      t->code[symbol] = (uint16_t)code;
      t->length[symbol] = (uint8_t)l;
      t->maxcode[l] = code;
      uint16_t quick = is_ac ? quick_ac(l, symbol) : (uint16_t)(l << 8 | symbol);
      for (int j = 0; l <= QUICK_BITS && j < 1 << (QUICK_BITS - l); j++)
        t->quick[(code << (QUICK_BITS - l)) + j] = quick;
    }
  }
  memcpy(t->bits, bits, 16);
  memcpy(t->symbols, symbols, (size_t)n);
  t->n = n;
  return 0;
bad:
  memset(t, 0, sizeof *t);
  return -1;
}

static int read_tables(Header *h, const uint8_t *at, const uint8_t *end) {
  while (at < end) {
    if (end - at < 17) return -1;
    int kind = *at, n = 0;
    for (int i = 1; i <= 16; i++) n += at[i];
    if ((kind & 0xEE) || n > 256 || end - at < 17 + n) return -1;
    int is_ac = kind >> 4, number = kind & 1;
    if (set_table((is_ac ? h->ac : h->dc) + number, is_ac, at + 1, at + 17, n)) {
      h->defined &= ~(1u << (2 * is_ac + number));
      return -1;
    }
    h->defined |= 1u << (2 * is_ac + number);
    at += 17 + n;
  }
  return 0;
}

static int read_frame(Header *h, const uint8_t *s, size_t length) {
  if (length < 8 || s[0] != 8) return -1;
  int height = s[1] << 8 | s[2], width = s[3] << 8 | s[4], n = s[5], tall = 1, wide = 1;
  if ((n != 1 && n != 3) || length < 8 + 3 * (size_t)n) return -1;
  h->components = n;
  h->blocks = 0;
  for (int i = 0; i < n; i++) {
    h->ids[i] = s[6 + 3 * i], h->h[i] = s[7 + 3 * i] >> 4, h->v[i] = s[7 + 3 * i] & 15;
    if (h->h[i] < 1 || h->h[i] > 4 || h->v[i] < 1 || h->v[i] > 4) return -1;
    if (n == 1 && (h->h[i] != 1 || h->v[i] != 1)) return -1; /* an MCU is one block all the same */
    if (h->blocks + h->h[i] * h->v[i] > MAX_BLOCKS) return -1;
    for (int b = 0; b < h->h[i] * h->v[i]; b++) h->of_block[h->blocks++] = i;
    if (h->h[i] > wide) wide = h->h[i];
    if (h->v[i] > tall) tall = h->v[i];
  }
  if (n == 3 && (h->ids[0] == h->ids[1] || h->ids[1] == h->ids[2] || h->ids[0] == h->ids[2])) return -1;
  h->mcu_width = 8 * wide, h->mcu_height = 8 * tall;
  if (!width || !height || width % h->mcu_width || height % h->mcu_height) return -1;
  h->columns = width / h->mcu_width, h->rows = height / h->mcu_height;
  return 0;
}

static int read_scan_header(Header *h, const uint8_t *s, size_t length) {
  int n = h->components;
  if (length != 6 + 2 * (size_t)n || s[0] != n) return -1;
  for (int i = 0; i < n; i++) {
    h->dc_of[i] = s[2 + 2 * i] >> 4, h->ac_of[i] = s[2 + 2 * i] & 15;
    if (s[1 + 2 * i] != h->ids[i] || h->dc_of[i] > 1 || h->ac_of[i] > 1) return -1;
    if (!(h->defined >> h->dc_of[i] & 1) || !(h->defined >> (2 + h->ac_of[i]) & 1)) return -1;
  }
  return s[1 + 2 * n] == 0 && s[2 + 2 * n] == 63 && s[3 + 2 * n] == 0 ? 0 : -1;
}

/* Segments up to the scan, or to the end of a stream of tables. -1: not covered. */
static int read_segments(Header *h, const uint8_t *data, size_t size, int is_tables) {
  size_t at = 2;
  h->components = 0;
  while (at + 4 <= size && data[at] == 0xFF) {
    int marker = data[at + 1];
    size_t length = (size_t)(data[at + 2] << 8 | data[at + 3]);
    const uint8_t *s = data + at + 4;
    if (length < 2 || length > size - at - 2) return -1;
    if (marker == 0xC4) {
      if (read_tables(h, s, data + at + 2 + length)) return -1;
    } else if (marker == 0xC0 && !is_tables && !h->components) {
      if (read_frame(h, s, length)) return -1;
      h->frame = at;
    } else if (marker == 0xDA && !is_tables && h->components) {
      if (read_scan_header(h, s, length)) return -1;
      h->sos = at, h->scan = at + 2 + length;
      return 0;
    } else if (marker != 0xDB && marker != 0xFE && (marker < 0xE0 || marker > 0xEF)) {
      return -1; /* restart intervals, progressive frames, and what nobody writes */
    }
    at += 2 + length;
  }
  return is_tables ? 0 : -1;
}

static int read_header(Header *h, const Touched *tile) {
  h->defined = 0; /* tables of the tile before are there still, but count for nothing */
  if (tile->size > MAX_TILE) return -1;
  if (tile->tables_size && read_segments(h, tile->tables, tile->tables_size, 1)) return -1;
  return read_segments(h, tile->data, tile->size, 0);
}

/* --- the scanner ------------------------------------------------------------------------------ */

/* A state is 24 bits of byte (behind the start of the scan), 3 of bit, 3 x 12 of DC predictor. */
#define POSITION_BITS 27

static inline int32_t predictor(uint64_t state, int c) {
  return (int32_t)(state >> (12 * c) & 0xFFF) - 2048;
}

static inline uint64_t state_of(uint64_t position, const int32_t *dc) {
  uint64_t state = position << 36;
  for (int c = 0; c < 3; c++) state |= (uint64_t)(dc[c] + 2048) << (12 * c);
  return state;
}

static inline uint64_t load64(const uint8_t *from) { /* the first byte lowest */
  uint64_t word;
  memcpy(&word, from, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return word;
}

/* The next bits, 57 of them or more, highest first. */
static inline uint64_t peek(const uint8_t *clean, size_t bit) {
  return __builtin_bswap64(load64(clean + (bit >> 3))) << (bit & 7);
}

/* Length of the code that `word` begins with, 0 when there is none. */
static int find_code(const Table *t, uint64_t word, int *symbol) {
  for (int l = 1; l <= 16; l++) {
    int32_t code = (int32_t)(word >> (64 - l));
    if (code > t->maxcode[l]) continue;
    int at = code + t->offset[l];
    if (at < 0 || at >= t->n) return 0;
    *symbol = t->symbols[at];
    return l;
  }
  return 0;
}

/* One block from `bit` on, at most SPARE - 8 bytes of it; 0 when it is not as it should be. */
static inline size_t skip_block(const Table *dc, const Table *ac, const uint8_t *clean, size_t bit,
                                int32_t *last_dc) {
  uint64_t word = peek(clean, bit);
  int used = 0, symbol, quick = dc->quick[word >> (64 - QUICK_BITS)], length = quick >> 8;
  symbol = quick & 255;
  if (!quick && !(length = find_code(dc, word, &symbol))) return 0;
  if (symbol > 11) return 0;
  if (symbol) {
    int32_t value = (int32_t)(word << length >> (64 - symbol));
    *last_dc += value < 1 << (symbol - 1) ? value - (1 << symbol) + 1 : value;
    if (*last_dc > MAX_DC || *last_dc < -MAX_DC) return 0;
  }
  used = length + symbol; /* 27 at most */
  word <<= used;
  int k = 1;
  while (k < 64) {
    if (used > 57 - 17) { /* a code may have 16 bits; those of its value are not looked at */
      bit += (size_t)used;
      used = 0;
      word = peek(clean, bit);
    }
    quick = ac->quick[word >> (64 - QUICK_BITS)];
    if (!quick) {
      length = find_code(ac, word, &symbol);
      if (!length || !(quick = quick_ac(length, symbol))) return 0;
    }
    used += quick & 255;
    word <<= quick & 255; /* 31 at most */
    k += quick >> 8;
  }
  return k == 64 || k >= BLOCK_ENDS ? bit + (size_t)used : 0; /* not beyond the 63rd coefficient */
}

/* Take the stuffed zeros out of the scan, noting behind which 0xFF they were. -1 unless the end marker
 * follows the codes at once. */
static int unstuff(Scratch *w, const uint8_t *data, size_t size, size_t *clean, size_t *zeros) {
  size_t at = w->header.scan, n = 0, z = 0;
  if (room(&w->clean, &w->clean_size, size + SPARE) ||
      room(&w->stuffed, &w->stuffed_size, (size / 2 + 1) * sizeof *w->stuffed))
    return -1;
  for (;;) {
    const uint8_t *mark = memchr(data + at, 0xFF, size - at);
    if (!mark || (size_t)(mark - data) + 1 >= size) return -1;
    size_t run = (size_t)(mark - (data + at));
    memcpy(w->clean + n, data + at, run);
    n += run, at += run + 2;
    if (mark[1] == 0xD9) break;
    if (mark[1] != 0) return -1;
    w->stuffed[z++] = (uint32_t)n;
    w->clean[n++] = 0xFF;
  }
  memset(w->clean + n, 0xFF, SPARE);
  *clean = n, *zeros = z;
  return 0;
}

/* States of every `step`-th MCU of each row and one behind the last, into w->raw; how many, 0: refused. */
static size_t scan_tile(Scratch *w, const Touched *tile, int step) {
  const Header *h = &w->header;
  size_t size, zeros, z = 0, bit = 0, out = 0;
  size_t pieces = (size_t)((h->columns + step - 1) / step), n = pieces * (size_t)h->rows + 1;
  if (unstuff(w, tile->data, tile->size, &size, &zeros)) return 0;
  /* A block has two codes of a bit or more: a frame that cannot be in these bytes gets no memory. */
  if ((size_t)h->columns * (size_t)h->rows > size * 4) return 0;
  if (room(&w->raw, &w->raw_size, n * sizeof *w->raw)) return 0;
  int32_t dc[3] = {0, 0, 0};
  for (int row = 0; row < h->rows; row++)
    for (int column = 0; column < h->columns; column++) {
      if (column % step == 0) {
        while (z < zeros && w->stuffed[z] < bit >> 3) z++;
        w->raw[out++] = state_of(bit + 8 * z, dc);
      }
      for (int b = 0; b < h->blocks; b++) {
        int c = h->of_block[b];
        bit = skip_block(h->dc + h->dc_of[c], h->ac + h->ac_of[c], w->clean, bit, dc + c);
        if (!bit || bit > size * 8) return 0;
      }
    }
  while (z < zeros && w->stuffed[z] < bit >> 3) z++;
  w->raw[out++] = state_of(bit + 8 * z, dc);
  return (bit + 7) >> 3 == size && out == n ? n : 0; /* bytes to spare would be a warning */
}

/* --- a stream of the MCUs that are needed ----------------------------------------------------- */

typedef struct {
  uint8_t *to;
  uint64_t word;
  int bits;
} Writer;

static inline void put(Writer *w, uint32_t value, int bits) {
  w->word = w->word << bits | value;
  for (w->bits += bits; w->bits >= 8; w->bits -= 8) {
    uint8_t byte = (uint8_t)(w->word >> (w->bits - 8));
    *w->to++ = byte;
    if (byte == 0xFF) *w->to++ = 0;
  }
}

static inline int size_of(int32_t value) { return value ? 32 - __builtin_clz((unsigned)abs(value)) : 0; }

static int put_dc(Writer *w, const Table *t, int32_t value) {
  int s = size_of(value);
  if (!t->length[s]) return -1;
  put(w, t->code[s], t->length[s]);
  if (s) put(w, (uint32_t)(value < 0 ? value + (1 << s) - 1 : value), s);
  return 0;
}

/* As far towards `value` as one code goes: tables made for one tile have no code for large differences,
 * but a component with several blocks in an MCU can get there in several steps. */
static int32_t one_step(const Table *t, int32_t value) {
  int s = size_of(value);
  if (t->length[s]) return value;
  while (s > 0 && !t->length[s]) s--;
  int32_t most = (1 << s) - 1;
  return value < 0 ? -most : most;
}

/* AC codes whose bits add up to `need` modulo 8, the fewest: a walk over residues. */
static int put_filler(Writer *w, const Table *t, int need) {
  static const uint8_t common[] = {0x01, 0x02, 0x03, 0x11, 0x04, 0x21, 0x12, 0x31};
  uint8_t from[8] = {0}, by[8] = {0}, queue[8] = {0}, path[8];
  int head = 0, tail = 1, seen = 1, n = 0;
  while (head < tail && !(seen >> need & 1)) {
    int at = queue[head++];
    for (size_t i = 0; i < sizeof common; i++) {
      int symbol = common[i], next = (at + t->length[symbol] + (symbol & 15)) & 7;
      if (!t->length[symbol] || seen >> next & 1) continue;
      seen |= 1 << next, from[next] = (uint8_t)at, by[next] = (uint8_t)symbol;
      queue[tail++] = (uint8_t)next;
    }
  }
  if (!(seen >> need & 1)) return -1;
  for (int at = need; at != 0; at = from[at]) path[n++] = by[at];
  while (n--) {
    put(w, t->code[path[n]], t->length[path[n]]);
    put(w, 0, path[n] & 15);
  }
  return 0;
}

/* One invented MCU: it leaves the predictors of `state` and ends at the bit where that state's begin. */
static int put_mcu(Writer *w, const Header *h, uint64_t state) {
  int goal = (int)(state >> 36 & 7), before = -1;
  int32_t left = 0;
  for (int b = 0; b < h->blocks; b++) {
    int c = h->of_block[b];
    const Table *dc = h->dc + h->dc_of[c], *ac = h->ac + h->ac_of[c];
    if (c != before) {
      if (left) return -1;
      left = predictor(state, c), before = c;
    }
    int32_t step = one_step(dc, left);
    if (put_dc(w, dc, step) || !ac->length[0]) return -1;
    left -= step;
    if (b == h->blocks - 1 && put_filler(w, ac, (goal - w->bits - ac->length[0]) & 7)) return -1;
    put(w, ac->code[0], ac->length[0]);
  }
  return left ? -1 : 0;
}

/* How a stored byte is written: 0xFF has a zero behind it. */
static inline size_t width_of(const uint8_t *byte) { return *byte == 0xFF ? 2 : 1; }

/* Stored bits from one state to another, behind an invented MCU; -1 when they cannot be. */
static int put_piece(Writer *w, const uint8_t *end_of_room, const Header *h, const Touched *tile,
                     uint64_t state, uint64_t end) {
  const uint8_t *scan = tile->data + h->scan, *tile_end = tile->data + tile->size;
  size_t from_at = (size_t)(state >> 39), stop_at = (size_t)(end >> 39);
  /* The end marker is behind the codes, so two bytes can be looked at wherever a state points. */
  if (stop_at < from_at || stop_at + 2 > (size_t)(tile_end - scan)) return -1;
  if ((size_t)(end_of_room - w->to) < PIECE_BYTES + stop_at - from_at) return -1;
  const uint8_t *from = scan + from_at, *stop = scan + stop_at;
  w->word = 0, w->bits = 0;
  if (put_mcu(w, h, state)) return -1;
  if (w->bits) { /* the first stored byte begins with somebody else's bits: replace them */
    int theirs = w->bits;
    put(w, *from & (0xFFu >> theirs), 8 - theirs);
    from += width_of(from);
  }
  if (end >> 36 & 7) stop += width_of(stop);
  if (stop > from) {
    memcpy(w->to, from, (size_t)(stop - from));
    w->to += stop - from;
  }
  return 0;
}

/* --- what is kept of a tile ------------------------------------------------------------------- */

/* Each of the four fields of a state takes as many bits as this tile's largest needs: 4 to 5 bytes a
 * state, half of what plain ones would. The first field is the position, from 0. */
struct States {
  States *next;
  uint64_t key, checksum;
  int64_t start;
  uint32_t size, n; /* bytes of the tile, states; 0 states: refused */
  uint16_t step;
  int16_t low[3];
  uint8_t width[4];
  uint8_t packed[]; /* and 8 spare bytes, so that fields are read by words */
};

static int bits_for(uint64_t largest) { return largest ? 64 - __builtin_clzll(largest) : 0; }

static void put_field(uint8_t *packed, size_t *bit, uint64_t value, int width) {
  uint8_t *at = packed + (*bit >> 3);
  value = load64(at) | value << (*bit & 7);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  memcpy(at, &value, 8);
  *bit += (size_t)width;
}

static States *pack(const uint64_t *raw, size_t n, size_t *bytes) {
  uint64_t furthest = 0;
  int32_t low[3] = {MAX_DC, MAX_DC, MAX_DC}, high[3] = {-MAX_DC, -MAX_DC, -MAX_DC};
  for (size_t i = 0; i < n; i++) {
    if (raw[i] >> 36 > furthest) furthest = raw[i] >> 36;
    for (int c = 0; c < 3; c++) {
      int32_t value = predictor(raw[i], c);
      if (value < low[c]) low[c] = value;
      if (value > high[c]) high[c] = value;
    }
  }
  int width[4] = {bits_for(furthest)}, total = width[0];
  for (int c = 0; c < 3 && n; c++) total += width[c + 1] = bits_for((uint64_t)(high[c] - low[c]));
  *bytes = sizeof(States) + (n * (size_t)total + 7) / 8 + 8;
  States *out = calloc(1, *bytes);
  if (!out) return NULL;
  out->n = (uint32_t)n;
  for (int i = 0; i < 4; i++) out->width[i] = (uint8_t)width[i];
  for (int c = 0; c < 3; c++) out->low[c] = (int16_t)low[c];
  size_t bit = 0;
  for (size_t i = 0; i < n; i++) {
    put_field(out->packed, &bit, raw[i] >> 36, width[0]);
    for (int c = 0; c < 3; c++)
      put_field(out->packed, &bit, (uint64_t)(predictor(raw[i], c) - low[c]), width[c + 1]);
  }
  return out;
}

static uint64_t unpack(const States *s, size_t i) {
  size_t bit = i * (size_t)(s->width[0] + s->width[1] + s->width[2] + s->width[3]);
  uint64_t field[4];
  for (int f = 0; f < 4; bit += s->width[f++])
    field[f] = load64(s->packed + (bit >> 3)) >> (bit & 7) & ((1ull << s->width[f]) - 1);
  int32_t dc[3];
  for (int c = 0; c < 3; c++) dc[c] = s->low[c] + (int32_t)field[c + 1];
  return state_of(field[0], dc);
}

/* States mean something for the very bytes that were scanned: this tells them from others. Not a
 * secret, nor proof against somebody who tries: with wrong states pixels are wrong and memory is safe. */
static uint64_t add_up(const uint8_t *data, size_t size, uint64_t seed) {
  const uint64_t odd = 0x9E3779B97F4A7C15ull;
  uint64_t a = seed ^ size, b = ~seed;
  for (; size >= 16; data += 16, size -= 16) { /* two sums, so that neither waits for the other */
    a = (a ^ load64(data)) * odd, a ^= a >> 32;
    b = (b ^ load64(data + 8)) * odd, b ^= b >> 32;
  }
  uint8_t last[16] = {0};
  if (size) memcpy(last, data, size);
  a = (a ^ load64(last)) * odd;
  b = (b ^ load64(last + 8)) * odd;
  return (a ^ a >> 29) * odd ^ b;
}

static uint64_t checksum(const Touched *tile) {
  return add_up(tile->data, tile->size, add_up(tile->tables, tile->tables_size, 0));
}

/* --- the table -------------------------------------------------------------------------------- */

static struct {
  pthread_mutex_t lock;
  States **buckets;
  size_t n_buckets; /* a power of two */
  int64_t limit, bytes, tiles, refused;
  int step_px, full, readers;
} table = {.lock = PTHREAD_MUTEX_INITIALIZER};

static atomic_int_least64_t hits, misses, failed;

static size_t bucket_of(uint64_t key, int64_t start, size_t n_buckets) {
  uint64_t mixed = (key ^ (uint64_t)start * 0x9E3779B97F4A7C15ull) * 0xD6E8FEB86659FD93ull;
  return (size_t)(mixed >> 32 ^ mixed) & (n_buckets - 1);
}

static void lock(void) { pthread_mutex_lock(&table.lock); }
static void unlock(void) { pthread_mutex_unlock(&table.lock); }

static void unlock_in_child(void) {
  table.readers = 0; /* the threads that were inside are not in this process */
  unlock();
}

void states_init(void) {
  static int done;
  if (!done++) pthread_atfork(lock, unlock, unlock_in_child);
}

static void empty(void) {
  for (size_t i = 0; i < table.n_buckets; i++)
    for (States *s = table.buckets[i], *next; s; s = next) {
      next = s->next;
      free(s);
    }
  free(table.buckets);
  table.buckets = NULL;
  table.n_buckets = 0;
  table.bytes = table.tiles = table.refused = 0;
}

/* Chains of a few: a bucket (8 bytes) for every KiB of the bound. */
static int set_buckets(int64_t limit) {
  size_t n = 16;
  while (n < (size_t)1 << 22 && (int64_t)n * 1024 < limit) n *= 2;
  if (n == table.n_buckets) return 0;
  States **buckets = calloc(n, sizeof *buckets);
  if (!buckets) return -1;
  for (size_t i = 0; i < table.n_buckets; i++)
    for (States *s = table.buckets[i], *next; s; s = next) {
      States **to = buckets + bucket_of(s->key, s->start, n);
      next = s->next;
      s->next = *to;
      *to = s;
    }
  table.bytes += ((int64_t)n - (int64_t)table.n_buckets) * (int64_t)sizeof *buckets;
  free(table.buckets);
  table.buckets = buckets;
  table.n_buckets = n;
  return 0;
}

int states_limit(int64_t bytes, int step_px) {
  int status = 0;
  lock();
  table.limit = bytes > 0 ? bytes : 0;
  table.step_px = step_px;
  table.full = 0;
  if (!table.limit) {
    if (!table.readers) empty();
    hits = misses = failed = 0;
  } else if (set_buckets(table.limit)) {
    table.limit = 0;
    status = -1;
  }
  unlock();
  return status;
}

Counts states_counts(void) {
  lock();
  Counts out = {table.limit, table.bytes, table.tiles, table.refused, hits, misses, failed};
  unlock();
  return out;
}

void states_enter(void) {
  lock();
  table.readers++;
  unlock();
}

void states_leave(void) {
  lock();
  if (!--table.readers && !table.limit) empty();
  unlock();
}

static const States *look_up(uint64_t key, int64_t start) {
  const States *s = table.n_buckets ? table.buckets[bucket_of(key, start, table.n_buckets)] : NULL;
  while (s && (s->key != key || s->start != start)) s = s->next;
  return s;
}

Found states_find(const Touched *tile, const States **states) {
  if (!tile->key) return PLAIN_TILE;
  lock();
  int on = table.limit > 0, full = table.full;
  const States *found = on ? look_up(tile->key, tile->start) : NULL;
  unlock();
  if (!on) return PLAIN_TILE;
  if (found && !found->n) return PLAIN_TILE;
  if (found) {
    *states = found;
    return KNOWN_TILE;
  }
  misses++;
  return full ? PLAIN_TILE : NEW_TILE;
}

/* Takes `states`, or frees them. */
static void keep(States *states, int64_t bytes) {
  lock();
  bytes += 16; /* what malloc takes for itself */
  if (!table.limit || look_up(states->key, states->start)) {
    free(states); /* switched off, or another thread was faster */
  } else if (table.bytes + bytes > table.limit) {
    table.full = 1;
    free(states);
  } else {
    States **to = table.buckets + bucket_of(states->key, states->start, table.n_buckets);
    states->next = *to;
    *to = states;
    table.bytes += bytes;
    *(states->n ? &table.tiles : &table.refused) += 1;
  }
  unlock();
}

/* --- what _jpeg.c calls ----------------------------------------------------------------------- */

static int scratch_there(Scratch **scratch) {
  if (!*scratch) *scratch = calloc(1, sizeof **scratch);
  return *scratch != NULL;
}

void states_free(Scratch *scratch) {
  if (!scratch) return;
  free(scratch->clean), free(scratch->made), free(scratch->stuffed), free(scratch->raw);
  free(scratch);
}

void states_remember(Scratch **scratch, const Touched *tile) {
  if (!scratch_there(scratch)) return;
  Scratch *w = *scratch;
  size_t n = 0, bytes;
  lock();
  int step_px = table.step_px;
  int64_t limit = table.limit;
  unlock();
  int step = 1;
  if (!read_header(&w->header, tile)) {
    step = step_px / w->header.mcu_width;
    if (step < 1) step = 1;
    n = scan_tile(w, tile, step);
    /* One huge tile must not be all that is remembered. */
    if ((int64_t)n * 8 > limit / 4) n = 0;
  }
  States *states = pack(w->raw, n, &bytes);
  if (!states) return;
  states->key = tile->key;
  states->start = tile->start;
  states->size = (uint32_t)tile->size;
  states->step = (uint16_t)step;
  states->checksum = n ? checksum(tile) : 0;
  keep(states, (int64_t)bytes);
}

static int is_better(const Header *h, int rb, int columns, int rows) {
  return 4 * (int64_t)columns * rows <= 3 * (int64_t)h->columns * rb;
}

int states_stream(Scratch **scratch, const States *states, const Touched *tile, Part part, Stream *out) {
  if (!scratch_there(scratch)) return -1;
  Scratch *w = *scratch;
  const Header *h = &w->header;
  if (states->size != tile->size || read_header(&w->header, tile)) {
    misses++; /* the tile is not the one that was scanned */
    return 0;
  }
  int step = states->step, wide = step * h->mcu_width;
  int64_t pieces = (h->columns + step - 1) / step;
  if (pieces * h->rows + 1 != states->n) return 0;
  int64_t right = (int64_t)part.left + part.width, bottom = (int64_t)part.top + part.height;
  if (part.left < 0 || part.top < 0 || right > (int64_t)h->columns * h->mcu_width ||
      bottom > (int64_t)h->rows * h->mcu_height)
    return 0; /* libjpeg's to complain about */
  int left = part.left > NEAR_PX ? part.left - NEAR_PX : 0, top = part.top > NEAR_PX ? part.top - NEAR_PX : 0;
  int ca = left / wide * step, cb = (int)((right + NEAR_PX + wide - 1) / wide) * step;
  int ra = top / h->mcu_height, rb = (int)((bottom + NEAR_PX + h->mcu_height - 1) / h->mcu_height);
  if (cb > h->columns) cb = h->columns;
  if (rb > h->rows) rb = h->rows;
  int columns = cb - ca + 1, rows = rb - ra;
  if (!is_better(h, rb, columns, rows) || columns * h->mcu_width > MAX_SIDE_PX) return 0;
  if (states->checksum != checksum(tile)) {
    misses++;
    return 0;
  }

  size_t most = h->scan + 6 + (size_t)rows * PIECE_BYTES + 2 * tile->size;
  if (room(&w->made, &w->made_size, most)) return -1;
  int width = columns * h->mcu_width, height = rows * h->mcu_height;
  memcpy(w->made, tile->data, h->sos);
  uint8_t *frame = w->made + h->frame + 5;
  frame[0] = (uint8_t)(height >> 8), frame[1] = (uint8_t)height;
  frame[2] = (uint8_t)(width >> 8), frame[3] = (uint8_t)width;
  const uint8_t interval[6] = {0xFF, 0xDD, 0, 4, (uint8_t)(columns >> 8), (uint8_t)columns};
  memcpy(w->made + h->sos, interval, 6);
  memcpy(w->made + h->sos + 6, tile->data + h->sos, h->scan - h->sos);
  Writer to = {w->made + h->scan + 6, 0, 0};
  for (int row = ra; row < rb; row++) {
    size_t first = (size_t)(row * pieces + ca / step);
    size_t last = (size_t)(cb == h->columns ? (row + 1) * pieces : row * pieces + cb / step);
    if (put_piece(&to, w->made + most, h, tile, unpack(states, first), unpack(states, last))) {
      states_failed();
      return -1;
    }
    *to.to++ = 0xFF;
    *to.to++ = (uint8_t)(row + 1 < rb ? 0xD0 + ((row - ra) & 7) : 0xD9);
  }
  out->data = w->made;
  out->size = (size_t)(to.to - w->made);
  out->left = part.left - ca * h->mcu_width + h->mcu_width;
  out->top = part.top - ra * h->mcu_height;
  out->edge = h->mcu_width;
  hits++;
  return 1;
}

void states_failed(void) { failed++; }
