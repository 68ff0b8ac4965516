/* The limit the loader is measured against: pread, decode what is needed, paste; nothing else.
 *
 * Compiled and called by bare_loop.py, linked with the libjpeg-turbo that the loader's own decoder
 * uses. One thread, no checks of what a slide may hold: for benchmarks on slides one trusts.
 */

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "jpeglib.h"

#define MARGIN_PX 16 /* chroma upsampling looks at neighbours: without it the cut's pixels differ */
#define ROWS 16

typedef struct {
  int64_t start, length;            /* the tile's bytes in the file */
  int64_t left, top, width, height; /* what a patch sees of it, in decoded pixels */
  int64_t x, y;                     /* where that goes in the patch */
} Job;

typedef struct {
  struct jpeg_error_mgr base;
  jmp_buf back;
} Errors;

static void on_error(j_common_ptr cinfo) {
  cinfo->err->output_message(cinfo);
  longjmp(((Errors *)cinfo->err)->back, 1);
}

/* Tables of an abbreviated stream stay in `cinfo` for every picture after them. */
static void read_tables(j_decompress_ptr cinfo, const uint8_t *tables, int64_t length) {
  if (length == 0) return;
  jpeg_mem_src(cinfo, tables, (unsigned long)length);
  jpeg_read_header(cinfo, FALSE);
}

static void decode(j_decompress_ptr cinfo, const Job *job, const uint8_t *data, int ycbcr, int scale,
                   uint8_t *scratch, uint8_t *patch, int64_t side) {
  jpeg_mem_src(cinfo, data, (unsigned long)job->length);
  jpeg_read_header(cinfo, TRUE);
  cinfo->jpeg_color_space = ycbcr ? JCS_YCbCr : JCS_RGB; /* what the TIFF says, not the markers */
  cinfo->out_color_space = JCS_RGB;
  cinfo->scale_num = 1;
  cinfo->scale_denom = (unsigned)scale;
  jpeg_start_decompress(cinfo);
  JDIMENSION from = job->left > MARGIN_PX ? (JDIMENSION)(job->left - MARGIN_PX) : 0;
  JDIMENSION stop = (JDIMENSION)(job->left + job->width + MARGIN_PX);
  if (stop > cinfo->output_width) stop = cinfo->output_width;
  JDIMENSION width = stop - from;
  if (width < cinfo->output_width) jpeg_crop_scanline(cinfo, &from, &width);
  if (job->top > 0) jpeg_skip_scanlines(cinfo, (JDIMENSION)job->top);
  JSAMPROW rows[ROWS];
  int64_t stride = (int64_t)cinfo->output_width * 3, skip = (job->left - from) * 3;
  for (int i = 0; i < ROWS; i++) rows[i] = scratch + i * stride;
  uint8_t *to = patch + (job->y * side + job->x) * 3;
  for (int64_t y = 0; y < job->height;) {
    int64_t left = job->height - y;
    JDIMENSION got = jpeg_read_scanlines(cinfo, rows, left < ROWS ? (JDIMENSION)left : ROWS);
    for (JDIMENSION i = 0; i < got; i++, y++, to += side * 3)
      memcpy(to, rows[i] + skip, (size_t)job->width * 3);
  }
  jpeg_abort_decompress(cinfo); /* the rows below are not wanted */
}

/* Patches of `side` x `side` pixels into `out`; seconds it took, or -1 when something failed. */
double bare_loop(int fd, const uint8_t *tables, int64_t tables_length, int ycbcr, int scale,
                 const Job *jobs, const int64_t *first_jobs, int64_t n_patches, int64_t side,
                 int64_t largest, int64_t tile_px, uint8_t *out) {
  struct timespec began, ended;
  struct jpeg_decompress_struct cinfo;
  Errors errors;
  uint8_t *volatile data = malloc((size_t)largest);
  uint8_t *volatile scratch = malloc((size_t)(tile_px * 3 * ROWS));
  double seconds = -1;
  clock_gettime(CLOCK_MONOTONIC, &began);
  cinfo.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = on_error;
  if (data == NULL || scratch == NULL || setjmp(errors.back)) goto done;
  jpeg_create_decompress(&cinfo);
  read_tables(&cinfo, tables, tables_length);
  for (int64_t i = 0; i < n_patches; i++) {
    uint8_t *patch = out + i * side * side * 3;
    for (int64_t j = first_jobs[i]; j < first_jobs[i + 1]; j++) {
      if (pread(fd, data, (size_t)jobs[j].length, jobs[j].start) != jobs[j].length) goto done;
      decode(&cinfo, jobs + j, data, ycbcr, scale, scratch, patch, side);
    }
  }
  clock_gettime(CLOCK_MONOTONIC, &ended);
  seconds = (double)(ended.tv_sec - began.tv_sec) + 1e-9 * (double)(ended.tv_nsec - began.tv_nsec);
  jpeg_destroy_decompress(&cinfo);
done:
  free(data);
  free(scratch);
  return seconds;
}
