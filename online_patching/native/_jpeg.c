/* Patches out of JPEG tiles in one call: pread, decode only what is needed, paste, resample.
 *
 * The lever is that entropy decoding cannot be skipped but everything after it can: rows above a
 * box pass through jpeg_skip_scanlines, columns beside it are cut off by jpeg_crop_scanline (16 px
 * wider than asked, because chroma upsampling looks at neighbours), rows below are never reached.
 * Pixels are those of a whole decode with libjpeg-turbo's accurate DCT and fancy upsampling.
 *
 * libjpeg-turbo is not linked: its ABI (6.2) has been frozen for decades, so the twelve functions
 * used are looked up in whichever build the caller names (see __init__.py). jpeg_CreateDecompress
 * refuses a library whose structures have another size.
 *
 * Where remembering is on (_states.h), a part of a tile that was touched before is decoded from a stream
 * of the MCUs that it needs, made from states inside the tile. Whatever is wrong with that way is
 * forgotten and the tile decoded as ever, so that it decides neither pixels nor errors.
 *
 * What comes in is untrusted: every marker up to the scan is checked before libjpeg sees a byte, a
 * frame must be exactly as large as its tile, warnings are errors, and reads past the end of the
 * data are errors. The GIL is released for the whole of read().
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "_chunks.h"
#include "_states.h"
#include "include/jpeglib.h"

#define MESSAGE_BYTES 120
#define MADE_PX 64 /* by how much a stream made from states may be wider than its tile: one invented MCU */
#define CROP_MARGIN_PX 16
#define ROWS 16 /* asked for at once: what an MCU row may hold */
#define EOI_SEARCH_BYTES 1024
#define MAX_TILE_BYTES (256 << 20)
#define MAX_PATH_BYTES 4096
#define MAX_CANVAS_BYTES ((int64_t)1 << 30)
#define MAX_STEP_PX 65536

/* The four records mirror numpy dtypes in batch_plan/tables.py, field by field. */

typedef struct {
  uint64_t key; /* of the slide, for what is remembered of its tiles; 0: nothing is */
  int32_t first_tile, n_tiles;
  int32_t first_output, n_outputs;
  int32_t width, height; /* of the canvas, in decoded pixels */
  int32_t tile_width, tile_height;
  int32_t scale;   /* DCT scaling: 1, 2, 4, 8 */
  int32_t codec;   /* Python's to know */
  int32_t packing; /* of its tiles: see below */
  int32_t colour;  /* 0 rgb, 1 ycbcr, 2 gray */
  int32_t tables; /* which of the tables, -1 for none */
  int32_t fill;
  int32_t status; /* out: what happened */
  int32_t tile;   /* out: the tile it happened at */
  int64_t read_bytes; /* out: of chunks, and of whole files */
  int32_t absent;     /* out: whole files that do not exist; their tiles are fill */
  int32_t pad;
  char message[MESSAGE_BYTES];
} Canvas;

enum { STREAM = 0, HEADLESS = 1, PIXELS = 2, CHUNK = 3 };

#define WHOLE -1

typedef struct {
  int64_t start, length; /* in the file; length 0: not stored; WHOLE: all of the file that `body` names */
  int32_t file;          /* which of the files, or -1: */
  int32_t body;          /* which of the bodies */
  int32_t left, top;     /* of the seen part, within the tile, decoded pixels */
  int32_t width, height;
  int32_t x, y;    /* where it goes on the canvas */
  int32_t channel; /* pixels and chunks: the first that they fill */
  int32_t pad;
} Tile;

typedef struct {
  int64_t size_bytes, mtime_ns; /* as indexed, checked when size_bytes > 0 */
  int64_t base;                 /* the address in its slide of its first byte */
  int32_t fd;
  int32_t pad;
} File;

typedef struct {
  double left, top, right, bottom; /* window, within its box */
  int64_t target;                  /* byte offset in the batch */
  int32_t width, height;           /* of the patch */
  int32_t x, y, box_width, box_height; /* its box on the canvas: all that its pixels depend on */
  int32_t exact;                       /* the patch is the box */
  int32_t pad;
} Output;

enum { OK = 0, BAD_TILE = 1, SHORT_READ = 2, IO_ERROR = 3, CHANGED = 4, NO_MEMORY = 5 };

/* --- the library, looked up once ------------------------------------------------------------- */

static struct {
  struct jpeg_error_mgr *(*std_error)(struct jpeg_error_mgr *);
  void (*create)(j_decompress_ptr, int, size_t);
  void (*destroy)(j_decompress_ptr);
  int (*read_header)(j_decompress_ptr, boolean);
  boolean (*start)(j_decompress_ptr);
  JDIMENSION (*read_scanlines)(j_decompress_ptr, JSAMPARRAY, JDIMENSION);
  JDIMENSION (*skip_scanlines)(j_decompress_ptr, JDIMENSION);
  void (*crop_scanline)(j_decompress_ptr, JDIMENSION *, JDIMENSION *);
  boolean (*finish)(j_decompress_ptr);
  void (*abort)(j_decompress_ptr);
  boolean (*resync)(j_decompress_ptr, int);
} jpeg;

/* --- errors: libjpeg's, as a jump back ------------------------------------------------------- */

typedef struct {
  struct jpeg_error_mgr base;
  jmp_buf back;
  char message[JMSG_LENGTH_MAX];
} Errors;

static void on_error(j_common_ptr cinfo) {
  Errors *errors = (Errors *)cinfo->err;
  errors->base.format_message(cinfo, errors->message);
  longjmp(errors->back, 1);
}

static void on_message(j_common_ptr cinfo, int level) {
  if (level < 0) on_error(cinfo); /* a warning: damaged data */
}

static void no_output(j_common_ptr cinfo) { (void)cinfo; }

/* --- a source that ends where its bytes end -------------------------------------------------- */

static void source_begin(j_decompress_ptr cinfo) { (void)cinfo; }

static boolean source_refill(j_decompress_ptr cinfo) {
  Errors *errors = (Errors *)cinfo->err;
  snprintf(errors->message, sizeof errors->message, "it ends before its picture does");
  longjmp(errors->back, 1);
}

static void source_skip(j_decompress_ptr cinfo, long count) {
  struct jpeg_source_mgr *source = cinfo->src;
  if (count <= 0) return;
  if ((size_t)count > source->bytes_in_buffer) source_refill(cinfo);
  source->next_input_byte += count;
  source->bytes_in_buffer -= (size_t)count;
}

static void source_set(struct jpeg_source_mgr *source, const uint8_t *data, size_t size) {
  source->init_source = source_begin;
  source->fill_input_buffer = source_refill;
  source->skip_input_data = source_skip;
  source->resync_to_restart = jpeg.resync;
  source->term_source = source_begin;
  source->next_input_byte = data;
  source->bytes_in_buffer = size;
}

/* --- what a thread needs while it works ------------------------------------------------------ */

/* The head of a stream whose restart intervals lie bare, in two: tables, which libjpeg keeps from one
 * interval to the next, and what must stand before each of them. */
typedef struct {
  const void *of; /* the head that was split, for tiles of this size and colour */
  int width, height, colour;
  uint8_t *tables, *frame;
  size_t tables_size, frame_size, tables_room, frame_room;
  size_t width_at; /* of the frame's width, in `frame` */
  int mcu_width;   /* px, where the frame is one row of MCUs without restarts inside; else 0 */
  unsigned defined, needed; /* as in Tables */
} Head;

typedef struct {
  struct jpeg_decompress_struct cinfo;
  Errors errors;
  struct jpeg_source_mgr source;
  uint8_t *file, *canvas, *middle, *row;
  int32_t *weights;
  size_t file_size, canvas_size, middle_size, row_size, weights_size;
  Scratch *scratch;
  ChunkScratch *chunks;
  const uint8_t *loaded; /* the tables that cinfo holds and no tile has touched since */
  Head head;
} Worker;

static int grow(void *block, size_t *have, size_t want) {
  void **place = block;
  if (*have >= want) return 0;
  free(*place);
  *place = malloc(want);
  *have = *place ? want : 0;
  return *place ? 0 : -1;
}

static void say(Canvas *canvas, int status, const char *message) {
  canvas->status = status;
  snprintf(canvas->message, MESSAGE_BYTES, "%.*s", MESSAGE_BYTES - 1, message);
}

/* --- markers: what libjpeg may see ----------------------------------------------------------- */

/* Tables as bits: 4 for quantisation, 4 for DC and 4 for AC codes. */
typedef struct {
  unsigned defined, needed;
  int several; /* scans, with tables between them that nobody here has seen */
} Tables;

static void note_tables(Tables *tables, int marker, const uint8_t *at, const uint8_t *end) {
  while (at < end) {
    if (marker == 0xDB) { /* precision and number, 64 values of one or two bytes */
      tables->defined |= 1u << (*at & 3);
      at += 1 + (*at >> 4 ? 128 : 64);
    } else { /* class and number, 16 counts, as many values */
      if (at + 17 > end) return;
      tables->defined |= 16u << ((*at & 0x10 ? 4 : 0) + (*at & 3));
      int values = 0;
      for (int i = 1; i <= 16; i++) values += at[i];
      at += 17 + values;
    }
  }
}

/* Walk the segments up to the scan (or the end of tables). 0 when libjpeg may have them. */
static int check_markers(Canvas *canvas, const uint8_t *data, size_t size, int is_tables, Tables *tables) {
  size_t at = 2;
  int frames = 0, components = 0;
  char text[MESSAGE_BYTES];
  if (size < 4 || data[0] != 0xFF || data[1] != 0xD8) {
    say(canvas, BAD_TILE, "it is not a JPEG stream");
    return -1;
  }
  for (;;) {
    if (is_tables && at + 4 > size - 2) return 0;
    if (at + 4 > size || data[at] != 0xFF) break;
    int marker = data[at + 1];
    /* These have no length; to read one would leave libjpeg to see other segments than we do. */
    if (marker <= 0x01 || (marker >= 0xD0 && marker <= 0xD9) || marker == 0xFF) break;
    size_t length = (size_t)(data[at + 2] << 8 | data[at + 3]);
    if (length < 2 || at + 2 + length > size) break;
    int frame = marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC;
    if (is_tables && (frame || marker == 0xDA)) {
      say(canvas, BAD_TILE, "its JPEG tables hold a picture");
      return -1;
    }
    if (frame) {
      if (marker > 0xC1) { /* progressive ones too: what they show while a scan is missing is a guess */
        snprintf(text, sizeof text, "its frame is of a kind (SOF%d) that slides do not use", marker - 0xC0);
        say(canvas, BAD_TILE, text);
        return -1;
      }
      if (length < 8) break;
      int height = data[at + 5] << 8 | data[at + 6], width = data[at + 7] << 8 | data[at + 8];
      if (width != canvas->tile_width || height != canvas->tile_height) {
        snprintf(text, sizeof text, "its frame says %d x %d px, not %d x %d", width, height,
                 canvas->tile_width, canvas->tile_height);
        say(canvas, BAD_TILE, text);
        return -1;
      }
      components = data[at + 9];
      if (components != 1 && (components != 3 || canvas->colour == 2)) {
        snprintf(text, sizeof text, "it has %d components, not 1%s", components,
                 canvas->colour == 2 ? "" : " or 3");
        say(canvas, BAD_TILE, text);
        return -1;
      }
      if (length < 8 + 3 * (size_t)components) break;
      for (int i = 0; i < components; i++) tables->needed |= 1u << (data[at + 12 + 3 * i] & 3);
      frames++;
    }
    if (marker == 0xC4 || marker == 0xDB) note_tables(tables, marker, data + at + 4, data + at + 2 + length);
    if (marker == 0xDA) {
      int scanned = data[at + 4];
      tables->several |= scanned != components;
      if (tables->several) tables->needed = ~0u;
      if (length < 6 + 2 * (size_t)scanned) break;
      for (int i = 0; i < scanned; i++) {
        int numbers = data[at + 6 + 2 * i];
        tables->needed |= 16u << (numbers >> 4 & 3) | 256u << (numbers & 3);
      }
      if (frames == 1) return 0;
      break;
    }
    at += 2 + length;
  }
  say(canvas, BAD_TILE, "its JPEG header is damaged");
  return -1;
}

/* A truncated tile has lost its end marker; nothing inside a scan looks like one. */
static int has_end_marker(const uint8_t *data, size_t size) {
  size_t first = size > EOI_SEARCH_BYTES ? size - EOI_SEARCH_BYTES : 0;
  for (size_t i = size; i >= first + 2; i--)
    if (data[i - 2] == 0xFF && data[i - 1] == 0xD9) return 1;
  return 0;
}

typedef struct {
  const void *data;
  Py_ssize_t size;
} Bytes;

/* A tile's bytes, or the pixels of its seen part: rows, columns and channels that may lie anyhow. */
typedef struct {
  const uint8_t *data;
  Py_ssize_t size;
  int channels; /* 0: bytes */
  Py_ssize_t rows, columns, step[3];
} Body;

/* What a call was given beside the plan's own tables. */
typedef struct {
  const File *files;
  const Bytes *tables;
  const Body *bodies;
  Py_ssize_t n_files, n_tables, n_bodies;
} Given;

/* --- one tile -------------------------------------------------------------------------------- */

typedef struct {
  const Bytes *tables; /* that its stream was split from, size 0: none */
  Tables own, shared;
  uint8_t *pixels; /* of the canvas, of `channels` bytes each, 3 or 4 */
  int channels;
  int cut;         /* the frame was made narrower than its data */
  int64_t address; /* of the tile in its slide, for what is remembered of it */
} Job;

static void fail(Worker *w, const char *message) {
  snprintf(w->errors.message, sizeof w->errors.message, "%s", message);
  longjmp(w->errors.back, 1);
}

/* Give libjpeg a stream and the tables that it needs; it jumps back when it does not like them. */
static void open_stream(Worker *w, const Canvas *canvas, const Job *job, const uint8_t *data, size_t size) {
  j_decompress_ptr cinfo = &w->cinfo;
  if (job->own.needed & ~(job->own.defined | job->shared.defined)) {
    /* Tables of the tile before must not be used by one that lost its own. Elsewhere they stay: libjpeg
     * would allocate them anew for every tile, at a tenth of the whole cost. */
    w->loaded = NULL;
    for (int i = 0; i < NUM_QUANT_TBLS; i++) cinfo->quant_tbl_ptrs[i] = NULL;
    for (int i = 0; i < NUM_HUFF_TBLS; i++)
      cinfo->dc_huff_tbl_ptrs[i] = cinfo->ac_huff_tbl_ptrs[i] = NULL;
  }
  const Bytes *tables = job->tables;
  if (tables->size && w->loaded != tables->data) {
    source_set(&w->source, tables->data, (size_t)tables->size);
    if (jpeg.read_header(cinfo, FALSE) != JPEG_HEADER_TABLES_ONLY) fail(w, "its JPEG tables hold a picture");
  }
  w->loaded = job->own.defined || job->own.several ? NULL : tables->data;
  source_set(&w->source, data, size);
  jpeg.read_header(cinfo, TRUE);
  if ((int)cinfo->image_width > canvas->tile_width + MADE_PX || (int)cinfo->image_height > canvas->tile_height)
    fail(w, "its frame is larger than its tile"); /* whatever the walk over its markers saw */
  if (cinfo->num_components == 3)
    cinfo->jpeg_color_space = canvas->colour == 0 ? JCS_RGB : JCS_YCbCr;
  cinfo->out_color_space = job->channels == 4 ? JCS_EXT_RGBX : JCS_RGB;
  cinfo->dct_method = JDCT_ISLOW;
  cinfo->do_fancy_upsampling = TRUE;
  cinfo->scale_num = 1;
  cinfo->scale_denom = (unsigned)canvas->scale;
  jpeg.start(cinfo);
}

/* Decode the part of a tile that is at (stream->left, stream->top) of this stream onto the canvas. */
static int decode_stream(Worker *w, Canvas *canvas, const Tile *tile, const Job *job, const Stream *stream) {
  j_decompress_ptr cinfo = &w->cinfo;
  int channels = job->channels;
  if (setjmp(w->errors.back)) {
    jpeg.abort(cinfo);
    w->loaded = NULL;
    int memory = !strncmp(w->errors.message, "Insufficient memory", 19);
    say(canvas, memory ? NO_MEMORY : BAD_TILE, w->errors.message);
    return -1;
  }
  open_stream(w, canvas, job, stream->data, stream->size);
  JDIMENSION left = 0, width = cinfo->output_width;
  if (stream->left + tile->width > (int)cinfo->output_width ||
      stream->top + tile->height > (int)cinfo->output_height)
    fail(w, "it is smaller than its tile");
  int from = stream->left - CROP_MARGIN_PX, to = stream->left + tile->width + CROP_MARGIN_PX;
  if (from < stream->edge) from = stream->edge;
  if (to > (int)cinfo->output_width) to = (int)cinfo->output_width;
  if (to - from < (int)width) {
    left = (JDIMENSION)from;
    width = (JDIMENSION)(to - from);
    jpeg.crop_scanline(cinfo, &left, &width);
  }
  if (stream->top) jpeg.skip_scanlines(cinfo, (JDIMENSION)stream->top);
  size_t stride = (size_t)canvas->width * channels;
  uint8_t *out = job->pixels + (size_t)tile->y * stride + (size_t)tile->x * channels;
  size_t offset = (size_t)(stream->left - (int)left) * channels, bytes = (size_t)tile->width * channels;
  size_t row_bytes = (size_t)cinfo->output_width * channels;
  if (grow(&w->row, &w->row_size, row_bytes * ROWS)) {
    jpeg.abort(cinfo);
    say(canvas, NO_MEMORY, "no memory");
    return -1;
  }
  JSAMPROW rows[ROWS];
  for (int r = 0; r < ROWS; r++) rows[r] = w->row + (size_t)r * row_bytes;
  for (int done = 0; done < tile->height;) {
    int want = tile->height - done < ROWS ? tile->height - done : ROWS;
    int got = (int)jpeg.read_scanlines(cinfo, rows, (JDIMENSION)want);
    for (int r = 0; r < got; r++, done++, out += stride) memcpy(out, rows[r] + offset, bytes);
  }
  if (cinfo->output_scanline == cinfo->output_height && !job->cut) {
    jpeg.finish(cinfo); /* whatever is wrong up to the end marker is still seen */
    w->loaded = NULL;   /* and tables that stand before it have replaced ours */
  } else {
    jpeg.abort(cinfo);
  }
  return 0;
}

/* From remembered states: 0 when the part is on the canvas. */
static int decode_from_states(Worker *w, Canvas *canvas, const Tile *tile, const Job *job,
                              const Touched *touched, const States *states) {
  const Part part = {tile->left, tile->top, tile->width, tile->height};
  Stream stream;
  if (states_stream(&w->scratch, states, touched, part, &stream) != 1) return -1;
  if (!decode_stream(w, canvas, tile, job, &stream)) return 0;
  states_failed();
  canvas->status = OK; /* as if it had not been tried */
  memset(canvas->message, 0, sizeof canvas->message);
  return -1;
}

/* Decode the seen part of a stream that was checked, and remember its states where that is on. */
static int decode_checked(Worker *w, Canvas *canvas, const Tile *tile, const Job *job, const Touched *touched,
                          Found found, const States *states) {
  if (found == KNOWN_TILE && !decode_from_states(w, canvas, tile, job, touched, states)) return 0;
  const Stream whole = {touched->data, touched->size, tile->left, tile->top, 0};
  if (decode_stream(w, canvas, tile, job, &whole)) return -1;
  if (found == NEW_TILE) states_remember(&w->scratch, touched);
  return 0;
}

static Touched touch(const Canvas *canvas, const Job *job, const uint8_t *data, size_t size) {
  return (Touched){canvas->scale == 1 ? canvas->key : 0, job->address, data, job->tables->data, size,
                   (size_t)job->tables->size};
}

/* Decode the seen part of a tile onto the canvas. */
static int decode_tile(Worker *w, Canvas *canvas, const Tile *tile, Job *job, const uint8_t *data, size_t size) {
  job->own = (Tables){0, 0, 0};
  if (check_markers(canvas, data, size, 0, &job->own)) return -1;
  if (!has_end_marker(data, size)) {
    say(canvas, BAD_TILE, "it ends before its picture does");
    return -1;
  }
  const Touched touched = touch(canvas, job, data, size);
  const States *states = NULL;
  Found found = states_find(&touched, &states);
  return decode_checked(w, canvas, tile, job, &touched, found, states);
}

/* --- bare restart intervals -------------------------------------------------------------------- */

static void put(uint8_t *block, size_t *size, const uint8_t *from, size_t count) {
  memcpy(block + *size, from, count);
  *size += count;
}

/* Split the head that a canvas's tiles lack into w->head, unless it holds just that. */
static int split_head(Worker *w, Canvas *canvas, const Bytes *whole) {
  Head *head = &w->head;
  if (head->of == whole->data && head->width == canvas->tile_width && head->height == canvas->tile_height &&
      head->colour == canvas->colour)
    return 0;
  const uint8_t *data = whole->data;
  size_t size = (size_t)whole->size, at = 2;
  Tables tables = {0, 0, 0};
  head->of = NULL;
  if (w->loaded && w->loaded == head->tables) w->loaded = NULL; /* its room is about to hold others */
  if (check_markers(canvas, data, size, 0, &tables)) return -1;
  if (grow(&head->tables, &head->tables_room, size + 4) || grow(&head->frame, &head->frame_room, size)) {
    say(canvas, NO_MEMORY, "no memory");
    return -1;
  }
  head->tables_size = head->frame_size = 0;
  put(head->tables, &head->tables_size, data, 2);
  put(head->frame, &head->frame_size, data, 2);
  int high = 1, wide = 1, interval = 0;
  for (;;) { /* check_markers has been here: a frame and a scan header are there, whole */
    int marker = data[at + 1];
    size_t length = 2 + (size_t)(data[at + 2] << 8 | data[at + 3]);
    if (marker == 0xDA) break;
    if (marker == 0xDB || marker == 0xC4) put(head->tables, &head->tables_size, data + at, length);
    if (marker == 0xC0 || marker == 0xC1) {
      for (int i = 0; i < data[at + 9]; i++) {
        int sampling = data[at + 11 + 3 * i];
        if (sampling >> 4 > wide) wide = sampling >> 4;
        if ((sampling & 15) > high) high = sampling & 15;
      }
      head->width_at = head->frame_size + 7;
      put(head->frame, &head->frame_size, data + at, length);
      if (data[at + 9] == 1) wide = high = 1; /* an MCU of one component is one block */
    }
    if (marker == 0xDD && length == 6) {
      interval = data[at + 4] << 8 | data[at + 5];
      put(head->frame, &head->frame_size, data + at, length);
    }
    at += length;
  }
  put(head->frame, &head->frame_size, data + at, size - at);
  const uint8_t end[2] = {0xFF, 0xD9};
  put(head->tables, &head->tables_size, end, 2);
  int across = (canvas->tile_width + 8 * wide - 1) / (8 * wide);
  head->mcu_width = canvas->tile_height <= 8 * high && (!interval || interval >= across) ? 8 * wide : 0;
  if (tables.several) head->mcu_width = 0;
  head->defined = tables.defined;
  head->needed = tables.needed;
  head->width = canvas->tile_width;
  head->height = canvas->tile_height;
  head->colour = canvas->colour;
  head->of = whole->data;
  return 0;
}

/* Decode the seen part of a restart interval, whose bytes lie behind the room for its frame in w->file.
 *
 * Of an interval that is one row of MCUs, those right of the part need not even be entropy-decoded: the frame
 * is made as narrow as the part wants. */
static int decode_interval(Worker *w, Canvas *canvas, const Tile *tile, Job *job, size_t size) {
  Head *head = &w->head;
  const Bytes tables = {head->tables, (Py_ssize_t)head->tables_size};
  uint8_t *stream = w->file, *end = stream + head->frame_size + size;
  memcpy(stream, head->frame, head->frame_size);
  end[0] = 0xFF;
  end[1] = 0xD9;
  job->tables = &tables;
  job->shared.defined = head->defined;
  job->own = (Tables){0, head->needed, head->needed == ~0u};
  const Touched touched = touch(canvas, job, stream, head->frame_size + size + 2);
  const States *states = NULL;
  Found found = states_find(&touched, &states);
  if (head->mcu_width && found == PLAIN_TILE) {
    int right = (tile->left + tile->width + CROP_MARGIN_PX) * canvas->scale;
    right = (right + head->mcu_width - 1) / head->mcu_width * head->mcu_width;
    if (right < canvas->tile_width) {
      stream[head->width_at] = (uint8_t)(right >> 8);
      stream[head->width_at + 1] = (uint8_t)right;
      job->cut = 1;
    }
  }
  return decode_checked(w, canvas, tile, job, &touched, found, states);
}

/* --- resampling: Pillow's triangle filter, in integers --------------------------------------- */

#define BITS 22 /* weights are rounded to 2^-22: 8 bits of pixel and 2 of headroom fill an int32 */

/* For each of `size` output pixels, the first input pixel and the weights of `taps` from there on.
 * A window of [low, high) of an axis of `limit` pixels; the triangle's support is one pixel of the
 * coarser of the two grids. Returns taps, the weights a pixel has room for. */
static int taps_of(float low, float high, int size) {
  double scale = (double)(high - low) / size;
  return (int)ceil(scale > 1.0 ? scale : 1.0) * 2 + 2; /* even: taps are taken two at a time */
}

static void weigh(float low, float high, int size, int limit, int taps, int32_t *first,
                  int32_t *count, int32_t *weights) {
  double scale = (double)(high - low) / size, support = scale > 1.0 ? scale : 1.0, inverse = 1.0 / support;
  for (int i = 0; i < size; i++) {
    double center = low + (i + 0.5) * scale, total = 0.0, value[taps];
    int from = (int)(center - support + 0.5), to = (int)(center + support + 0.5);
    if (from < 0) from = 0;
    if (to > limit) to = limit;
    int n = to - from;
    for (int t = 0; t < n; t++) {
      double distance = fabs((t + from - center + 0.5) * inverse);
      value[t] = distance < 1.0 ? 1.0 - distance : 0.0;
      total += value[t];
    }
        for (int t = 0; t < taps; t++)
      weights[i * taps + t] =
          t < n && total != 0.0 ? (int32_t)(0.5 + value[t] / total * (1 << BITS)) : 0;
    first[i] = from;
    count[i] = n;
  }
}

typedef struct {
  int taps; /* room for weights a pixel */
  const int32_t *first, *count, *weights;
} Weights;

/* `size` rows out of the rows in, each of `bytes`. */
static void down_plain(const uint8_t *in, size_t stride, uint8_t *out, size_t bytes, int size, Weights w) {
  for (int y = 0; y < size; y++) {
    const uint8_t *from = in + (size_t)w.first[y] * stride;
    const int32_t *k = w.weights + y * w.taps;
    for (size_t x = 0; x < bytes; x++) {
      int32_t sum = 1 << (BITS - 1);
      for (int t = 0; t < w.count[y]; t++) sum += from[(size_t)t * stride + x] * k[t];
      out[(size_t)y * bytes + x] = (uint8_t)(sum >> BITS); /* weights sum to 1: it fits */
    }
  }
}

/* Rows of RGBX in, rows of `size` RGB pixels out. */
static void across_plain(const uint8_t *in, size_t stride, uint8_t *out, int rows, int size, Weights w) {
  for (int y = 0; y < rows; y++)
    for (int x = 0; x < size; x++, out += 3) {
      const uint8_t *from = in + (size_t)y * stride + (size_t)w.first[x] * 4;
      for (int c = 0; c < 3; c++) {
        int32_t sum = 1 << (BITS - 1);
        for (int t = 0; t < w.count[x]; t++) sum += from[4 * t + c] * w.weights[x * w.taps + t];
        out[c] = (uint8_t)(sum >> BITS);
      }
    }
}

#if defined(__x86_64__)
#include <immintrin.h>

/* The same sums, in the same integers, eight at a time. */
__attribute__((target("avx2"))) static void down_avx2(const uint8_t *in, size_t stride, uint8_t *out,
                                                      size_t bytes, int size, Weights w) {
  const __m256i half = _mm256_set1_epi32(1 << (BITS - 1));
  for (int y = 0; y < size; y++) {
    const uint8_t *from = in + (size_t)w.first[y] * stride;
    const int32_t *k = w.weights + y * w.taps;
    uint8_t *to = out + (size_t)y * bytes;
    int count = w.count[y];
    for (size_t x = 0; x < bytes; x += 32) {
      if (x + 32 > bytes) { /* the last step overlaps the one before; short rows go the plain way */
        if (bytes < 32) {
          Weights row = {w.taps, w.first + y, w.count + y, k};
          down_plain(in, stride, to, bytes, 1, row);
          break;
        }
        x = bytes - 32;
      }
      __m256i a = half, b = half, c = half, d = half;
      for (int t = 0; t < count; t++) {
        const uint8_t *line = from + (size_t)t * stride + x;
        __m256i weight = _mm256_set1_epi32(k[t]);
        __m256i p = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)line));
        __m256i q = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(line + 8)));
        __m256i r = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(line + 16)));
        __m256i s = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(line + 24)));
        a = _mm256_add_epi32(a, _mm256_mullo_epi32(p, weight));
        b = _mm256_add_epi32(b, _mm256_mullo_epi32(q, weight));
        c = _mm256_add_epi32(c, _mm256_mullo_epi32(r, weight));
        d = _mm256_add_epi32(d, _mm256_mullo_epi32(s, weight));
      }
      /* Packing works within halves: put the eight quarters back in order. */
      __m256i low = _mm256_packs_epi32(_mm256_srai_epi32(a, BITS), _mm256_srai_epi32(b, BITS));
      __m256i high = _mm256_packs_epi32(_mm256_srai_epi32(c, BITS), _mm256_srai_epi32(d, BITS));
      __m256i all = _mm256_packus_epi16(low, high);
      all = _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      _mm256_storeu_si256((__m256i *)(to + x), all);
    }
  }
}

/* Two taps at a time; weights past `count` are 0, and rows have eight spare bytes behind them. */
__attribute__((target("avx2"))) static void across_avx2(const uint8_t *in, size_t stride, uint8_t *out,
                                                        int rows, int size, Weights w) {
  const __m256i spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  const __m128i half = _mm_set1_epi32(1 << (BITS - 1));
  const __m128i pick = _mm_setr_epi8(0, 4, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  for (int y = 0; y < rows; y++) {
    const uint8_t *line = in + (size_t)y * stride;
    uint8_t *to = out + (size_t)y * size * 3;
    for (int x = 0; x < size; x++, to += 3) {
      const uint8_t *from = line + (size_t)w.first[x] * 4;
      const int32_t *k = w.weights + x * w.taps;
      __m256i sum = _mm256_setzero_si256();
      for (int t = 0; t < w.count[x]; t += 2) {
        __m256i weight = _mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)(k + t)));
        __m256i pixels = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + 4 * t)));
        weight = _mm256_permutevar8x32_epi32(weight, spread);
        sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(pixels, weight));
      }
      __m128i one = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
      one = _mm_shuffle_epi8(_mm_srai_epi32(_mm_add_epi32(one, half), BITS), pick);
      int pixel = _mm_cvtsi128_si32(one);
      if (x + 1 < size)
        memcpy(to, &pixel, 4); /* the fourth byte is the next pixel's */
      else
        memcpy(to, &pixel, 3);
    }
  }
}
#endif

static int use_avx2 = 0; /* set at import and by tests */

static void down(const uint8_t *in, size_t stride, uint8_t *out, size_t bytes, int size, Weights w) {
#if defined(__x86_64__)
  if (use_avx2) {
    down_avx2(in, stride, out, bytes, size, w);
    return;
  }
#endif
  down_plain(in, stride, out, bytes, size, w);
}

static void across(const uint8_t *in, size_t stride, uint8_t *out, int rows, int size, Weights w) {
#if defined(__x86_64__)
  if (use_avx2) {
    across_avx2(in, stride, out, rows, size, w);
    return;
  }
#endif
  across_plain(in, stride, out, rows, size, w);
}

/* Down first: it works on whole rows, and leaves fewer of them for the pass that cannot. */
static int resample(Worker *w, const Canvas *canvas, const Output *o, uint8_t *out) {
  float left = (float)o->left, top = (float)o->top, right = (float)o->right, bottom = (float)o->bottom;
  int tx = taps_of(left, right, o->width), ty = taps_of(top, bottom, o->height);
  size_t nx = (size_t)o->width, ny = (size_t)o->height;
  if (grow(&w->weights, &w->weights_size, sizeof(int32_t) * (nx * (tx + 2) + ny * (ty + 2)))) return -1;
  int32_t *x_first = w->weights, *x_count = x_first + nx, *x_weights = x_count + nx;
  int32_t *y_first = x_weights + nx * tx, *y_count = y_first + ny, *y_weights = y_count + ny;
  weigh(left, right, o->width, o->box_width, tx, x_first, x_count, x_weights);
  weigh(top, bottom, o->height, o->box_height, ty, y_first, y_count, y_weights);
  int from = x_first[0], columns = x_first[nx - 1] + x_count[nx - 1] - from;
  for (size_t i = 0; i < nx; i++) x_first[i] -= from;
  size_t line = (size_t)columns * 4;
  if (grow(&w->middle, &w->middle_size, line * ny + 8)) return -1;
  Weights x = {tx, x_first, x_count, x_weights}, y = {ty, y_first, y_count, y_weights};
  const uint8_t *box = w->canvas + ((size_t)o->y * canvas->width + o->x + from) * 4;
  down(box, (size_t)canvas->width * 4, w->middle, line, o->height, y);
  across(w->middle, line, out, o->height, o->width, x);
  return 0;
}

/* --- one canvas: its tiles, then its patches ------------------------------------------------- */

static int file_is_the_same(const File *file) {
  struct stat now;
  if (file->size_bytes <= 0) return 1;
  if (fstat(file->fd, &now)) return 0;
#ifdef __APPLE__
  int64_t mtime_ns = (int64_t)now.st_mtimespec.tv_sec * 1000000000 + now.st_mtimespec.tv_nsec;
#else
  int64_t mtime_ns = (int64_t)now.st_mtim.tv_sec * 1000000000 + now.st_mtim.tv_nsec;
#endif
  return now.st_size == file->size_bytes && (!file->mtime_ns || mtime_ns == file->mtime_ns);
}

/* Whether the files of a canvas are those that were indexed; most canvases have one. */
static int files_are_the_same(Canvas *canvas, const Tile *tiles, const File *files) {
  int32_t last = -1;
  for (int i = 0; i < canvas->n_tiles; i++) {
    int32_t file = tiles[canvas->first_tile + i].file;
    if (file < 0 || file == last) continue;
    last = file;
    if (file_is_the_same(files + file)) continue;
    canvas->tile = canvas->first_tile + i;
    say(canvas, CHANGED, "changed since it was indexed");
    return 0;
  }
  return 1;
}

/* A tile's bytes to `before` bytes behind the start of w->file, with room for `after` more. */
static int pread_all(Worker *w, Canvas *canvas, const Tile *tile, int fd, size_t before, size_t after) {
  if (tile->length > MAX_TILE_BYTES) {
    say(canvas, BAD_TILE, "it is larger than 256 MB");
    return -1;
  }
  if (grow(&w->file, &w->file_size, before + (size_t)tile->length + after)) {
    say(canvas, NO_MEMORY, "no memory");
    return -1;
  }
  for (int64_t done = 0; done < tile->length;) {
    ssize_t got = pread(fd, w->file + before + done, (size_t)(tile->length - done), tile->start + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      say(canvas, IO_ERROR, "cannot be read");
      return -1;
    }
    if (!got) {
      say(canvas, SHORT_READ, "it ends early");
      return -1;
    }
    done += got;
  }
  return 0;
}

/* How many bytes the file of a whole tile has: `fd` is then open on it. 0 where there is no such file. */
static int64_t open_whole(Canvas *canvas, const Body *path, int *fd) {
  char name[MAX_PATH_BYTES];
  struct stat now;
  memcpy(name, path->data, (size_t)path->size);
  name[path->size] = 0;
  *fd = open(name, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe in its place is not waited for */
  if (*fd < 0 && errno == ENOENT) {
    canvas->absent++;
    return 0;
  }
  if (*fd >= 0 && !fstat(*fd, &now) && S_ISREG(now.st_mode)) {
    if (now.st_size && now.st_size <= MAX_TILE_BYTES) return now.st_size;
    say(canvas, BAD_TILE, now.st_size ? "it is larger than 256 MB" : "its file is empty");
    return -1;
  }
  say(canvas, IO_ERROR, "cannot be read");
  return -1;
}

static void fill(uint8_t *pixels, size_t stride, const Tile *tile, int value, int channels) {
  for (int y = 0; y < tile->height; y++) {
    uint8_t *row = pixels + (size_t)(tile->y + y) * stride + (size_t)tile->x * channels;
    if (!tile->channel)
      memset(row, value, (size_t)tile->width * channels);
    else /* a tile in parts: its first has filled all channels, and others fill those from theirs on */
      for (int x = 0; x < tile->width; x++)
        for (int c = tile->channel; c < 3; c++) row[x * channels + c] = (uint8_t)value;
  }
}

static void paste(uint8_t *pixels, size_t stride, const Tile *tile, const Body *body, int channels) {
  for (int y = 0; y < tile->height; y++) {
    uint8_t *to = pixels + (size_t)(tile->y + y) * stride + (size_t)tile->x * channels + tile->channel;
    const uint8_t *from = body->data + y * body->step[0];
    if (channels == 3 && body->channels == 3 && body->step[1] == 3 && body->step[2] == 1) {
      memcpy(to, from, 3 * (size_t)tile->width);
      continue;
    }
    for (int c = 0; c < body->channels; c++) {
      const uint8_t *one = from + c * body->step[2];
      for (int x = 0; x < tile->width; x++) to[x * channels + c] = one[x * body->step[1]];
    }
  }
}

static ChunkPart part_of(const Canvas *canvas, const Tile *tile, const Job *job) {
  size_t stride = (size_t)canvas->width * job->channels;
  uint8_t *out = job->pixels + (size_t)tile->y * stride + (size_t)tile->x * job->channels;
  return (ChunkPart){canvas->tile_width, canvas->tile_height, tile->left, tile->top, tile->width, tile->height,
                     out, stride, job->channels, tile->channel};
}

/* What a part of a chunk needs of its bytes, at their places in w->file. */
static int fetch_chunk(Worker *w, Canvas *canvas, const Tile *tile, const Job *job, const Bytes *spec, int fd) {
  if (tile->length > MAX_TILE_BYTES) {
    say(canvas, BAD_TILE, "it is larger than 256 MB");
    return -1;
  }
  if (grow(&w->file, &w->file_size, (size_t)tile->length)) {
    say(canvas, NO_MEMORY, "no memory");
    return -1;
  }
  ChunkPart part = part_of(canvas, tile, job);
  int64_t got = chunk_fetch(spec->data, fd, tile->start, (size_t)tile->length, &part, w->file);
  if (got >= 0) {
    canvas->read_bytes += got;
    return 0;
  }
  say(canvas, got == -1 ? IO_ERROR : SHORT_READ, got == -1 ? "cannot be read" : "it ends early");
  return -1;
}

static int decode_chunk(Worker *w, Canvas *canvas, const Tile *tile, const Job *job, const Bytes *spec,
                        const uint8_t *data, size_t size) {
  ChunkPart part = part_of(canvas, tile, job);
  char message[CHUNK_MESSAGE_BYTES] = "";
  int wrong = chunk_part(&w->chunks, spec->data, data, size, &part, message);
  if (wrong) say(canvas, wrong == CHUNK_NO_MEMORY ? NO_MEMORY : BAD_TILE, wrong == CHUNK_NO_MEMORY ? "no memory" : message);
  return wrong ? -1 : 0;
}

/* A tile that is a file of its own. */
static int read_whole(Worker *w, Canvas *canvas, const Tile *tile, const Given *given, Job *job) {
  int fd = -1, wrong = -1;
  int64_t size = open_whole(canvas, given->bodies + tile->body, &fd);
  if (!size) fill(job->pixels, (size_t)canvas->width * job->channels, tile, canvas->fill, job->channels);
  if (size > 0) {
    Tile all = *tile;
    all.length = size;
    const Bytes *spec = canvas->packing == CHUNK ? given->tables + canvas->tables : NULL;
    wrong = spec ? fetch_chunk(w, canvas, &all, job, spec, fd) : pread_all(w, canvas, &all, fd, 0, 0);
    if (wrong && canvas->status == SHORT_READ) say(canvas, CHANGED, "changed while it was read");
    if (!wrong && !spec) canvas->read_bytes += size;
    if (!wrong)
      wrong = spec ? decode_chunk(w, canvas, tile, job, spec, w->file, (size_t)size)
                   : decode_tile(w, canvas, &all, job, w->file, (size_t)size);
  }
  if (fd >= 0) close(fd);
  return size ? wrong : 0;
}

static int read_tile(Worker *w, Canvas *canvas, const Tile *tile, const Given *given, Job *job) {
  if (tile->length == WHOLE) return read_whole(w, canvas, tile, given, job);
  size_t size = (size_t)tile->length;
  const Head *head = NULL;
  if (canvas->packing == HEADLESS) {
    if (split_head(w, canvas, given->tables + canvas->tables)) return -1;
    head = &w->head;
  }
  size_t before = head ? head->frame_size : 0, after = head ? 2 : 0;
  const uint8_t *data = tile->file < 0 ? given->bodies[tile->body].data : NULL;
  if (!data && canvas->packing == CHUNK) {
    int fd = given->files[tile->file].fd;
    if (fetch_chunk(w, canvas, tile, job, given->tables + canvas->tables, fd)) return -1;
    data = w->file;
  } else if (!data) {
    if (pread_all(w, canvas, tile, given->files[tile->file].fd, before, after)) return -1;
    data = w->file;
  } else if (head) {
    if (grow(&w->file, &w->file_size, before + size + after)) {
      say(canvas, NO_MEMORY, "no memory");
      return -1;
    }
    memcpy(w->file + before, data, size);
    data = w->file;
  }
  if (head) return decode_interval(w, canvas, tile, job, size);
  if (canvas->packing == CHUNK)
    return decode_chunk(w, canvas, tile, job, given->tables + canvas->tables, data, size);
  return decode_tile(w, canvas, tile, job, data, size);
}

static void read_canvas(Worker *w, Canvas *canvas, const Tile *tiles, const Output *outputs,
                        const Given *given, uint8_t *batch) {
  const Output *single = outputs + canvas->first_output;
  int direct = canvas->n_outputs == 1 && single->exact && single->width == canvas->width &&
               single->height == canvas->height;
  int channels = 3;
  for (int i = 0; i < canvas->n_outputs; i++)
    if (!single[i].exact) channels = 4;
  size_t stride = (size_t)canvas->width * channels;
  uint8_t *pixels = batch + single->target;
  canvas->status = OK;
  canvas->read_bytes = canvas->absent = 0;
  if (!direct) {
    if (grow(&w->canvas, &w->canvas_size, stride * (size_t)canvas->height + 16)) {
      say(canvas, NO_MEMORY, "no memory");
      return;
    }
    pixels = w->canvas;
  }
  if (!files_are_the_same(canvas, tiles, given->files)) return;
  int64_t seen = 0;
  for (int i = 0; i < canvas->n_tiles; i++) {
    const Tile *tile = tiles + canvas->first_tile + i;
    if (!tile->channel) seen += (int64_t)tile->width * tile->height; /* once for a tile in parts */
  }
  if (seen < (int64_t)canvas->width * canvas->height)
    memset(pixels, 255, stride * (size_t)canvas->height); /* outside the slide is white, like glass */
  for (int i = 0; i < canvas->n_tiles; i++) {
    const Tile *tile = tiles + canvas->first_tile + i;
    canvas->tile = canvas->first_tile + i;
    if (!tile->length) {
      fill(pixels, stride, tile, canvas->fill, channels);
      continue;
    }
    if (canvas->packing == PIXELS) {
      paste(pixels, stride, tile, given->bodies + tile->body, channels);
      continue;
    }
    const Bytes none = {NULL, 0};
    const Bytes *own = canvas->tables >= 0 && canvas->packing == STREAM ? given->tables + canvas->tables : &none;
    int64_t base = tile->file < 0 ? 0 : given->files[tile->file].base;
    Job job = {own, {0, 0, 0}, {0, 0, 0}, pixels, channels, 0, base + tile->start};
    if (own->size && check_markers(canvas, own->data, (size_t)own->size, 1, &job.shared)) return;
    if (read_tile(w, canvas, tile, given, &job)) return;
  }
  if (!files_are_the_same(canvas, tiles, given->files)) return; /* old and new bytes are never mixed */
  if (direct) return;
  for (int i = 0; i < canvas->n_outputs; i++) {
    const Output *o = single + i;
    uint8_t *out = batch + o->target;
    if (!o->exact) {
      if (resample(w, canvas, o, out)) say(canvas, NO_MEMORY, "no memory");
      continue;
    }
    for (int y = 0; y < o->height; y++) {
      const uint8_t *from = pixels + (size_t)(o->y + y) * stride + (size_t)o->x * channels;
      uint8_t *to = out + (size_t)y * o->width * 3;
      if (channels == 3)
        memcpy(to, from, (size_t)o->width * 3);
      else
        for (int x = 0; x < o->width; x++) memcpy(to + 3 * x, from + 4 * x, 3);
    }
  }
}

static void read_range(Canvas *canvases, Py_ssize_t first, Py_ssize_t stop, const Tile *tiles,
                       const Output *outputs, const Given *given, uint8_t *batch) {
  Worker w;
  memset(&w, 0, sizeof w);
  w.cinfo.err = jpeg.std_error(&w.errors.base);
  w.errors.base.error_exit = on_error;
  w.errors.base.emit_message = on_message;
  w.errors.base.output_message = no_output;
  if (setjmp(w.errors.back)) {
    for (Py_ssize_t i = first; i < stop; i++) say(canvases + i, NO_MEMORY, w.errors.message);
  } else {
    jpeg.create(&w.cinfo, JPEG_LIB_VERSION, sizeof w.cinfo);
    w.cinfo.src = &w.source;
    for (Py_ssize_t i = first; i < stop; i++)
      read_canvas(&w, canvases + i, tiles, outputs, given, batch);
  }
  jpeg.destroy(&w.cinfo);
  free(w.file);
  free(w.canvas);
  free(w.middle);
  free(w.row);
  free(w.weights);
  free(w.head.tables);
  free(w.head.frame);
  states_free(w.scratch);
  chunk_free(w.chunks);
}

/* --- checks: what C may touch ----------------------------------------------------------------- */

static const char *check_canvas(const Canvas *c, const Tile *tiles, Py_ssize_t n_tiles,
                                const Output *outputs, Py_ssize_t n_outputs, const Given *given,
                                Py_ssize_t batch_size) {
  if (c->first_tile < 0 || c->n_tiles < 0 || (Py_ssize_t)c->first_tile + c->n_tiles > n_tiles) return "tiles";
  if (c->first_output < 0 || c->n_outputs < 1 || (Py_ssize_t)c->first_output + c->n_outputs > n_outputs)
    return "outputs";
  if (c->width < 1 || c->height < 1 || (int64_t)c->width * c->height * 4 > MAX_CANVAS_BYTES) return "canvas size";
  if (c->tile_width < 1 || c->tile_height < 1 || c->tile_width > 65500 || c->tile_height > 65500)
    return "tile size";
  if (c->packing < STREAM || c->packing > CHUNK) return "packing";
  if (c->scale != 1 && c->scale != 2 && c->scale != 4 && c->scale != 8 &&
      (c->packing != PIXELS || (c->scale != 16 && c->scale != 32)))
    return "scale";
  if (c->tables < -1 || c->tables >= given->n_tables) return "tables";
  if ((c->packing == HEADLESS || c->packing == CHUNK) && c->tables < 0) return "tables";
  if (c->packing == CHUNK) {
    const Bytes *spec = given->tables + c->tables;
    const char *wrong = chunk_check(spec->data, (size_t)spec->size, c->tile_width, c->tile_height);
    if (wrong || c->scale != 1) return wrong ? wrong : "scale";
  }
  for (int i = 0; i < c->n_tiles; i++) {
    const Tile *t = tiles + c->first_tile + i;
    if (t->length < WHOLE || t->start < 0) return "byte range";
    if (t->left < 0 || t->top < 0 || t->width < 1 || t->height < 1 ||
        t->left > c->tile_width - t->width || t->top > c->tile_height - t->height)
      return "seen part";
    if (t->x < 0 || t->y < 0 || t->x > c->width - t->width || t->y > c->height - t->height) return "paste box";
    if (t->channel < 0 || t->channel > 2) return "channel";
    if (t->file < -1 || t->file >= given->n_files) return "file";
    int whole = t->length == WHOLE;
    if (t->file >= 0 && !whole && (c->packing == PIXELS || given->files[t->file].fd < 0)) return "file";
    if ((t->file >= 0 && !whole) || !t->length) continue;
    if (t->body < 0 || t->body >= given->n_bodies) return "body";
    const Body *body = given->bodies + t->body;
    if (whole) {
      if (c->packing != STREAM && c->packing != CHUNK) return "whole file";
      if (body->channels || body->size < 1 || body->size >= MAX_PATH_BYTES) return "path";
      if (memchr(body->data, 0, (size_t)body->size)) return "path";
      continue;
    }
    if (c->packing != PIXELS ? body->channels || body->size != t->length
                             : body->rows != t->height || body->columns != t->width || body->channels < 1 ||
                                   t->channel < 0 || t->channel > 3 - body->channels)
      return "body";
  }
  for (int i = 0; i < c->n_outputs; i++) {
    const Output *o = outputs + c->first_output + i;
    if (o->width < 1 || o->height < 1 || o->width > 65536 || o->height > 65536) return "patch size";
    int64_t need = (int64_t)o->width * o->height * 3;
    if (o->target < 0 || need > batch_size || o->target > batch_size - need) return "target";
    if (o->x < 0 || o->y < 0 || o->box_width < 1 || o->box_height < 1 || o->x > c->width - o->box_width ||
        o->y > c->height - o->box_height)
      return "box";
    if (!(o->left >= 0 && o->top >= 0 && o->right <= o->box_width && o->bottom <= o->box_height))
      return "window";
    if (!(o->right > o->left && o->bottom > o->top)) return "window";
    if ((o->right - o->left) / o->width > 4096 || (o->bottom - o->top) / o->height > 4096) return "reduction";
    if (o->exact && (o->width != o->box_width || o->height != o->box_height)) return "exact box";
  }
  return NULL;
}

/* --- Python ----------------------------------------------------------------------------------- */

static PyObject *py_load(PyObject *self, PyObject *argument) {
  (void)self;
  const char *path = PyUnicode_AsUTF8AndSize(argument, NULL);
  if (!path) return NULL;
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    PyErr_SetString(PyExc_OSError, dlerror());
    return NULL;
  }
  static const struct {
    const char *name;
    void **place;
  } wanted[] = {
      {"jpeg_std_error", (void **)&jpeg.std_error},
      {"jpeg_CreateDecompress", (void **)&jpeg.create},
      {"jpeg_destroy_decompress", (void **)&jpeg.destroy},
      {"jpeg_read_header", (void **)&jpeg.read_header},
      {"jpeg_start_decompress", (void **)&jpeg.start},
      {"jpeg_read_scanlines", (void **)&jpeg.read_scanlines},
      {"jpeg_skip_scanlines", (void **)&jpeg.skip_scanlines},
      {"jpeg_crop_scanline", (void **)&jpeg.crop_scanline},
      {"jpeg_finish_decompress", (void **)&jpeg.finish},
      {"jpeg_abort_decompress", (void **)&jpeg.abort},
      {"jpeg_resync_to_restart", (void **)&jpeg.resync},
  };
  for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
    *wanted[i].place = dlsym(library, wanted[i].name);
    if (!*wanted[i].place) {
      jpeg.create = NULL;
      PyErr_Format(PyExc_OSError, "%s has no %s", path, wanted[i].name);
      dlclose(library);
      return NULL;
    }
  }
  /* A library of another ABI says so here, and not in the middle of a run. */
  Worker w;
  memset(&w, 0, sizeof w);
  w.cinfo.err = jpeg.std_error(&w.errors.base);
  w.errors.base.error_exit = on_error;
  w.errors.base.output_message = no_output;
  if (setjmp(w.errors.back)) {
    jpeg.create = NULL;
    PyErr_Format(PyExc_OSError, "%s: %s", path, w.errors.message);
    return NULL;
  }
  jpeg.create(&w.cinfo, JPEG_LIB_VERSION, sizeof w.cinfo);
  jpeg.destroy(&w.cinfo);
  Py_RETURN_NONE;
}

/* Paths of libzstd, C-Blosc and libdeflate, or None; whether all are there. */
static PyObject *py_load_chunks(PyObject *self, PyObject *args) {
  (void)self;
  const char *zstd, *blosc, *deflate;
  if (!PyArg_ParseTuple(args, "zzz", &zstd, &blosc, &deflate)) return NULL;
  return PyBool_FromLong(chunk_load(zstd, blosc, deflate) == 7);
}

/* A tuple of bytes as pointers; the tuple keeps them alive. */
static Bytes *bytes_of(PyObject *list, Py_ssize_t *n) {
  *n = PySequence_Size(list);
  if (*n < 0) return NULL;
  Bytes *out = PyMem_Calloc((size_t)*n + 1, sizeof(Bytes));
  if (!out) return (Bytes *)PyErr_NoMemory();
  for (Py_ssize_t i = 0; i < *n; i++) {
    PyObject *item = PySequence_GetItem(list, i);
    char *data;
    if (!item) goto failed;
    int bad = PyBytes_AsStringAndSize(item, &data, &out[i].size);
    Py_DECREF(item); /* the sequence still holds it */
    if (bad) goto failed;
    out[i].data = data;
  }
  return out;
failed:
  PyMem_Free(out);
  return NULL;
}

typedef struct {
  Py_ssize_t n; /* views that are held */
  Py_buffer *views;
  Body *bodies;
} Held;

static void let_go(Held *held) {
  for (Py_ssize_t i = 0; i < held->n; i++) PyBuffer_Release(held->views + i);
  PyMem_Free(held->views);
  PyMem_Free(held->bodies);
}

/* A tuple of bytes, or of pixels: whatever has a buffer of one or three dimensions. */
static int hold(PyObject *list, Held *held) {
  Py_ssize_t n = PySequence_Size(list);
  if (n < 0) return -1;
  held->views = PyMem_Calloc((size_t)n + 1, sizeof(Py_buffer));
  held->bodies = PyMem_Calloc((size_t)n + 1, sizeof(Body));
  if (!held->views || !held->bodies) {
    PyErr_NoMemory();
    return -1;
  }
  for (Py_ssize_t i = 0; i < n; i++) {
    PyObject *item = PySequence_GetItem(list, i);
    if (!item) return -1;
    Py_buffer *view = held->views + i;
    int bad = PyObject_GetBuffer(item, view, PyBUF_STRIDED_RO);
    Py_DECREF(item);
    if (bad) return -1;
    held->n++;
    Body *body = held->bodies + i;
    body->data = view->buf;
    body->size = view->len;
    if (view->itemsize == 1 && view->ndim == 3) {
      body->rows = view->shape[0];
      body->columns = view->shape[1];
      body->channels = view->shape[2] <= 3 ? (int)view->shape[2] : 4;
      memcpy(body->step, view->strides, sizeof body->step);
    } else if (view->itemsize != 1 || view->ndim != 1 || (view->strides && view->strides[0] != 1)) {
      PyErr_SetString(PyExc_ValueError, "a body is neither bytes nor rows, columns and channels of bytes");
      return -1;
    }
  }
  return 0;
}

static PyObject *py_read(PyObject *self, PyObject *args) {
  (void)self;
  Py_buffer canvases, tiles, outputs, files, batch;
  Py_ssize_t first, stop;
  PyObject *table_list, *body_list;
  if (!PyArg_ParseTuple(args, "w*y*y*y*O!O!w*nn", &canvases, &tiles, &outputs, &files, &PyTuple_Type,
                        &table_list, &PyTuple_Type, &body_list, &batch, &first, &stop))
    return NULL;
  const char *wrong = NULL;
  Held held = {0, NULL, NULL};
  Given given = {files.buf, NULL, NULL, files.len / (Py_ssize_t)sizeof(File), 0, 0};
  Bytes *tables = bytes_of(table_list, &given.n_tables);
  if (tables && !hold(body_list, &held)) {
    given.tables = tables;
    given.bodies = held.bodies;
    given.n_bodies = held.n;
    Canvas *all = canvases.buf;
    if (!jpeg.create) wrong = "load() was not called";
    if (first < 0 || stop < first || stop > canvases.len / (Py_ssize_t)sizeof(Canvas)) wrong = "range";
    for (Py_ssize_t i = first; !wrong && i < stop; i++)
      wrong = check_canvas(all + i, tiles.buf, tiles.len / (Py_ssize_t)sizeof(Tile), outputs.buf,
                           outputs.len / (Py_ssize_t)sizeof(Output), &given, batch.len);
    if (wrong) {
      PyErr_Format(PyExc_ValueError, "a read plan is inconsistent: %s", wrong);
    } else {
      Py_BEGIN_ALLOW_THREADS;
      states_enter();
      read_range(all, first, stop, tiles.buf, outputs.buf, &given, batch.buf);
      states_leave();
      Py_END_ALLOW_THREADS;
    }
  }
  PyMem_Free(tables);
  let_go(&held);
  PyBuffer_Release(&canvases);
  PyBuffer_Release(&tiles);
  PyBuffer_Release(&outputs);
  PyBuffer_Release(&files);
  PyBuffer_Release(&batch);
  if (PyErr_Occurred()) return NULL;
  Py_RETURN_NONE;
}

/* Tests compare the two ways. */
static PyObject *py_simd(PyObject *self, PyObject *argument) {
  (void)self;
  int want = PyObject_IsTrue(argument), had = use_avx2;
  if (want < 0) return NULL;
#if defined(__x86_64__)
  use_avx2 = want && __builtin_cpu_supports("avx2");
#endif
  return PyBool_FromLong(had);
}

static PyObject *py_remember(PyObject *self, PyObject *args) {
  (void)self;
  long long limit;
  int step_px;
  if (!PyArg_ParseTuple(args, "Li", &limit, &step_px)) return NULL;
  if (limit < 0 || step_px < 1 || step_px > MAX_STEP_PX) {
    PyErr_Format(PyExc_ValueError, "%lld bytes of states, one every %d px, cannot be remembered", limit, step_px);
    return NULL;
  }
  if (states_limit(limit, step_px)) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

static PyObject *py_remembered(PyObject *self, PyObject *ignored) {
  (void)self, (void)ignored;
  Counts c = states_counts();
  return Py_BuildValue("{sLsLsLsLsLsLsL}", "limit", (long long)c.limit, "bytes", (long long)c.bytes, "tiles",
                       (long long)c.tiles, "refused", (long long)c.refused, "hits", (long long)c.hits,
                       "misses", (long long)c.misses, "failed", (long long)c.failed);
}

static PyMethodDef methods[] = {
    {"load", py_load, METH_O, "load(path): use the libjpeg-turbo at this path; OSError when it cannot be."},
    {"load_chunks", py_load_chunks, METH_VARARGS,
     "load_chunks(zstd, blosc, deflate): use the libraries at these paths; whether all are there."},
    {"read", py_read, METH_VARARGS,
     "read(canvases, tiles, outputs, files, tables, bodies, batch, first, stop): canvases first..stop into batch."},
    {"remember", py_remember, METH_VARARGS,
     "remember(limit_bytes, step_px): bound what is remembered of tiles; 0 forgets it."},
    {"remembered", py_remembered, METH_NOARGS, "remembered(): what is, and how often it was of use."},
    {"simd", py_simd, METH_O, "simd(wanted): use AVX2 where the CPU has it; returns what was used before."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "online_patching.native._jpeg", "Patches out of JPEG tiles.", -1, methods,
    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg(void) {
  PyObject *made = PyModule_Create(&module);
  states_init();
#if defined(__x86_64__)
  use_avx2 = __builtin_cpu_supports("avx2") != 0;
#endif
  if (made) {
    PyModule_AddIntConstant(made, "CANVAS_BYTES", (long)sizeof(Canvas));
    PyModule_AddIntConstant(made, "TILE_BYTES", (long)sizeof(Tile));
    PyModule_AddIntConstant(made, "OUTPUT_BYTES", (long)sizeof(Output));
    PyModule_AddIntConstant(made, "FILE_BYTES", (long)sizeof(File));
  }
  return made;
}
