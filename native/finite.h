#ifndef OFFSTEP_FINITE_H
#define OFFSTEP_FINITE_H

#include <stddef.h>
#include <stdint.h>

/* How the elements of a range look. The numbers are part of the Python API (see _native.pyi). */
enum float_kind { FLOAT16 = 0, BFLOAT16 = 1, FLOAT32 = 2, FLOAT64 = 3, FLOAT_KINDS = 4 };

/* One range to count in. The layout is part of the Python API. */
struct float_range {
    uint64_t offset;
    uint64_t size;     /* bytes, a multiple of the element's */
    uint32_t kind;     /* enum float_kind */
    uint32_t reserved; /* 0 */
};

/* Returns 0 if every range lies inside n bytes and holds whole elements of a known kind; else -1 and why in message. */
int finite_check(const struct float_range *ranges, size_t count, size_t n, char *message, size_t message_size);

/* Returns how many elements of the checked ranges are NaN or infinite. Little-endian elements at any address. Safe from
 * any thread. */
uint64_t count_nonfinite(const void *data, const struct float_range *ranges, size_t count);

/* Every implementation that this machine can run, for the tests: returns 0 behind the last. */
typedef uint64_t finite_function(const uint8_t *data, size_t n, enum float_kind kind);
finite_function *finite_implementation(size_t number, const char **name);

#endif
