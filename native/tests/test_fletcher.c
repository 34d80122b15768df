#include "fletcher.h"

#include <string.h>

#include "check.h"

/* H5_checksum_fletcher32 of HDF5, word by word. */
static uint32_t one_by_one(const uint8_t *data, size_t n)
{
    uint32_t first = 0, second = 0;
    for (size_t i = 0; i < n; i += 2) {
        first += (uint32_t)data[i] << 8 | (i + 1 < n ? data[i + 1] : 0u);
        first = (first & 0xFFFF) + (first >> 16);
        second += first;
        second = (second & 0xFFFF) + (second >> 16);
    }
    return second << 16 | first;
}

enum { MOST = 200000 };

static uint8_t data[MOST];

static void check_lengths(void)
{
    for (size_t n = 0; n < 300; n++)
        CHECK(fletcher32_extend(0, data + n % 3, n) == one_by_one(data + n % 3, n));
    for (size_t n = 16000; n < MOST; n = n * 5 / 3 + 1)
        CHECK(fletcher32_extend(0, data, n) == one_by_one(data, n));
}

static void check_parts(void)
{
    for (size_t first = 0; first < 40000; first = first * 3 + 2)
        CHECK(fletcher32_extend(fletcher32_extend(0, data, first), data + first, 50001 - first) ==
              one_by_one(data, 50001));
}

int main(void)
{
    check_lengths(); /* zeros */
    memset(data, 0xFF, MOST);
    check_lengths(); /* as large as sums become */
    for (size_t i = 0; i < MOST; i++)
        data[i] = (uint8_t)(i * 2654435761u >> 13);
    check_lengths();
    check_parts();
    return 0;
}
