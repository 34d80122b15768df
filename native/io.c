#include "io.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include "pool.h"

/* One madvise call holds the lock of the address space against mmap and munmap, so it is kept short. */
enum { PREFAULT_STRIPE = 16 << 20 };

struct prefault_job {
    uint8_t *data;
    size_t n;
    uintptr_t first_page;
    size_t page;
    int populates;
    atomic_int error;
};

static void keep_first_error(atomic_int *kept, int error)
{
    int none = 0;
    atomic_compare_exchange_strong(kept, &none, error);
}

/* A write fault that changes nothing, even while another thread writes the same byte. */
static void touch(uint8_t *byte)
{
    atomic_fetch_or_explicit((_Atomic uint8_t *)byte, 0, memory_order_relaxed);
}

static void touch_pages(const struct prefault_job *job, uintptr_t begin, uintptr_t end)
{
    uintptr_t data = (uintptr_t)job->data;
    for (uintptr_t page = begin; page < end; page += job->page)
        touch((uint8_t *)(page < data ? data : page));
}

#ifdef MADV_POPULATE_WRITE
static int can_populate(void)
{
    return madvise(NULL, 0, MADV_POPULATE_WRITE) == 0; /* an empty range, but an old kernel refuses the advice */
}

static int populate(uintptr_t begin, uintptr_t end)
{
    while (madvise((void *)begin, end - begin, MADV_POPULATE_WRITE) != 0)
        if (errno != EINTR && errno != EAGAIN)
            return errno;
    return 0;
}
#else
static int can_populate(void)
{
    return 0;
}

static int populate(uintptr_t begin, uintptr_t end)
{
    (void)begin, (void)end;
    return EINVAL;
}
#endif

static void prefault_stripe(void *context, size_t stripe)
{
    struct prefault_job *job = context;
    uintptr_t end = (uintptr_t)job->data + job->n;
    uintptr_t begin = job->first_page + stripe * (uintptr_t)PREFAULT_STRIPE;
    if (end - begin > PREFAULT_STRIPE)
        end = begin + PREFAULT_STRIPE;
    if (atomic_load(&job->error))
        return;
    int error = 0;
    if (job->populates)
        error = populate(begin, end);
    else
        touch_pages(job, begin, end);
    if (error)
        keep_first_error(&job->error, error);
}

int prefault(void *data, size_t n, unsigned threads)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    struct prefault_job job = {.data = data, .n = n, .page = page, .populates = can_populate()};
    if (n == 0)
        return 0;
    job.first_page = (uintptr_t)data & ~(uintptr_t)(page - 1);
    size_t covered = (uintptr_t)data + n - job.first_page;
#ifdef MADV_HUGEPAGE
    (void)madvise((void *)job.first_page, covered, MADV_HUGEPAGE); /* a wish: small pages serve as well */
#endif
    pool_run_apart(threads, (covered - 1) / PREFAULT_STRIPE + 1, prefault_stripe, &job);
    return atomic_load(&job.error);
}

struct write_job {
    int fd;
    const uint8_t *data;
    size_t n;
    off_t offset;
    size_t block_bytes;
    atomic_int error;
};

static int write_fully(int fd, const uint8_t *data, size_t n, off_t offset)
{
    while (n > 0) {
        ssize_t wrote = pwrite(fd, data, n, offset);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote < 0)
            return errno;
        if (wrote == 0)
            return EIO; /* no progress and no reason given: trying again might never end */
        data += wrote;
        n -= (size_t)wrote;
        offset += wrote;
    }
    return 0;
}

static void write_block(void *context, size_t block)
{
    struct write_job *job = context;
    size_t begin = block * job->block_bytes;
    size_t n = job->n - begin < job->block_bytes ? job->n - begin : job->block_bytes;
    if (atomic_load(&job->error))
        return;
    int error = write_fully(job->fd, job->data + begin, n, job->offset + (off_t)begin);
    if (error)
        keep_first_error(&job->error, error);
}

int write_at(int fd, const void *data, size_t n, off_t offset, size_t block_bytes, unsigned threads)
{
    struct write_job job = {.fd = fd, .data = data, .n = n, .offset = offset, .block_bytes = block_bytes};
    if (n > 0)
        pool_run_apart(threads, (n - 1) / block_bytes + 1, write_block, &job);
    return atomic_load(&job.error);
}

int rename_exchange(int directory, const char *first, const char *second)
{
#ifdef SYS_renameat2
    enum { EXCHANGE = 2 }; /* RENAME_EXCHANGE */
    return syscall(SYS_renameat2, directory, first, directory, second, EXCHANGE) ? errno : 0;
#else
    (void)directory, (void)first, (void)second;
    return ENOSYS;
#endif
}
