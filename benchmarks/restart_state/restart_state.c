/* An experiment: remember the entropy decoder's state inside a tile, and start there next time.
 *
 * scan_tile() walks a baseline tile's Huffman codes once and keeps, for every `step` MCUs of each MCU
 * row, where they begin (byte, bit) and the three DC predictors: 8 bytes a state. restart_loop() does
 * what bare_loop.c does, but hands libjpeg a stream made of the MCUs it needs only: in front of each row
 * piece one invented MCU sets the predictors and fills up to the bit where the stored bits go on; a
 * restart marker follows each piece. Nothing is shifted, the stored bytes are copied as they are.
 *
 * For benchmarks on slides one trusts: what a hostile file could do to it was not looked at.
 */

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "jpeglib.h"

#define ROWS 16
#define NEAR_PX 2 /* fancy upsampling reads one chroma sample beyond: two pixels */
#define GUARD 32

typedef struct {
  uint8_t bits[17], symbols[256];
  uint16_t code[256];   /* by symbol */
  uint8_t length[256];  /* by symbol, 0: has no code */
  uint16_t quick[256];  /* by the next 8 bits: length << 8 | symbol, 0: longer */
  int32_t maxcode[18], offset[17];
} Table;

typedef struct {
  Table dc[2], ac[2];
  int comps, h[3], v[3], td[3], ta[3], ids[3];
  int mcu_w, mcu_h, columns, rows;
  int64_t sof, sos, scan; /* where these begin; `scan` is the first entropy-coded byte */
} Header;

static void table_set(Table *t, const uint8_t *bits, const uint8_t *symbols, int n) {
  if (memcmp(t->bits + 1, bits, 16) == 0 && memcmp(t->symbols, symbols, (size_t)n) == 0) return;
  memset(t, 0, sizeof *t);
  memcpy(t->bits + 1, bits, 16);
  memcpy(t->symbols, symbols, (size_t)n);
  int32_t code = 0, k = 0;
  for (int l = 1; l <= 16; l++, code <<= 1) {
    t->offset[l] = k - code;
    for (int i = 0; i < bits[l - 1]; i++, k++, code++) {
      t->code[symbols[k]] = (uint16_t)code;
      t->length[symbols[k]] = (uint8_t)l;
      for (int j = 0; l <= 8 && j < 1 << (8 - l); j++)
        t->quick[(code << (8 - l)) + j] = (uint16_t)(l << 8 | symbols[k]);
    }
    t->maxcode[l] = bits[l - 1] ? code - 1 : -1;
  }
  t->maxcode[17] = 0x7fffffff;
}

static void read_dht(Header *h, const uint8_t *p, const uint8_t *stop) {
  while (p + 17 <= stop) {
    int n = 0, kind = p[0];
    for (int i = 1; i <= 16; i++) n += p[i];
    if ((kind & 15) > 1 || p + 17 + n > stop) return;
    table_set((kind >> 4 ? h->ac : h->dc) + (kind & 15), p + 1, p + 17, n);
    p += 17 + n;
  }
}

/* Markers up to the scan; 0 when this is no tile the experiment covers. */
static int read_header(Header *h, const uint8_t *d, int64_t n) {
  int64_t p = 2;
  h->comps = 0;
  while (p + 4 <= n && d[p] == 0xFF) {
    int marker = d[p + 1], length = d[p + 2] << 8 | d[p + 3];
    const uint8_t *s = d + p + 4;
    if (marker == 0xC4) read_dht(h, s, d + p + 2 + length);
    if (marker == 0xDD || (marker > 0xC0 && marker < 0xD0 && marker != 0xC4)) return 0;
    if (marker == 0xC0) {
      h->sof = p;
      if ((h->comps = s[5]) != 3) return 0;
      h->mcu_w = h->mcu_h = 8;
      for (int i = 0; i < 3; i++) {
        h->ids[i] = s[6 + 3 * i], h->h[i] = s[7 + 3 * i] >> 4, h->v[i] = s[7 + 3 * i] & 15;
        if (8 * h->h[i] > h->mcu_w) h->mcu_w = 8 * h->h[i];
        if (8 * h->v[i] > h->mcu_h) h->mcu_h = 8 * h->v[i];
      }
      int height = s[1] << 8 | s[2], width = s[3] << 8 | s[4];
      if (width % h->mcu_w || height % h->mcu_h) return 0;
      h->columns = width / h->mcu_w, h->rows = height / h->mcu_h;
    }
    if (marker == 0xDA) {
      if (h->comps != 3 || s[0] != 3) return 0;
      for (int i = 0; i < 3; i++) h->td[i] = s[2 + 2 * i] >> 4 & 1, h->ta[i] = s[2 + 2 * i] & 1;
      h->sos = p, h->scan = p + 2 + length;
      return 1;
    }
    p += 2 + length;
  }
  return 0;
}

/* --- the scanner ------------------------------------------------------------------------------ */

static inline uint64_t peek(const uint8_t *clean, int64_t bit) {
  uint64_t word;
  memcpy(&word, clean + (bit >> 3), 8);
  return __builtin_bswap64(word) << (bit & 7);
}

static inline int symbol(const Table *t, uint64_t word, int64_t *bit) {
  int quick = t->quick[word >> 56], l = 9;
  if (quick) return *bit += quick >> 8, quick & 255;
  while ((int32_t)(word >> (64 - l)) > t->maxcode[l]) l++;
  if (l > 16) return -1;
  *bit += l;
  return t->symbols[(int32_t)(word >> (64 - l)) + t->offset[l]];
}

/* States of every `step`-th MCU of each row, and one behind the last; 0 when it is not covered. */
int64_t scan_tile(const uint8_t *data, int64_t n, const uint8_t *tables, int64_t tables_n, int step,
                  uint64_t *states) {
  static _Thread_local Header header;
  static _Thread_local uint8_t *clean;
  static _Thread_local uint32_t *stuffed;
  if (tables_n) { /* an abbreviated stream: only its Huffman tables matter here */
    Header *h = &header;
    read_header(h, tables, tables_n);
  }
  if (!read_header(&header, data, n)) return 0;
  const Header *h = &header;
  clean = realloc(clean, (size_t)n + GUARD), stuffed = realloc(stuffed, (size_t)n * 4);
  int64_t size = 0, zeros = 0, z = 0, bit = 0, out = 0;
  for (int64_t p = h->scan; p < n; p++) {
    if (data[p] == 0xFF) {
      if (p + 1 >= n || data[p + 1] != 0) break; /* EOI */
      stuffed[zeros++] = (uint32_t)size;
      p++;
      clean[size++] = 0xFF;
    } else {
      clean[size++] = data[p];
    }
  }
  memset(clean + size, 0xFF, GUARD);
  int32_t dc[3] = {0, 0, 0};
  for (int64_t mcu = 0; mcu <= (int64_t)h->rows * h->columns; mcu++) {
    if (mcu % h->columns % step == 0) {
      int64_t byte = bit >> 3;
      while (z < zeros && stuffed[z] < byte) z++;
      uint64_t state = (uint64_t)(byte + z) << 39 | (uint64_t)(bit & 7) << 36;
      for (int c = 0; c < 3; c++) state |= (uint64_t)(dc[c] & 0xFFF) << (12 * c);
      states[out++] = state;
    }
    if (mcu == (int64_t)h->rows * h->columns) break;
    for (int c = 0; c < 3; c++)
      for (int b = 0; b < h->h[c] * h->v[c]; b++) {
        if (bit >> 3 > size) return 0;
        uint64_t word = peek(clean, bit);
        int64_t before = bit;
        int s = symbol(h->dc + h->td[c], word, &bit);
        if (s < 0 || s > 11) return 0;
        if (s) {
          int32_t value = (int32_t)((word << (bit - before)) >> (64 - s));
          dc[c] += value < 1 << (s - 1) ? value - (1 << s) + 1 : value;
        }
        bit += s;
        for (int k = 1; k < 64; k++) {
          s = symbol(h->ac + h->ta[c], peek(clean, bit), &bit);
          if (s < 0 || bit >> 3 > size) return 0;
          if (s == 0) break;
          k += s >> 4;
          bit += s & 15;
        }
      }
  }
  return out;
}

/* --- a stream of the MCUs that are needed ------------------------------------------------------ */

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

static int put_dc(Writer *w, const Table *t, int32_t value) {
  int s = value ? 32 - __builtin_clz((unsigned)abs(value)) : 0;
  if (!t->length[s]) return 0;
  put(w, t->code[s], t->length[s]);
  if (s) put(w, (uint32_t)(value < 0 ? value + (1 << s) - 1 : value), s);
  return 1;
}

/* AC coefficients whose bits add up to `need` modulo 8, shortest first: a walk over residues. */
static int put_filler(Writer *w, const Table *t, int need) {
  static const uint8_t common[] = {0x01, 0x02, 0x03, 0x11, 0x04, 0x21, 0x12, 0x31};
  uint8_t from[8], by[8], queue[8], path[8];
  int head = 0, tail = 0, seen = 1, n = 0;
  queue[tail++] = 0;
  while (head < tail && !(seen >> need & 1)) {
    int at = queue[head++];
    for (int i = 0; i < 8; i++) {
      int symbol = common[i], next = (at + t->length[symbol] + (symbol & 15)) & 7;
      if (!t->length[symbol] || seen >> next & 1) continue;
      seen |= 1 << next, from[next] = (uint8_t)at, by[next] = (uint8_t)symbol;
      queue[tail++] = (uint8_t)next;
    }
  }
  if (!(seen >> need & 1)) return 0;
  for (int at = need; at != 0; at = from[at]) path[n++] = by[at];
  while (n--) {
    put(w, t->code[path[n]], t->length[path[n]]);
    put(w, 0, path[n] & 15);
  }
  return 1;
}

static inline int32_t predictor(uint64_t state, int c) {
  return (int32_t)((int64_t)(state << (52 - 12 * c)) >> 52);
}

/* One invented MCU: it leaves the predictors of `state` and ends where that state's bits begin. */
static int put_mcu(Writer *w, const Header *h, uint64_t state) {
  int bits = 0, goal = (int)(state >> 36 & 7);
  for (int c = 0; c < 3; c++)
    for (int b = 0; b < h->h[c] * h->v[c]; b++) {
      int last = c == 2 && b == h->h[c] * h->v[c] - 1;
      const Table *ac = h->ac + h->ta[c];
      if (!put_dc(w, h->dc + h->td[c], b ? 0 : predictor(state, c)) || !ac->length[0]) return 0;
      bits = (w->bits + ac->length[0]) & 7;
      if (last && !put_filler(w, ac, (goal - bits) & 7)) return 0;
      put(w, ac->code[0], ac->length[0]);
    }
  return 1;
}

typedef struct {
  int64_t start, length;            /* the tile's bytes in the file */
  int64_t left, top, width, height; /* what a patch sees of it */
  int64_t x, y;                     /* where that goes in the patch */
} Job;

typedef struct {
  int ra, rb, ca, cb; /* MCU rows and columns */
} Part;

/* The stream in `to`; its size, or 0 when the tile must be decoded as it is. */
static int64_t assemble(uint8_t *to, const uint8_t *data, const Header *h, const uint64_t *states,
                        int step, Part part) {
  int pieces = (h->columns + step - 1) / step, n = part.cb - part.ca + 1;
  int width = n * h->mcu_w, height = (part.rb - part.ra) * h->mcu_h;
  memcpy(to, data, (size_t)h->sos);
  to[h->sof + 5] = (uint8_t)(height >> 8), to[h->sof + 6] = (uint8_t)height;
  to[h->sof + 7] = (uint8_t)(width >> 8), to[h->sof + 8] = (uint8_t)width;
  const uint8_t dri[6] = {0xFF, 0xDD, 0, 4, (uint8_t)(n >> 8), (uint8_t)n};
  Writer w = {to + h->sos, 0, 0};
  memcpy(w.to, dri, 6);
  memcpy(w.to + 6, data + h->sos, (size_t)(h->scan - h->sos));
  w.to += 6 + h->scan - h->sos;
  for (int r = part.ra; r < part.rb; r++) {
    int first = r * pieces + part.ca / step;
    int last = part.cb == h->columns ? (r + 1) * pieces : r * pieces + part.cb / step;
    uint64_t state = states[first], end = states[last];
    w.word = 0, w.bits = 0;
    if (!put_mcu(&w, h, state)) return 0;
    const uint8_t *from = data + h->scan + (state >> 39), *stop = data + h->scan + (end >> 39);
    int half = w.bits;
    if (half) { /* the first stored byte starts with somebody else's bits: replace them */
      put(&w, *from & (0xFFu >> half), 8 - half);
      from += *from == 0xFF ? 2 : 1;
    }
    if (end >> 36 & 7) stop += *stop == 0xFF ? 2 : 1;
    if (stop > from) memcpy(w.to, from, (size_t)(stop - from)), w.to += stop - from;
    *w.to++ = 0xFF;
    *w.to++ = (uint8_t)(r + 1 < part.rb ? 0xD0 + ((r - part.ra) & 7) : 0xD9);
  }
  return w.to - to;
}

/* --- the loop ----------------------------------------------------------------------------------- */

typedef struct {
  struct jpeg_error_mgr base;
  jmp_buf back;
} Errors;

static void on_error(j_common_ptr cinfo) {
  cinfo->err->output_message(cinfo);
  longjmp(((Errors *)cinfo->err)->back, 1);
}

static void decode(j_decompress_ptr cinfo, const Job *job, const uint8_t *data, int64_t n, int ycbcr,
                   int mcu_w, int64_t left, int64_t top, uint8_t *scratch, uint8_t *patch,
                   int64_t side) {
  jpeg_mem_src(cinfo, data, (unsigned long)n);
  jpeg_read_header(cinfo, TRUE);
  cinfo->jpeg_color_space = ycbcr ? JCS_YCbCr : JCS_RGB;
  cinfo->out_color_space = JCS_RGB;
  jpeg_start_decompress(cinfo);
  int64_t stop = left + job->width + NEAR_PX;
  /* Never the invented column: cropping makes the tile's first one the edge that it is. */
  JDIMENSION from = (JDIMENSION)(left - NEAR_PX > mcu_w ? left - NEAR_PX : mcu_w);
  JDIMENSION width = (stop < cinfo->output_width ? (JDIMENSION)stop : cinfo->output_width) - from;
  if (width < cinfo->output_width) jpeg_crop_scanline(cinfo, &from, &width);
  if (top > 0) jpeg_skip_scanlines(cinfo, (JDIMENSION)top);
  JSAMPROW rows[ROWS];
  for (int i = 0; i < ROWS; i++) rows[i] = scratch + i * (int64_t)cinfo->output_width * 3;
  uint8_t *to = patch + (job->y * side + job->x) * 3;
  for (int64_t y = 0; y < job->height;) {
    int64_t more = job->height - y;
    JDIMENSION got = jpeg_read_scanlines(cinfo, rows, more < ROWS ? (JDIMENSION)more : ROWS);
    for (JDIMENSION i = 0; i < got; i++, y++, to += side * 3)
      memcpy(to, rows[i] + (left - from) * 3, (size_t)job->width * 3);
  }
  jpeg_abort_decompress(cinfo);
}

static Part part_of(const Header *h, const Job *job, int step) {
  int64_t right = job->left + job->width + NEAR_PX, bottom = job->top + job->height + NEAR_PX;
  int64_t left = job->left > NEAR_PX ? job->left - NEAR_PX : 0;
  int64_t top = job->top > NEAR_PX ? job->top - NEAR_PX : 0;
  int64_t wide = (int64_t)step * h->mcu_w;
  Part p = {(int)(top / h->mcu_h), (int)((bottom + h->mcu_h - 1) / h->mcu_h),
            (int)(left / wide * step), (int)((right + wide - 1) / wide * step)};
  if (p.rb > h->rows) p.rb = h->rows;
  if (p.cb > h->columns) p.cb = h->columns;
  return p;
}

/* As bare_loop(), with states[tile * per_tile]; seconds, or -1. Tiles not covered end it. */
double restart_loop(int fd, const uint8_t *tables, int64_t tables_n, int ycbcr, const Job *jobs,
                    const int64_t *tiles, const uint64_t *states, int64_t per_tile, int step,
                    const int64_t *first_jobs, int64_t n_patches, int64_t side, int64_t largest,
                    int64_t tile_px, uint8_t *out) {
  static Header header;
  struct timespec began, ended;
  struct jpeg_decompress_struct cinfo;
  Errors errors;
  uint8_t *volatile data = malloc((size_t)largest), *volatile made = malloc((size_t)largest * 2 + 65536);
  uint8_t *volatile scratch = malloc((size_t)((tile_px + 64) * 3 * ROWS));
  double seconds = -1;
  clock_gettime(CLOCK_MONOTONIC, &began);
  cinfo.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = on_error;
  if (setjmp(errors.back)) goto done;
  jpeg_create_decompress(&cinfo);
  if (tables_n) {
    jpeg_mem_src(&cinfo, tables, (unsigned long)tables_n);
    jpeg_read_header(&cinfo, FALSE);
    read_header(&header, tables, tables_n);
  }
  for (int64_t i = 0; i < n_patches; i++)
    for (int64_t j = first_jobs[i]; j < first_jobs[i + 1]; j++) {
      const Job *job = jobs + j;
      if (pread(fd, data, (size_t)job->length, job->start) != job->length) goto done;
      if (!read_header(&header, data, job->length)) goto done;
      Part part = part_of(&header, job, step);
      int64_t n = assemble(made, data, &header, states + tiles[j] * per_tile, step, part);
      if (n == 0) goto done;
      decode(&cinfo, job, made, n, ycbcr, header.mcu_w, job->left - part.ca * header.mcu_w + header.mcu_w,
             job->top - part.ra * header.mcu_h, scratch, out + i * side * side * 3, side);
    }
  clock_gettime(CLOCK_MONOTONIC, &ended);
  seconds = (double)(ended.tv_sec - began.tv_sec) + 1e-9 * (double)(ended.tv_nsec - began.tv_nsec);
  jpeg_destroy_decompress(&cinfo);
done:
  free(data), free(made), free(scratch);
  return seconds;
}
