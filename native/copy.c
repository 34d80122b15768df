#include "copy.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crc32c.h"
#include "pool.h"
#include "x86.h"

/* Measured on 2 cores of a Zen 4 (benchmarks/bench_copy.py, 629 MB in 40 leaves into a warm memfd, median of 9):
 * with two threads 35.4 GB/s plain and 35.6 GB/s with CRC, where libc's memcpy takes the same bytes at 25.9 GB/s; with
 * one thread 18.1 and 18.4 against 13.8. Streaming stores make the difference: they do not read the lines that they
 * overwrite. Stores of 16, 32 and 64 bytes were equally fast (26 GB/s each, in one run), so there is only the one that
 * every x86-64 has. The CRC hides behind the memory if it is computed on the registers that are being stored (see
 * x86_copy_crc32c_vpclmul) or on short blocks (see crc32c_copy). */
_Static_assert(sizeof(struct gather_entry) == 40, "the layout is part of the Python API");

enum {
    CRC_BYTES = 4,
    PIECE_MAX = 2 << 20,  /* the tail of a job, when one thread waits for another, is at most one of these */
    PIECE_MIN = 64 << 10, /* below that, waking a thread costs more than it brings */
    PIECES_PER_THREAD = 8,
    ENTRY_COST = 256,       /* what an entry costs beside its bytes, as so many bytes copied */
    STREAM_ABOVE = 4 << 20, /* jobs smaller than this are left in the cache, where the writer finds them */
    STREAM_ENTRY = 4 << 10,
};

/* A run of whole entries, or a part of one. */
struct piece {
    size_t entry;
    size_t count;   /* 0: the part [begin, begin + size) of this entry's bytes and padding */
    uint64_t begin;
    uint64_t size;
    uint32_t crc;   /* of the part, starting from 0 */
};

struct run {
    const struct gather *job;
    struct piece *pieces;
    size_t piece_count;
    uint64_t piece_bytes;
    int streaming;
};

int gather_check(const struct gather *job, char *message, size_t message_size)
{
    for (size_t i = 0; i < job->entry_count; i++) {
        const struct gather_entry *entry = &job->entries[i];
        uint64_t room = entry->slot_offset <= job->slot_bytes ? job->slot_bytes - entry->slot_offset : 0;
        uint64_t tail = entry->flags & GATHER_CRC ? CRC_BYTES : 0;
        if (entry->flags & ~(uint32_t)GATHER_CRC) {
            snprintf(message, message_size, "entry %zu: expected flags 0 or 1, found %" PRIu32, i, entry->flags);
            return -1;
        }
        if (entry->source >= job->source_count) {
            snprintf(message, message_size, "entry %zu: expected a source below %zu, found %" PRIu32, i,
                     job->source_count, entry->source);
            return -1;
        }
        if (entry->slot_offset > job->slot_bytes || entry->size > room || entry->pad > room - entry->size ||
            tail > room - entry->size - entry->pad) {
            snprintf(message, message_size,
                     "entry %zu: expected an end within the slot's %zu bytes, found offset %" PRIu64 " + size %" PRIu64
                     " + pad %" PRIu64 " + checksum %" PRIu64,
                     i, job->slot_bytes, entry->slot_offset, entry->size, entry->pad, tail);
            return -1;
        }
        uint64_t address = job->sources[entry->source];
        if (entry->size > 0 && (address == 0 || entry->source_offset > UINTPTR_MAX - address ||
                                entry->size > UINTPTR_MAX - address - entry->source_offset)) {
            snprintf(message, message_size,
                     "entry %zu: expected a readable source %" PRIu32 ", found address %#" PRIx64 " + offset %" PRIu64
                     " + size %" PRIu64,
                     i, entry->source, address, entry->source_offset, entry->size);
            return -1;
        }
    }
    return 0;
}

static const uint8_t *source_of(const struct gather *job, const struct gather_entry *entry)
{
    return (const uint8_t *)(uintptr_t)(job->sources[entry->source] + entry->source_offset);
}

static void put_crc(const struct gather *job, const struct gather_entry *entry, uint32_t crc)
{
    uint8_t *at = job->slot + entry->slot_offset + entry->size + entry->pad;
    for (int i = 0; i < CRC_BYTES; i++)
        at[i] = (uint8_t)(crc >> 8 * i);
}

/* Copies the part [begin, begin + size) of an entry, padding included, and returns its CRC if the entry wants one. */
static uint32_t copy_part(const struct run *run, const struct gather_entry *entry, uint64_t begin, uint64_t size)
{
    uint8_t *dst = run->job->slot + entry->slot_offset + begin;
    uint64_t left = begin < entry->size ? entry->size - begin : 0;
    size_t n = left < size ? left : size;
    size_t zeros = size - n;
    int streaming = run->streaming && n >= STREAM_ENTRY;
    uint32_t crc = 0;
    if (n > 0) {
        const uint8_t *src = source_of(run->job, entry) + begin;
        if (entry->flags & GATHER_CRC)
            crc = crc32c_copy(dst, src, n, 0, streaming);
        else if (streaming)
            copy_streaming(dst, src, n);
        else
            memcpy(dst, src, n);
    }
    if (zeros > 0) {
        memset(dst + n, 0, zeros);
        if (entry->flags & GATHER_CRC)
            crc = crc32c_extend_zeros(crc, zeros);
    }
    return crc;
}

/* Small sources lie all over memory; asking for them early hides most of the wait. */
static void prefetch_source(const struct gather *job, const struct gather_entry *entry)
{
    const uint8_t *src = source_of(job, entry);
    for (size_t i = 0; i < entry->size && i < 512; i += 64)
        __builtin_prefetch(src + i);
}

static void copy_entries(const struct run *run, size_t first, size_t count)
{
    enum { AHEAD = 4 };
    const struct gather_entry *entries = run->job->entries;
    for (size_t i = first; i < first + count; i++) {
        if (i + AHEAD < first + count)
            prefetch_source(run->job, &entries[i + AHEAD]);
        uint32_t crc = copy_part(run, &entries[i], 0, entries[i].size + entries[i].pad);
        if (entries[i].flags & GATHER_CRC)
            put_crc(run->job, &entries[i], crc);
    }
}

static void copy_piece(void *context, size_t number)
{
    const struct run *run = context;
    struct piece *piece = &run->pieces[number];
    if (piece->count > 0)
        copy_entries(run, piece->entry, piece->count);
    else
        piece->crc = copy_part(run, &run->job->entries[piece->entry], piece->begin, piece->size);
    if (run->streaming)
        copy_fence();
}

static uint64_t cost_of(const struct gather_entry *entry)
{
    return entry->size + entry->pad + ENTRY_COST; /* cannot overflow: checked against the slot */
}

static void split_entry(struct run *run, size_t number)
{
    const struct gather_entry *entry = &run->job->entries[number];
    uint64_t whole = entry->size + entry->pad;
    for (uint64_t begin = 0; begin < whole; begin += run->piece_bytes) {
        uint64_t size = whole - begin < run->piece_bytes ? whole - begin : run->piece_bytes;
        run->pieces[run->piece_count++] = (struct piece){.entry = number, .begin = begin, .size = size};
    }
}

/* Gathers small entries into pieces of about piece_bytes, and splits large ones. */
static void plan_pieces(struct run *run)
{
    uint64_t cost = 0;
    struct piece *batch = NULL;
    for (size_t i = 0; i < run->job->entry_count; i++) {
        const struct gather_entry *entry = &run->job->entries[i];
        if (entry->size + entry->pad > run->piece_bytes + run->piece_bytes / 2) {
            split_entry(run, i);
            batch = NULL;
            continue;
        }
        if (batch == NULL || cost >= run->piece_bytes) {
            batch = &run->pieces[run->piece_count++];
            *batch = (struct piece){.entry = i};
            cost = 0;
        }
        batch->count++;
        cost += cost_of(entry);
    }
}

/* Joins the CRCs of the parts of split entries. */
static void join_parts(const struct run *run)
{
    const struct gather *job = run->job;
    uint32_t whole_shift = crc32c_shift_for(run->piece_bytes);
    uint32_t crc = 0;
    for (size_t i = 0; i < run->piece_count; i++) {
        const struct piece *part = &run->pieces[i];
        const struct gather_entry *entry = &job->entries[part->entry];
        if (part->count > 0 || !(entry->flags & GATHER_CRC))
            continue;
        uint32_t shift = part->size == run->piece_bytes ? whole_shift : crc32c_shift_for(part->size);
        crc = part->begin == 0 ? part->crc : crc32c_combine(crc, part->crc, shift);
        if (part->begin + part->size == entry->size + entry->pad)
            put_crc(job, entry, crc);
    }
}

static uint64_t choose_piece_bytes(uint64_t total_cost, unsigned threads)
{
    uint64_t share = total_cost / ((uint64_t)threads * PIECES_PER_THREAD);
    if (share < PIECE_MIN)
        return PIECE_MIN;
    return share < PIECE_MAX ? share & ~(uint64_t)4095 : PIECE_MAX;
}

int gather_run(const struct gather *job, unsigned threads)
{
    uint64_t total = 0;
    for (size_t i = 0; i < job->entry_count; i++)
        total += cost_of(&job->entries[i]);
    struct run run = {.job = job, .streaming = total >= STREAM_ABOVE};
    run.piece_bytes = choose_piece_bytes(total, threads ? threads : 1);
    size_t most = job->entry_count + (size_t)(total / run.piece_bytes) + 1;
    run.pieces = malloc(most * sizeof *run.pieces);
    if (run.pieces == NULL)
        return ENOMEM;
    plan_pieces(&run);
    pool_run(threads, run.piece_count, copy_piece, &run);
    join_parts(&run);
    free(run.pieces);
    return 0;
}

void copy_streaming(void *dst, const void *src, size_t n)
{
#if defined(__x86_64__)
    x86_copy_streaming(dst, src, n);
#else
    memcpy(dst, src, n);
#endif
}

void copy_fence(void)
{
#if defined(__x86_64__)
    x86_fence();
#endif
}
