#ifndef OFFSTEP_COPY_H
#define OFFSTEP_COPY_H

#include <stddef.h>
#include <stdint.h>

enum { GATHER_CRC = 1 };

/* One range to copy. The layout is part of the Python API (see _native.pyi). */
struct gather_entry {
    uint64_t source_offset;
    uint64_t slot_offset;
    uint64_t size;
    uint64_t pad;    /* zero bytes behind the copy */
    uint32_t source; /* index into the sources */
    uint32_t flags;  /* GATHER_CRC: the CRC-32C of copy and pad follows, 4 bytes little-endian */
};

struct gather {
    const uint64_t *sources; /* addresses; how much may be read there is the caller's promise */
    size_t source_count;
    const struct gather_entry *entries;
    size_t entry_count;
    uint8_t *slot;
    size_t slot_bytes;
};

/* Returns 0 if every entry stays inside the slot and names a source; else -1 and why in message. */
int gather_check(const struct gather *job, char *message, size_t message_size);

/* Does what the entries of a checked job say, on up to `threads` threads, the caller's among them. Entries must not
 * overlap in the slot. Returns 0, or ENOMEM with the slot untouched. Safe to call from several threads at once. */
int gather_run(const struct gather *job, unsigned threads);

/* Copies n bytes past the cache. The ranges must not overlap; copy_fence() must follow. */
void copy_streaming(void *dst, const void *src, size_t n);

/* Orders streaming stores of this thread before its later stores. */
void copy_fence(void);

#endif
