/* Zarr chunks: one checksum or compressor after another undone, then pasted in whatever order they are stored.
 *
 * The lever is to decode no more than a part needs: the Blosc blocks that it touches, a Zstandard stream up to its
 * last row. (libdeflate can only decode everything, and still beats zlib's half.) Planes are interleaved 16 pixels at
 * a time. What is decoded has the pixels of decode/chunk.py, which the tests compare.
 *
 * libzstd, C-Blosc 1 and libdeflate are not linked: their functions are looked up in the builds that the caller
 * names, as libjpeg's are. All sizes are checked before the libraries see a byte: a Blosc buffer must say that it
 * holds exactly the chunk and that it is as long as it is, a frame's window may not exceed 64 MiB.
 */

#include "_chunks.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { RAW = 0, BLOSC = 1, ZSTD = 2, GZIP = 3, ZLIB = 4 };

#define MAX_MEMBERS 64
#define HEAD_BYTES 4096 /* of a Blosc buffer: its header and table of blocks, as a rule */
#define MAX_CHUNK_BYTES ((int64_t)64 << 20)
#define WINDOW_LOG_MAX 26
#define ZSTD_D_WINDOW_LOG_MAX 100
#define ZSTD_RESET_SESSION 1

/* As batch_plan/chunk_spec.py packs it. */
typedef struct {
  char order[4]; /* axes from slow to fast: of y, x, c; without c where there is one channel */
  uint8_t compressor, inner_crcs, outer_crcs, pad;
  int32_t samples;
} Spec;

typedef struct {
  void *at;
  size_t size, position;
} Buffer; /* ZSTD_inBuffer, ZSTD_outBuffer */

static struct {
  void *(*zstd_create)(void);
  size_t (*zstd_free)(void *);
  size_t (*zstd_set)(void *, int, int);
  size_t (*zstd_reset)(void *, int);
  unsigned (*zstd_is_error)(size_t);
  const char *(*zstd_error)(size_t);
  size_t (*zstd_stream)(void *, Buffer *, Buffer *);
  size_t (*zstd_whole)(void *, void *, size_t, const void *, size_t);
  int (*blosc_item)(const void *, int, int, void *);
  int (*blosc_whole)(const void *, void *, size_t, int);
  void *(*deflate_create)(void);
  void (*deflate_free)(void *);
  int (*gzip_member)(void *, const void *, size_t, void *, size_t, size_t *, size_t *);
  int (*zlib_stream)(void *, const void *, size_t, void *, size_t, size_t *, size_t *);
} lib;

static int have = 0;

struct ChunkScratch {
  uint8_t *bytes;
  size_t size;
  void *zstd, *deflate;
};

/* --- checksums --------------------------------------------------------------------------------- */

static uint32_t crc_table[8][256];

static void crc_prepare(void) {
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t crc = i;
    for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
    crc_table[0][i] = crc;
  }
  for (uint32_t i = 0; i < 256; i++)
    for (int k = 1; k < 8; k++)
      crc_table[k][i] = crc_table[k - 1][i] >> 8 ^ crc_table[0][crc_table[k - 1][i] & 255];
}

static uint32_t crc_plain(const uint8_t *data, size_t size) {
  uint32_t crc = ~0u;
  for (; size >= 8; size -= 8, data += 8) {
    uint32_t low, high;
    memcpy(&low, data, 4);
    memcpy(&high, data + 4, 4);
    low ^= crc;
    crc = crc_table[7][low & 255] ^ crc_table[6][low >> 8 & 255] ^ crc_table[5][low >> 16 & 255] ^
          crc_table[4][low >> 24] ^ crc_table[3][high & 255] ^ crc_table[2][high >> 8 & 255] ^
          crc_table[1][high >> 16 & 255] ^ crc_table[0][high >> 24];
  }
  for (; size; size--) crc = crc >> 8 ^ crc_table[0][(crc ^ *data++) & 255];
  return ~crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc_sse42(const uint8_t *data, size_t size) {
  uint64_t crc = ~0u;
  for (; size >= 8; size -= 8, data += 8) {
    uint64_t word;
    memcpy(&word, data, 8);
    crc = _mm_crc32_u64(crc, word);
  }
  for (; size; size--) crc = _mm_crc32_u8((uint32_t)crc, *data++);
  return ~(uint32_t)crc;
}
#endif

static uint32_t crc32c(const uint8_t *data, size_t size) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return crc_sse42(data, size);
#endif
  return crc_plain(data, size);
}

/* The size without a checksum at the end, or -1. */
static int64_t without_crc(const uint8_t *data, int64_t size, char *message) {
  uint32_t said;
  if (size >= 4) {
    const uint8_t *at = data + size - 4;
    said = at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
    if (crc32c(data, (size_t)size - 4) == said) return size - 4;
  }
  snprintf(message, CHUNK_MESSAGE_BYTES, "its chunk has another checksum (crc32c) than it says");
  return -1;
}

/* --- compressors: at least the bytes of some spans of `size`, at their places in `out` ----------- */

typedef struct {
  int64_t start, stop;
} Span;

static int bad_length(char *message, int64_t found, int64_t size) {
  snprintf(message, CHUNK_MESSAGE_BYTES, "its chunk holds %lld bytes, not %lld", (long long)found, (long long)size);
  return CHUNK_BAD;
}

static int undo_zstd(ChunkScratch *s, const uint8_t *data, size_t length, uint8_t *out, int64_t size,
                     int64_t needed, char *message) {
  size_t done;
  if (!s->zstd) {
    s->zstd = lib.zstd_create();
    if (!s->zstd) return CHUNK_NO_MEMORY;
    lib.zstd_set(s->zstd, ZSTD_D_WINDOW_LOG_MAX, WINDOW_LOG_MAX);
  }
  if (needed * 100 > size * 85) { /* nearly everything: straight into place beats stopping early */
    done = lib.zstd_whole(s->zstd, out, (size_t)size, data, length);
    if (!lib.zstd_is_error(done)) return (int64_t)done == size ? CHUNK_OK : bad_length(message, (int64_t)done, size);
  } else {
    Buffer in = {(void *)data, length, 0}, to = {out, (size_t)needed, 0};
    lib.zstd_reset(s->zstd, ZSTD_RESET_SESSION);
    for (;;) {
      size_t before = in.position + to.position;
      done = lib.zstd_stream(s->zstd, &to, &in);
      if (lib.zstd_is_error(done)) break;
      if (to.position == to.size) return CHUNK_OK;
      if (in.position + to.position == before) {
        snprintf(message, CHUNK_MESSAGE_BYTES, "its zstd frame ends before its data does");
        return CHUNK_BAD;
      }
    }
  }
  snprintf(message, CHUNK_MESSAGE_BYTES, "zstd says: %s", lib.zstd_error(done));
  return CHUNK_BAD;
}

static uint32_t little(const uint8_t *at) {
  return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static int undo_blosc(const uint8_t *data, size_t length, uint8_t *out, int64_t size, const Span *spans,
                      int n_spans, char *message) {
  if (length < 16) {
    snprintf(message, CHUNK_MESSAGE_BYTES, "its blosc header is cut short");
    return CHUNK_BAD;
  }
  int64_t declared = little(data + 4), block = little(data + 8), stored = little(data + 12);
  if (data[0] != 2) {
    snprintf(message, CHUNK_MESSAGE_BYTES, "it is in Blosc format %d, not 2", data[0]);
    return CHUNK_BAD;
  }
  if (declared != size) {
    snprintf(message, CHUNK_MESSAGE_BYTES, "its blosc header says %lld bytes, not %lld", (long long)declared,
             (long long)size);
    return CHUNK_BAD;
  }
  if (stored != (int64_t)length || block < 1 || block > size) {
    snprintf(message, CHUNK_MESSAGE_BYTES, "its blosc header says %lld bytes in blocks of %lld; it has %lld",
             (long long)stored, (long long)block, (long long)length);
    return CHUNK_BAD;
  }
  int item = data[3] ? data[3] : 1;
  Span run = {0, 0};
  int64_t ready = 0; /* bytes before this are there, or not needed */
  for (int i = 0; i < n_spans; i++) {
    run.start = spans[i].start / block * block;
    run.stop = (spans[i].stop + block - 1) / block * block;
    while (i + 1 < n_spans && spans[i + 1].start / block * block <= run.stop)
      run.stop = (spans[++i].stop + block - 1) / block * block;
    if (run.stop > size) run.stop = size;
    if (run.start < ready) run.start = ready;
    ready = run.stop;
    if ((run.start == 0 && run.stop == size) || run.start % item || run.stop % item) {
      int done = lib.blosc_whole(data, out, (size_t)size, 1);
      return done == size ? CHUNK_OK : bad_length(message, done, size);
    }
    if (run.start >= run.stop) continue;
    int done = lib.blosc_item(data, (int)(run.start / item), (int)((run.stop - run.start) / item), out + run.start);
    if (done != run.stop - run.start) return bad_length(message, done, run.stop - run.start);
  }
  return CHUNK_OK;
}

static int undo_deflate(ChunkScratch *s, int compressor, const uint8_t *data, size_t length, uint8_t *out,
                        int64_t size, char *message) {
  if (!s->deflate) s->deflate = lib.deflate_create();
  if (!s->deflate) return CHUNK_NO_MEMORY;
  size_t done = 0, taken = 0, got = 0, used = 0;
  for (int i = 0; i < MAX_MEMBERS && done < (size_t)size; i++) {
    int wrong = (compressor == GZIP ? lib.gzip_member : lib.zlib_stream)(
        s->deflate, data + taken, length - taken, out + done, (size_t)size - done, &used, &got);
    if (wrong) {
      snprintf(message, CHUNK_MESSAGE_BYTES, wrong == 3 ? "it inflates to more than %lld bytes, or is damaged"
                                                        : "it does not inflate to %lld bytes: it is damaged",
               (long long)size);
      return CHUNK_BAD;
    }
    done += got;
    taken += used;
    if (compressor == ZLIB) break;
  }
  return (int64_t)done == size ? CHUNK_OK : bad_length(message, (int64_t)done, size);
}

/* --- pasting ----------------------------------------------------------------------------------- */

typedef struct {
  int64_t y, x, c; /* from sample to sample along each axis */
} Strides;

#if defined(__x86_64__)
/* 16 pixels of three planes at once. */
__attribute__((target("ssse3"))) static int interleave(const uint8_t *r, const uint8_t *g, const uint8_t *b,
                                                       uint8_t *to, int count) {
#define N -1
  const __m128i r0 = _mm_setr_epi8(0, N, N, 1, N, N, 2, N, N, 3, N, N, 4, N, N, 5);
  const __m128i g0 = _mm_setr_epi8(N, 0, N, N, 1, N, N, 2, N, N, 3, N, N, 4, N, N);
  const __m128i b0 = _mm_setr_epi8(N, N, 0, N, N, 1, N, N, 2, N, N, 3, N, N, 4, N);
  const __m128i r1 = _mm_setr_epi8(N, N, 6, N, N, 7, N, N, 8, N, N, 9, N, N, 10, N);
  const __m128i g1 = _mm_setr_epi8(5, N, N, 6, N, N, 7, N, N, 8, N, N, 9, N, N, 10);
  const __m128i b1 = _mm_setr_epi8(N, 5, N, N, 6, N, N, 7, N, N, 8, N, N, 9, N, N);
  const __m128i r2 = _mm_setr_epi8(N, 11, N, N, 12, N, N, 13, N, N, 14, N, N, 15, N, N);
  const __m128i g2 = _mm_setr_epi8(N, N, 11, N, N, 12, N, N, 13, N, N, 14, N, N, 15, N);
  const __m128i b2 = _mm_setr_epi8(10, N, N, 11, N, N, 12, N, N, 13, N, N, 14, N, N, 15);
#undef N
  int x = 0;
  for (; x + 16 <= count; x += 16) {
    __m128i red = _mm_loadu_si128((const __m128i *)(r + x));
    __m128i green = _mm_loadu_si128((const __m128i *)(g + x));
    __m128i blue = _mm_loadu_si128((const __m128i *)(b + x));
    __m128i *at = (__m128i *)(to + 3 * x);
    _mm_storeu_si128(at, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(red, r0), _mm_shuffle_epi8(green, g0)),
                                      _mm_shuffle_epi8(blue, b0)));
    _mm_storeu_si128(at + 1, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(red, r1), _mm_shuffle_epi8(green, g1)),
                                          _mm_shuffle_epi8(blue, b1)));
    _mm_storeu_si128(at + 2, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(red, r2), _mm_shuffle_epi8(green, g2)),
                                          _mm_shuffle_epi8(blue, b2)));
  }
  return x;
}
#endif

static void paste_row(const uint8_t *from, Strides strides, int channels, uint8_t *to, int step, int count) {
  if (channels == 3 && step == 3 && strides.x == 3 && strides.c == 1) {
    memcpy(to, from, 3 * (size_t)count);
    return;
  }
  int x = 0;
  if (channels == 3 && strides.x == 1) {
    const uint8_t *r = from, *g = from + strides.c, *b = g + strides.c;
#if defined(__x86_64__)
    if (step == 3 && __builtin_cpu_supports("ssse3")) x = interleave(r, g, b, to, count);
#endif
    for (uint8_t *at = to + (size_t)x * step; x < count; x++, at += step) {
      at[0] = r[x];
      at[1] = g[x];
      at[2] = b[x];
    }
    return;
  }
  for (int c = 0; c < channels; c++) {
    const uint8_t *one = from + c * strides.c;
    for (x = 0; x < count; x++) to[(size_t)x * step + c] = one[x * strides.x];
  }
}

static Strides strides_of(const Spec *spec, int64_t width, int64_t height) {
  Strides out = {0, 0, 0};
  int64_t step = 1;
  if (!memchr(spec->order, 'c', 4)) out.c = step, step *= spec->samples;
  for (int i = 3; i >= 0; i--) {
    if (spec->order[i] == 'y') out.y = step, step *= height;
    if (spec->order[i] == 'x') out.x = step, step *= width;
    if (spec->order[i] == 'c') out.c = step, step *= spec->samples;
  }
  return out;
}

/* Stretches of the decoded chunk that hold the part, as decode/chunk.py has them; returns how many. */
static int spans_of(const Spec *spec, const ChunkPart *part, Strides strides, Span *spans) {
  char slow = spec->order[0] == 'c' ? spec->order[1] : spec->order[0];
  int64_t first = slow == 'y' ? part->top : part->left;
  int64_t count = slow == 'y' ? part->height : part->width;
  int64_t step = slow == 'y' ? strides.y : strides.x;
  int n = spec->order[0] == 'c' ? (spec->samples < 3 ? spec->samples : 3) : 1;
  for (int c = 0; c < n; c++) {
    spans[c].start = c * strides.c * (n > 1 || spec->order[0] == 'c') + first * step;
    spans[c].stop = spans[c].start + count * step;
  }
  return n;
}

/* --- what _jpeg.c calls ------------------------------------------------------------------------- */

const char *chunk_check(const uint8_t *spec, size_t spec_size, int64_t width, int64_t height) {
  Spec s;
  if (spec_size != CHUNK_SPEC_BYTES || sizeof s != CHUNK_SPEC_BYTES) return "chunk description";
  memcpy(&s, spec, sizeof s);
  int seen = 0;
  for (int i = 0; i < 4; i++) {
    const char *at = s.order[i] ? strchr("yxc", s.order[i]) : NULL;
    if (!at && s.order[i]) return "chunk order";
    if (at && seen & 1 << (at - "yxc")) return "chunk order";
    if (at) seen |= 1 << (at - "yxc");
    if (i && s.order[i] && !s.order[i - 1]) return "chunk order";
  }
  if ((seen & 3) != 3 || s.order[3] || (!(seen & 4) && s.samples != 1)) return "chunk order";
  if (s.samples != 1 && s.samples < 3) return "chunk channels";
  if (s.samples > 65535 || width < 1 || height < 1 || width * height > MAX_CHUNK_BYTES / s.samples)
    return "chunk size";
  if (s.compressor > ZLIB || s.inner_crcs > 8 || s.outer_crcs > 8) return "chunk codec";
  static const int needs[] = {0, 2, 1, 4, 4};
  if (needs[s.compressor] & ~have) return "chunk codec without its library";
  return NULL;
}

int chunk_part(ChunkScratch **scratch, const uint8_t *packed, const uint8_t *data, size_t length,
               const ChunkPart *part, char *message) {
  Spec spec;
  memcpy(&spec, packed, sizeof spec);
  if (!*scratch) *scratch = calloc(1, sizeof **scratch);
  ChunkScratch *s = *scratch;
  if (!s) return CHUNK_NO_MEMORY;
  int64_t pixels_size = (int64_t)part->tile_width * part->tile_height * spec.samples;
  int64_t size = pixels_size + 4 * spec.inner_crcs, have_bytes = (int64_t)length;
  for (int i = 0; i < spec.outer_crcs; i++)
    if ((have_bytes = without_crc(data, have_bytes, message)) < 0) return CHUNK_BAD;
  Strides strides = strides_of(&spec, part->tile_width, part->tile_height);
  Span spans[3] = {{0, size}, {0, 0}, {0, 0}};
  int n = spec.inner_crcs ? 1 : spans_of(&spec, part, strides, spans);
  const uint8_t *decoded = data;
  if (spec.compressor != RAW) {
    if (s->size < (size_t)size) {
      free(s->bytes);
      s->bytes = malloc((size_t)size);
      s->size = s->bytes ? (size_t)size : 0;
      if (!s->bytes) return CHUNK_NO_MEMORY;
    }
    int wrong = spec.compressor == BLOSC
                    ? undo_blosc(data, (size_t)have_bytes, s->bytes, size, spans, n, message)
                : spec.compressor == ZSTD
                    ? undo_zstd(s, data, (size_t)have_bytes, s->bytes, size, spans[n - 1].stop, message)
                    : undo_deflate(s, spec.compressor, data, (size_t)have_bytes, s->bytes, size, message);
    if (wrong) return wrong;
    decoded = s->bytes;
    have_bytes = size;
  }
  for (int i = 0; i < spec.inner_crcs; i++)
    if ((have_bytes = without_crc(decoded, have_bytes, message)) < 0) return CHUNK_BAD;
  if (have_bytes != pixels_size) return bad_length(message, have_bytes, pixels_size);
  int channels = spec.samples < 3 ? 1 : 3;
  const uint8_t *from = decoded + part->top * strides.y + part->left * strides.x;
  uint8_t *to = part->out + (channels == 1 ? part->channel : 0);
  for (int y = 0; y < part->height; y++, from += strides.y, to += part->stride)
    paste_row(from, strides, channels, to, part->step, part->width);
  return CHUNK_OK;
}

/* --- files ------------------------------------------------------------------------------------- */

static int64_t fetch(int fd, int64_t offset, size_t start, size_t stop, uint8_t *to) {
  for (size_t at = start; at < stop;) {
    ssize_t got = pread(fd, to + at, stop - at, offset + (int64_t)at);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return got < 0 ? -1 : -2;
    at += (size_t)got;
  }
  return stop > start ? (int64_t)(stop - start) : 0;
}

/* Where the block that begins at `start` ends as its own parts say, which lie inside start..stop; 0: they do not. */
static size_t block_end(const uint8_t *data, size_t start, size_t stop, int parts) {
  for (int i = 0; i < parts; i++) {
    if (stop - start < 4) return 0;
    size_t size = little(data + start);
    start += 4;
    if (size > stop - start) return 0;
    start += size;
  }
  return start;
}

/* Of a Blosc buffer whose first `head` bytes are at `to`, the blocks that some spans touch; 0 where it has to be
 * read whole: a block is then not one stretch, or has parts that lie outside of it. */
static int64_t fetch_blocks(int fd, int64_t offset, size_t size, int64_t decoded, const Span *spans, int n_spans,
                            uint8_t *to, size_t head) {
  int64_t block = little(to + 8), got = 0;
  if (to[0] != 2 || (int64_t)little(to + 4) != decoded || little(to + 12) != size || block < 1 || block > decoded)
    return 0;
  int64_t blocks = (decoded + block - 1) / block, table = 16 + 4 * blocks;
  int copied = to[2] & 2, whole = to[2] & 16, item = to[3] ? to[3] : 1;
  if (copied || block % item || decoded % item || (int64_t)head < table || table > (int64_t)size) return 0;
  for (int i = 0; i < n_spans; i++) {
    int64_t last = (spans[i].stop + block - 1) / block;
    for (int64_t k = spans[i].start / block; k < last && k < blocks; k++) {
      size_t start = little(to + 16 + 4 * k), stop = size;
      for (int64_t other = 0; other < blocks; other++) { /* they may lie in any order */
        size_t begins = little(to + 16 + 4 * other);
        if (begins > start && begins < stop) stop = begins;
      }
      if (start < (size_t)table || start >= size) return 0;
      int64_t more = fetch(fd, offset, start > head ? start : (stop < head ? stop : head), stop, to);
      if (more < 0) return more;
      got += more;
      int short_last = k == blocks - 1 && decoded % block;
      if (!block_end(to, start, stop, whole || short_last ? 1 : item)) return 0;
    }
  }
  return got;
}

int64_t chunk_fetch(const uint8_t *packed, int fd, int64_t offset, size_t size,
                    const ChunkPart *part, uint8_t *to) {
  Spec spec;
  memcpy(&spec, packed, sizeof spec);
  size_t head = 0;
  int64_t got = 0;
  if (spec.compressor == BLOSC && !spec.inner_crcs && !spec.outer_crcs && size > HEAD_BYTES) {
    Span spans[3];
    int n = spans_of(&spec, part, strides_of(&spec, part->tile_width, part->tile_height), spans);
    int64_t decoded = (int64_t)part->tile_width * part->tile_height * spec.samples;
    head = HEAD_BYTES;
    got = fetch(fd, offset, 0, head, to);
    if (got < 0) return got;
    int64_t more = fetch_blocks(fd, offset, size, decoded, spans, n, to, head);
    if (more) return more < 0 ? more : got + more;
  }
  int64_t rest = fetch(fd, offset, head, size, to);
  return rest < 0 ? rest : (int64_t)head + rest;
}

void chunk_free(ChunkScratch *s) {
  if (!s) return;
  if (s->zstd) lib.zstd_free(s->zstd);
  if (s->deflate) lib.deflate_free(s->deflate);
  free(s->bytes);
  free(s);
}

typedef struct {
  const char *name;
  void *place;
} Wanted;

static int look_up(const char *path, const Wanted *wanted, int count) {
  void *library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
  if (!library) return 0;
  for (int i = 0; i < count; i++) {
    void *found = dlsym(library, wanted[i].name);
    if (!found) return 0;
    memcpy(wanted[i].place, &found, sizeof found);
  }
  return 1;
}

int chunk_load(const char *zstd, const char *blosc, const char *deflate) {
  const Wanted of_zstd[] = {
      {"ZSTD_createDCtx", &lib.zstd_create},
      {"ZSTD_freeDCtx", &lib.zstd_free},
      {"ZSTD_DCtx_setParameter", &lib.zstd_set},
      {"ZSTD_DCtx_reset", &lib.zstd_reset},
      {"ZSTD_isError", &lib.zstd_is_error},
      {"ZSTD_getErrorName", &lib.zstd_error},
      {"ZSTD_decompressStream", &lib.zstd_stream},
      {"ZSTD_decompressDCtx", &lib.zstd_whole},
  };
  const Wanted of_blosc[] = {{"blosc_getitem", &lib.blosc_item}, {"blosc_decompress_ctx", &lib.blosc_whole}};
  const Wanted of_deflate[] = {
      {"libdeflate_alloc_decompressor", &lib.deflate_create},
      {"libdeflate_free_decompressor", &lib.deflate_free},
      {"libdeflate_gzip_decompress_ex", &lib.gzip_member},
      {"libdeflate_zlib_decompress_ex", &lib.zlib_stream},
  };
  crc_prepare();
  have |= look_up(zstd, of_zstd, 8) ? 1 : 0;
  have |= look_up(blosc, of_blosc, 2) ? 2 : 0;
  have |= look_up(deflate, of_deflate, 4) ? 4 : 0;
  return have;
}
