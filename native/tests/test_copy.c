#include "copy.h"

#include <pthread.h>
#include <string.h>

#include "check.h"
#include "crc32c.h"
#include "pool.h"

enum { SOURCES = 64, MESSAGE = 256 };

/* A job with its memory, made from a seed. The slot has guard bytes between the entries. */
struct fixture {
    struct gather job;
    uint8_t *memory;
    uint64_t sources[SOURCES];
    struct gather_entry entries[SOURCES];
};

static uint32_t next_random(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static uint64_t random_size(uint32_t *state, uint64_t largest)
{
    uint64_t size = next_random(state) % 5 ? next_random(state) % 300 : next_random(state) % (largest + 1);
    return next_random(state) % 10 ? size : 0;
}

static void make_fixture(struct fixture *fixture, uint32_t seed, uint64_t largest)
{
    uint64_t used = 0;
    uint64_t source_bytes = largest + 64;
    for (size_t i = 0; i < SOURCES; i++) {
        struct gather_entry *entry = &fixture->entries[i];
        entry->source_offset = next_random(&seed) % 64;
        entry->size = random_size(&seed, largest);
        entry->pad = next_random(&seed) % 3 ? 0 : random_size(&seed, largest / 4);
        entry->source = next_random(&seed) % 3;
        entry->flags = next_random(&seed) % 2;
        entry->slot_offset = used + 1 + next_random(&seed) % 90;
        used = entry->slot_offset + entry->size + entry->pad + 4;
    }
    fixture->memory = malloc(3 * source_bytes + used + 1);
    CHECK(fixture->memory != NULL);
    for (size_t i = 0; i < 3 * source_bytes; i++)
        fixture->memory[i] = (uint8_t)(i * 2654435761u >> 12);
    for (size_t i = 0; i < 3; i++)
        fixture->sources[i] = (uint64_t)(uintptr_t)(fixture->memory + i * source_bytes);
    fixture->job = (struct gather){
        .sources = fixture->sources,
        .source_count = 3,
        .entries = fixture->entries,
        .entry_count = SOURCES,
        .slot = fixture->memory + 3 * source_bytes,
        .slot_bytes = used + 1,
    };
    memset(fixture->job.slot, 0xEE, used + 1);
}

static void check_guards(const struct gather *job, uint64_t begin, uint64_t end)
{
    for (uint64_t i = begin; i < end; i++)
        CHECK(job->slot[i] == 0xEE);
}

static void check_entry(const struct gather *job, const struct gather_entry *entry)
{
    const uint8_t *at = job->slot + entry->slot_offset;
    const uint8_t *source = (const uint8_t *)(uintptr_t)job->sources[entry->source] + entry->source_offset;
    CHECK(memcmp(at, source, entry->size) == 0);
    for (uint64_t i = 0; i < entry->pad; i++)
        CHECK(at[entry->size + i] == 0);
    if (entry->flags & GATHER_CRC) {
        uint64_t whole = entry->size + entry->pad;
        uint32_t crc = crc32c_extend(0, at, whole);
        for (int i = 0; i < 4; i++)
            CHECK(at[whole + i] == (uint8_t)(crc >> 8 * i));
    }
}

static void check_slot(const struct gather *job)
{
    uint64_t end = 0;
    for (size_t i = 0; i < job->entry_count; i++) {
        const struct gather_entry *entry = &job->entries[i];
        check_guards(job, end, entry->slot_offset);
        check_entry(job, entry);
        end = entry->slot_offset + entry->size + entry->pad + (entry->flags & GATHER_CRC ? 4 : 0);
    }
    check_guards(job, end, job->slot_bytes);
}

static void gather_once(uint32_t seed, uint64_t largest, unsigned threads)
{
    struct fixture fixture;
    char message[MESSAGE];
    make_fixture(&fixture, seed, largest);
    CHECK(gather_check(&fixture.job, message, sizeof message) == 0);
    CHECK(gather_run(&fixture.job, threads) == 0);
    check_slot(&fixture.job);
    free(fixture.memory);
}

static void slots_hold_what_the_entries_say(void)
{
    static const uint64_t largest[] = {300, 20000, 700000};
    for (uint32_t seed = 1; seed < 10; seed++)
        for (size_t i = 0; i < sizeof largest / sizeof *largest; i++)
            gather_once(seed, largest[i], 1 + seed % 4);
    gather_once(99, 9 << 20, 3);
}

static void *gather_often(void *seed)
{
    for (uint32_t i = 0; i < 5; i++)
        gather_once((uint32_t)(uintptr_t)seed + i, 200000, 2);
    return NULL;
}

static void gathers_may_run_side_by_side(void)
{
    pthread_t threads[3];
    for (uintptr_t i = 0; i < 3; i++)
        CHECK(pthread_create(&threads[i], NULL, gather_often, (void *)(i * 1000)) == 0);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
}

static void check_refused(struct gather_entry entry, const char *expected)
{
    uint8_t slot[100];
    uint64_t source = (uint64_t)(uintptr_t)slot;
    struct gather_entry entries[2] = {{.size = 1}, entry};
    struct gather job = {.sources = &source, .source_count = 1, .entries = entries, .entry_count = 2, .slot = slot,
                         .slot_bytes = sizeof slot};
    char message[MESSAGE];
    CHECK(gather_check(&job, message, sizeof message) == -1);
    CHECK(strstr(message, "entry 1: ") == message);
    CHECK(strstr(message, expected) != NULL);
}

static void bad_entries_are_refused(void)
{
    check_refused((struct gather_entry){.size = 101}, "100 bytes");
    check_refused((struct gather_entry){.slot_offset = 101}, "offset 101");
    check_refused((struct gather_entry){.slot_offset = 97, .flags = 1}, "checksum 4");
    check_refused((struct gather_entry){.size = 50, .pad = 51}, "pad 51");
    check_refused((struct gather_entry){.slot_offset = 50, .size = UINT64_MAX - 20}, "size 18446744073709551595");
    check_refused((struct gather_entry){.size = 50, .pad = UINT64_MAX - 20}, "pad 18446744073709551595");
    check_refused((struct gather_entry){.source = 1}, "source below 1, found 1");
    check_refused((struct gather_entry){.flags = 2}, "flags 0 or 1, found 2");
    check_refused((struct gather_entry){.size = 1, .source_offset = UINT64_MAX}, "readable source 0");
}

int main(void)
{
    slots_hold_what_the_entries_say();
    gathers_may_run_side_by_side();
    bad_entries_are_refused();
    pool_stop();
    return 0;
}
