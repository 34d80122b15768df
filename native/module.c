/* offstep._native: the Python face of the C code. The only file that knows Python. */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "claim.h"
#include "copy.h"
#include "cpu.h"
#include "crc32c.h"
#include "exit.h"
#include "finite.h"
#include "fletcher.h"
#include "io.h"
#include "pool.h"

/* Below this, giving up the GIL costs more than holding it. */
enum { KEEP_GIL_BELOW = 16 << 10 };

static int is_thread_count(int threads)
{
    if (threads >= 1 && threads <= POOL_MAX_THREADS)
        return 1;
    PyErr_Format(PyExc_ValueError, "threads: expected 1 to %d, found %d", POOL_MAX_THREADS, threads);
    return 0;
}

static PyObject *none_or_oserror(int error)
{
    if (error == 0)
        Py_RETURN_NONE;
    if (error == ENOMEM)
        return PyErr_NoMemory();
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* Returns the addresses in a sequence of ints (free() them), or NULL with an exception. */
static uint64_t *read_addresses(PyObject *sequence, size_t *count)
{
    Py_ssize_t length = PySequence_Size(sequence);
    if (length < 0)
        return NULL;
    uint64_t *addresses = malloc((size_t)length * sizeof *addresses + 1);
    if (addresses == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < length; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        PyObject *number = item ? PyNumber_Index(item) : NULL; /* NumPy's integers too */
        addresses[i] = number ? PyLong_AsUnsignedLongLong(number) : 0;
        Py_XDECREF(number);
        Py_XDECREF(item);
        if (PyErr_Occurred()) {
            free(addresses);
            return NULL;
        }
    }
    *count = (size_t)length;
    return addresses;
}

/* Returns the entries in a buffer (free() them), or NULL with an exception. A copy, so that nobody can change an entry
 * between its check and its use. */
static struct gather_entry *read_entries(const Py_buffer *buffer, size_t *count)
{
    size_t size = (size_t)buffer->len;
    if (size % sizeof(struct gather_entry)) {
        PyErr_Format(PyExc_ValueError, "entries: expected a multiple of %zu bytes, found %zu",
                     sizeof(struct gather_entry), size);
        return NULL;
    }
    struct gather_entry *entries = malloc(size + 1);
    if (entries == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    memcpy(entries, buffer->buf, size);
    *count = size / sizeof *entries;
    return entries;
}

static PyObject *run_gather(const struct gather *job, unsigned threads)
{
    char message[256];
    int error = 0;
    int refused;
    Py_BEGIN_ALLOW_THREADS
    refused = gather_check(job, message, sizeof message);
    if (!refused)
        error = gather_run(job, threads);
    Py_END_ALLOW_THREADS
    if (refused) {
        PyErr_SetString(PyExc_ValueError, message);
        return NULL;
    }
    return none_or_oserror(error);
}

static PyObject *native_gather(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sources", "entries", "slot", "threads", NULL};
    PyObject *sequence;
    Py_buffer entries = {0}, slot = {0};
    int threads;
    PyObject *result = NULL;
    uint64_t *addresses = NULL;
    struct gather_entry *copy = NULL;
    struct gather job = {0};
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Oy*w*i:gather", names, &sequence, &entries, &slot, &threads))
        return NULL;
    if (!is_thread_count(threads))
        goto out;
    addresses = read_addresses(sequence, &job.source_count);
    copy = addresses ? read_entries(&entries, &job.entry_count) : NULL;
    if (copy == NULL)
        goto out;
    job.sources = addresses;
    job.entries = copy;
    job.slot = slot.buf;
    job.slot_bytes = (size_t)slot.len;
    result = run_gather(&job, (unsigned)threads);
out:
    free(copy);
    free(addresses);
    PyBuffer_Release(&slot);
    PyBuffer_Release(&entries);
    return result;
}

/* Continues a checksum of 32 bits; `names` are those of the two arguments, the second of which is 0 unless given. */
static PyObject *run_checksum(PyObject *args, PyObject *kwargs, const char *format, char **names,
                              uint32_t (*extend)(uint32_t, const void *, size_t))
{
    Py_buffer data;
    PyObject *start = NULL;
    unsigned long sum = 0;
    PyObject *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, &data, &start))
        return NULL;
    if (start != NULL)
        sum = PyLong_AsUnsignedLong(start);
    if (PyErr_Occurred())
        goto out;
    if (sum > UINT32_MAX) {
        PyErr_Format(PyExc_OverflowError, "%s: expected at most 32 bits, found %lu", names[1], sum);
        goto out;
    }
    if (data.len < KEEP_GIL_BELOW) {
        sum = extend((uint32_t)sum, data.buf, (size_t)data.len);
    } else {
        Py_BEGIN_ALLOW_THREADS
        sum = extend((uint32_t)sum, data.buf, (size_t)data.len);
        Py_END_ALLOW_THREADS
    }
    result = PyLong_FromUnsignedLong(sum);
out:
    PyBuffer_Release(&data);
    return result;
}

static PyObject *native_crc32c(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", "crc", NULL};
    (void)module;
    return run_checksum(args, kwargs, "y*|O:crc32c", names, crc32c_extend);
}

static PyObject *native_fletcher32(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", "checksum", NULL};
    (void)module;
    return run_checksum(args, kwargs, "y*|O:fletcher32", names, fletcher32_extend);
}

/* Returns the ranges in a buffer (free() them), or NULL with an exception; a copy, as for entries. */
static struct float_range *read_ranges(const Py_buffer *buffer, size_t *count)
{
    size_t size = (size_t)buffer->len;
    if (size % sizeof(struct float_range)) {
        PyErr_Format(PyExc_ValueError, "ranges: expected a multiple of %zu bytes, found %zu",
                     sizeof(struct float_range), size);
        return NULL;
    }
    struct float_range *ranges = malloc(size + 1);
    if (ranges == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    memcpy(ranges, buffer->buf, size);
    *count = size / sizeof *ranges;
    return ranges;
}

static PyObject *native_count_nonfinite(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", "ranges", NULL};
    Py_buffer data = {0}, buffer = {0};
    struct float_range *ranges;
    size_t count;
    uint64_t found = 0;
    char message[256];
    int refused;
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y*y*:count_nonfinite", names, &data, &buffer))
        return NULL;
    ranges = read_ranges(&buffer, &count);
    if (ranges == NULL)
        goto out;
    Py_BEGIN_ALLOW_THREADS
    refused = finite_check(ranges, count, (size_t)data.len, message, sizeof message);
    if (!refused)
        found = count_nonfinite(data.buf, ranges, count);
    Py_END_ALLOW_THREADS
    if (refused)
        PyErr_SetString(PyExc_ValueError, message);
    else
        result = PyLong_FromUnsignedLongLong(found);
    free(ranges);
out:
    PyBuffer_Release(&buffer);
    PyBuffer_Release(&data);
    return result;
}

static PyObject *native_prefault(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"slot", "threads", NULL};
    Py_buffer slot;
    int threads;
    PyObject *result = NULL;
    int error;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "w*i:prefault", names, &slot, &threads))
        return NULL;
    if (!is_thread_count(threads))
        goto out;
    Py_BEGIN_ALLOW_THREADS
    error = prefault(slot.buf, (size_t)slot.len, (unsigned)threads);
    Py_END_ALLOW_THREADS
    result = none_or_oserror(error);
out:
    PyBuffer_Release(&slot);
    return result;
}

static int is_write_range(long long offset, Py_ssize_t size, Py_ssize_t block_bytes)
{
    if (offset < 0 || offset > INT64_MAX - size) {
        PyErr_Format(PyExc_ValueError, "offset: expected 0 to %lld, found %lld", (long long)(INT64_MAX - size), offset);
        return 0;
    }
    if (block_bytes < 1) {
        PyErr_Format(PyExc_ValueError, "block_bytes: expected at least 1, found %zd", block_bytes);
        return 0;
    }
    return 1;
}

static PyObject *native_write_at(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "data", "offset", "block_bytes", "threads", NULL};
    int fd, threads, error;
    Py_buffer data;
    long long offset;
    Py_ssize_t block_bytes;
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iy*Lni:write_at", names, &fd, &data, &offset, &block_bytes,
                                     &threads))
        return NULL;
    if (!is_thread_count(threads) || !is_write_range(offset, data.len, block_bytes))
        goto out;
    Py_BEGIN_ALLOW_THREADS
    error = write_at(fd, data.buf, (size_t)data.len, (off_t)offset, (size_t)block_bytes, (unsigned)threads);
    Py_END_ALLOW_THREADS
    result = none_or_oserror(error);
out:
    PyBuffer_Release(&data);
    return result;
}

static PyObject *native_rename_exchange(PyObject *module, PyObject *args)
{
    PyObject *first = NULL, *second = NULL;
    PyObject *result = NULL;
    int directory = AT_FDCWD;
    int error;
    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&|i:rename_exchange", PyUnicode_FSConverter, &first, PyUnicode_FSConverter,
                          &second, &directory))
        return NULL;
    const char *first_path = PyBytes_AsString(first);
    const char *second_path = PyBytes_AsString(second);
    Py_BEGIN_ALLOW_THREADS
    error = rename_exchange(directory, first_path, second_path);
    Py_END_ALLOW_THREADS
    if (error) {
        errno = error;
        PyErr_SetFromErrnoWithFilenameObjects(PyExc_OSError, first, second);
    } else {
        result = Py_NewRef(Py_None);
    }
    Py_DECREF(second);
    Py_DECREF(first);
    return result;
}

static PyObject *native_claim(PyObject *module, PyObject *args)
{
    Py_buffer cell;
    unsigned long long number;
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "w*K:claim", &cell, &number))
        return NULL;
    if ((size_t)cell.len < sizeof(uint64_t) || (uintptr_t)cell.buf % sizeof(uint64_t))
        PyErr_Format(PyExc_ValueError, "cell: expected 8 aligned bytes or more, found %zd", cell.len);
    else
        result = PyBool_FromLong(claim(cell.buf, number));
    PyBuffer_Release(&cell);
    return result;
}

static PyObject *native_fail_exit(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    fail_exit();
    Py_RETURN_NONE;
}

static PyObject *native_cpu_features(PyObject *module, PyObject *unused)
{
    char text[64];
    (void)module, (void)unused;
    cpu_describe(cpu_features(), text, sizeof text);
    return PyUnicode_FromString(text);
}

#define WITH_KEYWORDS(function) ((PyCFunction)(void (*)(void))(function)), METH_VARARGS | METH_KEYWORDS

static PyMethodDef methods[] = {
    {"gather", WITH_KEYWORDS(native_gather),
     PyDoc_STR("gather(sources, entries, slot, threads)\n--\n\nCopies ranges of many buffers into one slot.")},
    {"crc32c", WITH_KEYWORDS(native_crc32c),
     PyDoc_STR("crc32c(data, crc=0)\n--\n\nReturns the CRC-32C of data, continuing from crc.")},
    {"fletcher32", WITH_KEYWORDS(native_fletcher32),
     PyDoc_STR("fletcher32(data, checksum=0)\n--\n\nReturns HDF5's Fletcher-32 of data, continuing from a checksum.")},
    {"count_nonfinite", WITH_KEYWORDS(native_count_nonfinite),
     PyDoc_STR("count_nonfinite(data, ranges)\n--\n\nCounts the elements that are NaN or infinite.")},
    {"prefault", WITH_KEYWORDS(native_prefault),
     PyDoc_STR("prefault(slot, threads)\n--\n\nMakes all pages of the slot present without changing a byte.")},
    {"write_at", WITH_KEYWORDS(native_write_at),
     PyDoc_STR("write_at(fd, data, offset, block_bytes, threads)\n--\n\nWrites all of data at offset of fd.")},
    {"rename_exchange", native_rename_exchange, METH_VARARGS,
     PyDoc_STR("rename_exchange(first, second, directory=AT_FDCWD, /)\n--\n\nSwaps two paths atomically.")},
    {"claim", native_claim, METH_VARARGS,
     PyDoc_STR("claim(cell, number, /)\n--\n\nReplaces number by 0 in the cell, and returns whether it was there.")},
    {"fail_exit", native_fail_exit, METH_NOARGS,
     PyDoc_STR("fail_exit()\n--\n\nMakes this process end with status 1 where it would end with 0.")},
    {"cpu_features", native_cpu_features, METH_NOARGS,
     PyDoc_STR("cpu_features()\n--\n\nNames the instruction sets that are used here.")},
    {NULL, NULL, 0, NULL},
};

static void stop_helpers(void *module)
{
    (void)module;
    pool_stop();
}

static PyModuleDef_Slot slots[] = {{0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "offstep._native",
    .m_doc = PyDoc_STR("Copies, checksums and writes for offstep."),
    .m_methods = methods,
    .m_slots = slots,
    .m_free = stop_helpers,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
