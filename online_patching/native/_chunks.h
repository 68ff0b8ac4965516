/* Zarr chunks -> pixels on a canvas: only what a part of a chunk needs. See _chunks.c. */

#ifndef ONLINE_PATCHING_CHUNKS_H
#define ONLINE_PATCHING_CHUNKS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define CHUNK_SPEC_BYTES 12
#define CHUNK_MESSAGE_BYTES 120

typedef struct ChunkScratch ChunkScratch;

typedef struct {
  int32_t tile_width, tile_height;  /* of the chunk */
  int32_t left, top, width, height; /* of the part, inside the chunk */
  uint8_t *out;                     /* its first pixel on the canvas */
  size_t stride;                    /* from row to row there */
  int32_t step;                     /* from pixel to pixel: 3 or 4 */
  int32_t channel;                  /* the first that is written, where chunks hold one */
} ChunkPart;

enum { CHUNK_OK = 0, CHUNK_BAD = 1, CHUNK_NO_MEMORY = 2 };

/* What is wrong with a description, or NULL. `width` and `height` are the chunk's. */
const char *chunk_check(const uint8_t *spec, size_t spec_size, int64_t width, int64_t height);

/* Decode and paste a part. `scratch` begins as NULL and is freed by chunk_free. */
int chunk_part(ChunkScratch **scratch, const uint8_t *spec, const uint8_t *data, size_t size,
               const ChunkPart *part, char *message);

/* Bring a chunk of `size` bytes at `offset` of a file to `to`, which has room for all of it: as much as chunk_part
 * then looks at for the same part. Returns how many bytes were read; -1: errno says why; -2: the file ends early. */
int64_t chunk_fetch(const uint8_t *spec, int fd, int64_t offset, size_t size,
                    const ChunkPart *part, uint8_t *to);

void chunk_free(ChunkScratch *scratch);

/* Look up the libraries' functions; a path may be NULL. Returns which are there: 1 zstd, 2 blosc, 4 libdeflate. */
int chunk_load(const char *zstd, const char *blosc, const char *deflate);

#endif
