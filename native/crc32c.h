#ifndef OFFSTEP_CRC32C_H
#define OFFSTEP_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* CRC-32C (Castagnoli), as in RFC 3720 and zarr's `crc32c` codec: reflected, initial and final value all ones.
 * All functions take and return finished values, so that 0 is the CRC of nothing, and are safe from any thread. */

/* Returns the CRC of the bytes behind `crc` followed by the n bytes at data. */
uint32_t crc32c_extend(uint32_t crc, const void *data, size_t n);

/* Copies n bytes from src to dst and returns their CRC, continuing from crc (0 to start). The ranges must not
 * overlap. With `streaming` the copy bypasses the cache; call copy_fence() before handing dst to another thread. */
uint32_t crc32c_copy(void *dst, const void *src, size_t n, uint32_t crc, int streaming);

/* Returns the CRC of the bytes behind `crc` followed by n zero bytes, in O(log n). */
uint32_t crc32c_extend_zeros(uint32_t crc, uint64_t n);

/* The operator that appends n bytes; worth keeping when many parts have the same length. */
uint32_t crc32c_shift_for(uint64_t n);

/* Returns the CRC of the concatenation of two parts, given shift = crc32c_shift_for(length of the second). */
uint32_t crc32c_combine(uint32_t first, uint32_t second, uint32_t shift);

/* Every implementation that this machine can run, for the tests: returns 0 behind the last. */
typedef uint32_t crc32c_function(uint32_t state, const uint8_t *data, size_t n);
crc32c_function *crc32c_implementation(size_t number, const char **name);

#endif
