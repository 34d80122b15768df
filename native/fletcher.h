#ifndef OFFSTEP_FLETCHER_H
#define OFFSTEP_FLETCHER_H

#include <stddef.h>
#include <stdint.h>

/* Returns the Fletcher-32 checksum, as HDF5's filter of that name computes it (H5checksum.c), of the bytes behind `sum`
 * (0 to start) followed by the n bytes at data. Only the last of several parts may have an odd length. Safe from any
 * thread. */
uint32_t fletcher32_extend(uint32_t sum, const void *data, size_t n);

#endif
