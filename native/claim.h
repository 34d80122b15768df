#ifndef OFFSTEP_CLAIM_H
#define OFFSTEP_CLAIM_H

#include <stdint.h>

/* Replaces number by 0 in *cell and returns 1; returns 0 and changes nothing if another number is there. Of several
 * threads and processes that share the cell, one gets the 1. *cell is aligned. */
int claim(uint64_t *cell, uint64_t number);

#endif
