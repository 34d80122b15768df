#include "fletcher.h"

#include <string.h>

/* HDF5 sums 16-bit words, the first byte of each being the upper one, modulo 65535 with 65535 in the place of 0 unless
 * all is zero. Modulo 65535 swapping the bytes of a word is multiplying it by 256, so the words are summed as they lie
 * in memory, and only the sums are swapped. LANES words are summed side by side, which compilers turn into vector
 * instructions; 32 bits hold the sums of the sums of 361 rows. */
enum { LANES = 32, ROWS = 256 };

static uint64_t fold(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xFFFF) + (sum >> 16);
    return sum;
}

static uint64_t swap(uint64_t word)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    return (word >> 8 | word << 8) & 0xFFFF;
#else
    return word;
#endif
}

struct sums {
    uint64_t first, second;
};

static struct sums add_rows(struct sums sums, const uint8_t *data, size_t rows)
{
    uint32_t first[LANES] = {0}, second[LANES] = {0};
    for (size_t row = 0; row < rows; row++) {
        uint16_t words[LANES];
        memcpy(words, data + row * sizeof words, sizeof words);
        for (size_t lane = 0; lane < LANES; lane++) {
            first[lane] += words[lane];
            second[lane] += first[lane];
        }
    }
    uint64_t total = 0, weighted = 0;
    for (size_t lane = 0; lane < LANES; lane++) {
        total += first[lane];
        weighted += (uint64_t)LANES * second[lane] - lane * first[lane];
    }
    sums.second = fold(sums.second + rows * LANES * sums.first + weighted);
    sums.first = fold(sums.first + total);
    return sums;
}

static struct sums add_word(struct sums sums, const uint8_t *data, size_t n)
{
    uint16_t word = 0;
    memcpy(&word, data, n);
    sums.first += word;
    sums.second += sums.first;
    return sums;
}

uint32_t fletcher32_extend(uint32_t sum, const void *data, size_t n)
{
    const size_t row_bytes = LANES * sizeof(uint16_t);
    const uint8_t *at = data;
    struct sums sums = {swap(sum & 0xFFFF), swap(sum >> 16)};
    while (n >= row_bytes) {
        size_t rows = n / row_bytes < ROWS ? n / row_bytes : ROWS;
        sums = add_rows(sums, at, rows);
        at += rows * row_bytes;
        n -= rows * row_bytes;
    }
    for (; n >= 2; at += 2, n -= 2)
        sums = add_word(sums, at, 2);
    if (n)
        sums = add_word(sums, at, 1);
    return (uint32_t)(swap(fold(sums.second)) << 16 | swap(fold(sums.first)));
}
