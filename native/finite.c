#include "finite.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "cpu.h"

/* NaN and infinity have all bits of the exponent set. Blocks are so short that a counter of the element's own width
 * cannot overflow: then the compiler keeps one counter in each lane of a vector register, whatever the register. */
enum { BLOCK_ELEMENTS = 1 << 14 };

#define COUNT_BLOCKS(type, exponent)                                       \
    while (n > 0) {                                                        \
        size_t block = n < BLOCK_ELEMENTS ? n : BLOCK_ELEMENTS;            \
        type found = 0;                                                    \
        for (size_t i = 0; i < block; i++) {                               \
            type bits;                                                     \
            memcpy(&bits, data + i * sizeof bits, sizeof bits);            \
            found = (type)(found + ((bits & (exponent)) == (exponent)));   \
        }                                                                  \
        total += found;                                                    \
        data += block * sizeof(type);                                      \
        n -= block;                                                        \
    }

static inline __attribute__((always_inline)) uint64_t count(const uint8_t *data, size_t n, enum float_kind kind)
{
    uint64_t total = 0;
    n /= kind == FLOAT64 ? 8 : kind == FLOAT32 ? 4 : 2;
    switch (kind) {
    case FLOAT16:
        COUNT_BLOCKS(uint16_t, 0x7c00)
        break;
    case BFLOAT16:
        COUNT_BLOCKS(uint16_t, 0x7f80)
        break;
    case FLOAT32:
        COUNT_BLOCKS(uint32_t, 0x7f800000)
        break;
    case FLOAT64:
        COUNT_BLOCKS(uint64_t, 0x7ff0000000000000)
        break;
    case FLOAT_KINDS:
        break;
    }
    return total;
}

static uint64_t count_portable(const uint8_t *data, size_t n, enum float_kind kind)
{
    return count(data, n, kind);
}

#if defined(__x86_64__)
/* The baseline, SSE2, cannot compare 64 bits at once. Wider registers than these bring nothing: memory is the limit. */
__attribute__((target("avx2"))) static uint64_t count_avx2(const uint8_t *data, size_t n, enum float_kind kind)
{
    return count(data, n, kind);
}
#endif

finite_function *finite_implementation(size_t number, const char **name)
{
    static const char *const names[] = {"portable", "avx2"};
    if (number > 1)
        return 0;
    *name = names[number];
    if (number == 0)
        return count_portable;
#if defined(__x86_64__)
    if (cpu_features() & CPU_AVX2)
        return count_avx2;
#endif
    return 0;
}

int finite_check(const struct float_range *ranges, size_t count, size_t n, char *message, size_t message_size)
{
    for (size_t i = 0; i < count; i++) {
        const struct float_range *range = &ranges[i];
        uint64_t width = range->kind == FLOAT64 ? 8 : range->kind == FLOAT32 ? 4 : 2;
        if (range->kind >= FLOAT_KINDS || range->reserved != 0) {
            snprintf(message, message_size, "range %zu: expected a kind below %d, found %" PRIu32, i, (int)FLOAT_KINDS,
                     range->kind);
            return -1;
        }
        if (range->offset > n || range->size > n - range->offset || range->size % width) {
            snprintf(message, message_size,
                     "range %zu: expected whole elements within %zu bytes, found %" PRIu64 " bytes at %" PRIu64, i, n,
                     range->size, range->offset);
            return -1;
        }
    }
    return 0;
}

uint64_t count_nonfinite(const void *data, const struct float_range *ranges, size_t count)
{
    const char *name;
    finite_function *best = finite_implementation(1, &name);
    if (best == 0)
        best = count_portable;
    uint64_t total = 0;
    for (size_t i = 0; i < count; i++)
        total += best((const uint8_t *)data + ranges[i].offset, (size_t)ranges[i].size, (enum float_kind)ranges[i].kind);
    return total;
}
