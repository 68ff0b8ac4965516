/* Entropy-decoder states inside JPEG tiles: remembered at the first touch, started from later.
 *
 * Huffman codes can only be read from their beginning, unless one knows where a code begins inside and
 * what the DC predictors are there. A table that the whole process shares keeps just that, for every few
 * MCUs of each MCU row of a tile. A stream of only the MCUs that a part needs is then made out of the
 * tile's bytes, without decoding any, and given to libjpeg like every other stream.
 */

#ifndef ONLINE_PATCHING_STATES_H
#define ONLINE_PATCHING_STATES_H

#include <stddef.h>
#include <stdint.h>

typedef struct States States;   /* of one tile; never changes */
typedef struct Scratch Scratch; /* what a thread needs to scan tiles and to make streams */

typedef struct {
  uint64_t key;  /* of the slide; 0: not to be remembered */
  int64_t start; /* of the tile in its file */
  const uint8_t *data, *tables; /* its bytes; tables that its stream was split from, or NULL */
  size_t size, tables_size;
} Touched;

typedef struct {
  int left, top, width, height; /* px of the tile */
} Part;

typedef struct {
  const uint8_t *data; /* in the scratch: valid until it is used again */
  size_t size;
  int left, top;     /* where the part is in it */
  int edge;          /* columns on its left that nobody encoded and no pixel may depend on */
} Stream;

typedef struct {
  int64_t limit, bytes, tiles, refused, hits, misses, failed;
} Counts;

typedef enum { NEW_TILE, KNOWN_TILE, PLAIN_TILE } Found; /* plain: refused, or the table is full */

void states_init(void); /* once a process */

/* Bound the table; 0 empties it, as soon as no reader is inside. -1 when there is no memory. */
int states_limit(int64_t bytes, int step_px);
Counts states_counts(void);

/* Between these two no States go away. */
void states_enter(void);
void states_leave(void);

Found states_find(const Touched *tile, const States **states);

/* Scan a tile that was just decoded without complaint and remember its states, or that it has none. */
void states_remember(Scratch **scratch, const Touched *tile);

/* A stream of what `part` needs: 1 when it is made, 0 when the whole tile is as good or the bytes are not
 * those that were scanned, -1 when it cannot be made. */
int states_stream(Scratch **scratch, const States *states, const Touched *tile, Part part, Stream *out);
void states_failed(void); /* libjpeg did not like a stream made here */

void states_free(Scratch *scratch);

#endif
