#ifndef OFFSTEP_IO_H
#define OFFSTEP_IO_H

#include <stddef.h>
#include <sys/types.h>

/* Makes every page of [data, data + n) present and writable without changing a byte, in huge pages where the system
 * grants them. Returns 0 or an errno value. */
int prefault(void *data, size_t n, unsigned threads);

/* Writes n bytes at `offset` of fd in blocks of block_bytes, `threads` of them in flight. Retries interrupted and
 * short writes. Returns 0 or the errno value of the first failure; what was written by then is unspecified. */
int write_at(int fd, const void *data, size_t n, off_t offset, size_t block_bytes, unsigned threads);

/* Swaps two paths atomically; relative ones begin at the descriptor `directory`, or at the working directory if that is
 * AT_FDCWD. Returns 0 or an errno value; ENOSYS where the system cannot. */
int rename_exchange(int directory, const char *first, const char *second);

#endif
