#include "claim.h"

#include <stdatomic.h>

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "a lock would be this process's own");

int claim(uint64_t *cell, uint64_t number)
{
    return atomic_compare_exchange_strong((_Atomic uint64_t *)cell, &number, 0);
}
