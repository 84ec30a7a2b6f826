// What is announced of experts that lie in a mapped file, and how much of it is counted as missing.

#include "check.h"

#include "../ggml/cpu/dsv4-paging.h"
#include "ggml.h"

#include <cstdio>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

static constexpr int64_t MATRIX    = 1 << 20; // bytes, a multiple of the page
static constexpr int64_t N_EXPERTS = 8;

struct file {
    FILE * stream;
    char * data;

    file() {
        stream = tmpfile();
        const int fd = fileno(stream);
        const std::vector<char> bytes(3*N_EXPERTS*MATRIX, 1);
        CHECK(write(fd, bytes.data(), bytes.size()) == (ssize_t) bytes.size(), "write");
        CHECK(fsync(fd) == 0, "fsync");
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        data = (char *) mmap(nullptr, bytes.size(), PROT_READ, MAP_SHARED, fd, 0);
    }
    ~file() {
        munmap(data, 3*N_EXPERTS*MATRIX);
        fclose(stream);
    }
};

static int64_t announced(const ggml_tensor * w, int32_t expert, int32_t n_chosen, int64_t * n_missing) {
    const dsv4_paging_counts before = dsv4_paging_get_counts();
    dsv4_paging_announce(w, expert, n_chosen);
    const dsv4_paging_counts after = dsv4_paging_get_counts();
    *n_missing = after.n_bytes_missing - before.n_bytes_missing;
    return after.n_bytes - before.n_bytes;
}

int main() {
    file f;
    ggml_tensor w[3] = {};
    const ggml_tensor * of_layer[3] = { &w[0], &w[1], &w[2] };
    for (int i = 0; i < 3; i++) {
        w[i].type = GGML_TYPE_I8;
        w[i].data = f.data + i*N_EXPERTS*MATRIX;
        w[i].ne[0] = 1024;
        w[i].ne[1] = MATRIX/1024;
        w[i].ne[2] = N_EXPERTS;
        w[i].ne[3] = 1;
        w[i].nb[0] = 1;
        w[i].nb[1] = 1024;
        w[i].nb[2] = MATRIX;
        w[i].nb[3] = N_EXPERTS*MATRIX;
    }
    unsigned char is_resident = 1;
    mincore(f.data, 1, &is_resident);
    const bool can_drop = !(is_resident & 1); // a folder in memory keeps its pages

    int64_t missing;
    CHECK(announced(&w[1], 0, 4, &missing) == MATRIX, "a layer that is not known: its own matrix");
    dsv4_paging_join(of_layer, 3);
    dsv4_paging_join(of_layer, 3); // once more changes nothing
    CHECK(announced(&w[0], 2, 4, &missing) == 3*MATRIX, "few experts: all matrices with the first");
    CHECK(missing == (can_drop ? 3*MATRIX : 0), "missing: %d", (int) missing);
    CHECK(announced(&w[1], 2, 4, &missing) == 0, "few experts: not again with the second");
    CHECK(announced(&w[2], 2, 4, &missing) == 0, "few experts: not again with the third");
    CHECK(announced(&w[0], 3, DSV4_PAGING_AHEAD + 1, &missing) == MATRIX, "many experts: one matrix at a time");
    CHECK(announced(&w[2], 3, DSV4_PAGING_AHEAD + 1, &missing) == MATRIX, "many experts: the third as well");

    const int32_t chosen[3] = { 6, 4, 7 };
    const int64_t before = dsv4_paging_get_counts().n_bytes;
    dsv4_paging_announce_early(&w[1], chosen, 3); // any matrix of the layer
    CHECK(dsv4_paging_get_counts().n_bytes - before == 3*3*MATRIX, "early: all matrices of three experts");
    for (int32_t expert : chosen) {
        CHECK(announced(&w[0], expert, 4, &missing) == 0, "early: expert %d not again at its turn", (int) expert);
    }
    CHECK(announced(&w[0], 4, 4, &missing) == 3*MATRIX, "early: again with the next token");
    dsv4_paging_announce_early(&w[0], chosen, 2);
    CHECK(announced(&w[0], 7, 4, &missing) == 3*MATRIX, "early: another expert at its turn");
    dsv4_paging_announce_early(&w[0], chosen, 0);
    CHECK(announced(&w[0], 6, 4, &missing) == 3*MATRIX, "early: what a token before left over is forgotten");

    // what was announced is read without being touched
    int64_t left = 0;
    for (int wait = 0; wait < 1000; wait++) {
        announced(&w[0], 2, 4, &left);
        if (left == 0) {
            break;
        }
        usleep(10*1000);
    }
    CHECK(left == 0, "%d bytes are still missing", (int) left);
    if (can_drop) {
        announced(&w[0], 5, 4, &missing);
        CHECK(missing == 3*MATRIX, "an expert that nobody announced: %d bytes are missing", (int) missing);
    }
    dsv4_paging_set(true);
    CHECK(dsv4_paging_is_on(), "on");
    dsv4_paging_set(false);
    CHECK(!dsv4_paging_is_on(), "off");
    return check_result("test-dsv4-paging");
}
