// Bringing parts of a file into the page cache, chunk by chunk, from a thread of the caller's.

#include "error.h"

#ifndef _WIN32

#include <cerrno>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 // Linux 5.14; older headers lack it
#endif

int32_t pyl_warm_range(int fd, int64_t offset, int64_t n_bytes, int64_t * n_bytes_resident) {
    return pyl_guard([&]() -> int32_t {
        const int64_t page  = sysconf(_SC_PAGESIZE);
        const int64_t start = offset / page * page;
        const size_t  len   = size_t(offset + n_bytes - start);
        void * addr = mmap(nullptr, len, PROT_READ, MAP_SHARED, fd, start);
        if (addr == MAP_FAILED) {
            pyl_set_error(std::string("mmap: ") + strerror(errno));
            return PYL_ERROR;
        }
        std::vector<unsigned char> is_resident((len + page - 1) / page);
        int64_t n_resident = 0;
#ifdef __APPLE__
        const int rc = mincore(static_cast<caddr_t>(addr), len, reinterpret_cast<char *>(is_resident.data()));
#else
        const int rc = mincore(addr, len, is_resident.data());
#endif
        if (rc == 0) {
            for (unsigned char flag : is_resident) {
                n_resident += flag & 1;
            }
        }
        *n_bytes_resident = n_resident * page;
        if (n_resident < int64_t(is_resident.size()) && madvise(addr, len, MADV_POPULATE_READ) != 0) {
            volatile unsigned char sink = 0;
            for (size_t i = 0; i < len; i += page) {
                sink = static_cast<volatile unsigned char *>(addr)[i];
            }
            (void) sink;
        }
        munmap(addr, len);
        return PYL_OK;
    });
}

#else

int32_t pyl_warm_range(int, int64_t, int64_t, int64_t *) {
    pyl_set_error("warming pages is not supported on this system");
    return PYL_ERROR;
}

#endif
