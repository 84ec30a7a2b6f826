// The stride rule of GGUF type 42: files are written byte by byte with the ids and strides of the three claimants and
// read back through every entry point of gguf.cpp.

#include "check.h"

#include "gguf-type42.h"

#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

static std::string last_log;

static constexpr int F8    = 129; // bytes per 128 values, as the writers have it
static constexpr int Q2_0  = 36;
static constexpr int PRISM = 34;

struct tensor_spec {
    std::string name;
    int32_t     id;     // as in the file
    std::vector<int64_t> ne;
    uint64_t    n_bytes;
};

static int64_t n_elements(const std::vector<int64_t> & ne) {
    int64_t n = 1;
    for (int64_t d : ne) {
        n *= d;
    }
    return n;
}

static tensor_spec type42(const std::string & name, int stride, std::vector<int64_t> ne) {
    return { name, 42, ne, uint64_t(n_elements(ne)*stride/128) };
}

static tensor_spec f32(const std::string & name, int64_t n) {
    return { name, GGML_TYPE_F32, { n }, uint64_t(4*n) };
}

struct file_bytes {
    std::vector<uint8_t> data;
    size_t n_header = 0; // start of the data section

    template <typename T> void put(const T & v) { data.insert(data.end(), (const uint8_t *) &v, (const uint8_t *) &v + sizeof(v)); }
    void put(const std::string & s) {
        put(uint64_t(s.size()));
        data.insert(data.end(), s.begin(), s.end());
    }
    void pad(size_t alignment) { data.resize((data.size() + alignment - 1)/alignment*alignment); }
};

// data byte i of the section is i % 251
static file_bytes make_file(const std::vector<tensor_spec> & tensors, uint32_t alignment = 32, bool with_data = true) {
    file_bytes f;
    f.data = { 'G', 'G', 'U', 'F' };
    f.put(uint32_t(3));
    f.put(uint64_t(tensors.size()));
    f.put(uint64_t(1));
    f.put(std::string("general.alignment"));
    f.put(uint32_t(GGUF_TYPE_UINT32));
    f.put(alignment);
    uint64_t offset = 0;
    for (const tensor_spec & t : tensors) {
        f.put(t.name);
        f.put(uint32_t(t.ne.size()));
        for (int64_t d : t.ne) {
            f.put(d);
        }
        f.put(t.id);
        f.put(offset);
        offset += (t.n_bytes + alignment - 1)/alignment*alignment;
    }
    f.pad(alignment);
    f.n_header = f.data.size();
    for (uint64_t i = 0; with_data && i < offset; i++) {
        f.data.push_back(uint8_t(i % 251));
    }
    return f;
}

struct opened {
    gguf_context * gguf = nullptr;
    ggml_context * ctx  = nullptr;

    opened() = default;
    opened(const opened &) = delete;
    opened(opened && o) : gguf(o.gguf), ctx(o.ctx) { o.gguf = nullptr; o.ctx = nullptr; }
    ~opened() {
        gguf_free(gguf);
        ggml_free(ctx);
    }

    bool is(const char * name, ggml_type type) const {
        const int64_t i = gguf ? gguf_find_tensor(gguf, name) : -1;
        return i >= 0 && gguf_get_tensor_type(gguf, i) == type;
    }
};

static opened open_buffer(const file_bytes & f, bool read_data = false) {
    opened o;
    last_log.clear();
    o.gguf = gguf_init_from_buffer(f.data.data(), f.data.size(), { !read_data, &o.ctx });
    return o;
}

static const ggml_type T_F8   = GGML_TYPE_F8_E4M3_B128;
static const ggml_type T_Q2_0 = GGML_TYPE_Q2_0;

static void test_single_and_both() {
    for (uint32_t alignment : { 1, 8, 32, 64, 128, 4096 }) {
        // n/128 is large enough for every alignment here
        const std::vector<int64_t> ne = { 256, 128, 32 };
        for (int first : { F8, Q2_0 }) {
            for (int second : { F8, Q2_0 }) {
                const file_bytes f = make_file({ f32("a", 3), type42("x", first, ne), f32("b", 8), type42("y", second, ne) }, alignment);
                const opened o = open_buffer(f, true);
                CHECK(o.gguf, "alignment %u, strides %d %d: %s", alignment, first, second, last_log.c_str());
                CHECK(o.is("x", first  == F8 ? T_F8 : T_Q2_0), "x, stride %d, alignment %u", first, alignment);
                CHECK(o.is("y", second == F8 ? T_F8 : T_Q2_0), "y, stride %d, alignment %u, last in the file", second, alignment);
                if (!o.gguf) {
                    continue;
                }
                const ggml_tensor * x = ggml_get_tensor(o.ctx, "x");
                CHECK(ggml_nbytes(x) == size_t(256*128*32/128*first), "bytes of x: %zu", ggml_nbytes(x));
                CHECK(ggml_is_contiguous(x), "strides of x");
                for (int64_t i = 0; i < gguf_get_n_tensors(o.gguf); i++) {
                    const ggml_tensor * t = ggml_get_tensor(o.ctx, gguf_get_tensor_name(o.gguf, i));
                    const size_t offset = gguf_get_tensor_offset(o.gguf, i);
                    CHECK(gguf_get_tensor_size(o.gguf, i) == ggml_nbytes(t), "size of %s", t->name);
                    bool same = true;
                    for (size_t j = 0; j < ggml_nbytes(t); j++) {
                        same = same && ((const uint8_t *) t->data)[j] == (offset + j) % 251;
                    }
                    CHECK(same, "data of %s", t->name);
                }
            }
        }
    }
}

// smallest tensors: at alignment 32 FP8 is told apart from any n = 128 on
static void test_small() {
    for (int64_t rows = 1; rows <= 40; rows++) {
        for (int stride : { F8, Q2_0 }) {
            const opened o = open_buffer(make_file({ type42("x", stride, { 128, rows }), f32("z", 1) }));
            CHECK(o.is("x", stride == F8 ? T_F8 : T_Q2_0), "%d rows of 128, stride %d: %s", int(rows), stride, last_log.c_str());
        }
        // rows of 64 are Q2_0's alone
        const opened o = open_buffer(make_file({ type42("x", Q2_0, { 64, rows }), f32("z", 1) }));
        CHECK(o.is("x", T_Q2_0), "%d rows of 64", int(rows));
    }
    const opened empty = open_buffer(make_file({ type42("x", F8, { 128, 0 }), f32("z", 1) }));
    CHECK(empty.gguf, "no elements: %s", last_log.c_str());
}

static void test_last() {
    const std::vector<int64_t> ne = { 256, 16 };
    struct { int others; int last; ggml_type want_with_data; ggml_type want_without; } cases[] = {
        { 0,    F8,   T_F8,   T_Q2_0 }, // nothing else decides: stock
        { 0,    Q2_0, T_Q2_0, T_Q2_0 },
        { F8,   F8,   T_F8,   T_F8   },
        { F8,   Q2_0, T_Q2_0, T_F8   }, // cannot be known without data
        { Q2_0, F8,   T_F8,   T_Q2_0 },
        { Q2_0, Q2_0, T_Q2_0, T_Q2_0 },
        { -1,   F8,   T_F8,   T_Q2_0 }, // the others disagree
    };
    for (const auto & c : cases) {
        std::vector<tensor_spec> tensors = { f32("a", 1) };
        if (c.others != 0) {
            tensors.push_back(type42("o1", c.others == -1 ? F8   : c.others, ne));
            tensors.push_back(type42("o2", c.others == -1 ? Q2_0 : c.others, ne));
        }
        tensors.push_back(type42("x", c.last, ne));

        const file_bytes whole = make_file(tensors);
        CHECK(open_buffer(whole).is("x", c.want_with_data), "others %d, last %d", c.others, c.last);

        // the padding behind the last tensor may be missing
        file_bytes unpadded = whole;
        while (unpadded.data.size() > whole.n_header && unpadded.data.size() % 2 == 0) {
            unpadded.data.pop_back();
            break;
        }
        if (c.last == F8) { // 4128 bytes of FP8 need no padding: one byte less is one too few
            const opened o = open_buffer(unpadded);
            CHECK(o.is("x", c.want_without), "others %d, last %d, one byte short", c.others, c.last);
        }

        const file_bytes header_only = make_file(tensors, 32, false);
        const opened h = open_buffer(header_only);
        CHECK(h.gguf && h.is("x", c.want_without), "others %d, last %d, header only: %s", c.others, c.last, last_log.c_str());

        file_bytes trailing = whole;
        trailing.data.resize(trailing.data.size() + 1000000);
        const opened t = open_buffer(trailing);
        CHECK(t.gguf && t.is("x", c.want_without), "others %d, last %d, trailing data", c.others, c.last);
    }
}

static void test_ids() {
    for (int32_t id : { 43, 44, 45, 1000, -1 }) {
        tensor_spec t = type42("x", Q2_0, { 256, 16 });
        t.id = id;
        CHECK(!open_buffer(make_file({ t, f32("z", 1) })).gguf, "id %d", id);
        CHECK(last_log.find("'x'") != std::string::npos && last_log.find(std::to_string(id)) != std::string::npos, "log: %s", last_log.c_str());
    }
    for (int32_t id : { int32_t(GGML_TYPE_Q8_0), int32_t(GGML_TYPE_MXFP4), int32_t(GGML_TYPE_Q1_0) }) {
        const ggml_type type = ggml_type(id);
        const opened o = open_buffer(make_file({ { "x", id, { 256, 4 }, ggml_row_size(type, 1024) }, f32("z", 1) }));
        CHECK(o.is("x", type), "type %d is not ours to change", id);
    }
    CHECK(dsv4_gguf_type_to_file(T_F8) == 42 && dsv4_gguf_type_to_file(T_Q2_0) == 42, "written ids");
    for (int i = 0; i < 42; i++) {
        CHECK(dsv4_gguf_type_to_file(ggml_type(i)) == i, "written id of %d", i);
    }
    CHECK(ggml_row_size(T_F8, 128) == F8 && ggml_row_size(T_Q2_0, 128) == Q2_0, "strides of this build");
}

static void expect_refused(const std::vector<tensor_spec> & tensors, const char * reason, uint32_t alignment = 32) {
    const opened o = open_buffer(make_file(tensors, alignment));
    CHECK(!o.gguf, "should be refused: %s", reason);
    CHECK(last_log.find(reason) != std::string::npos, "log has no '%s': %s", reason, last_log.c_str());
    CHECK(last_log.find("'x'") != std::string::npos, "log does not name the tensor: %s", last_log.c_str());
}

static void test_refused() {
    expect_refused({ type42("x", PRISM, { 4096, 512 }), f32("z", 1) }, "not supported");
    expect_refused({ type42("x", 100, { 4096, 512 }), f32("z", 1) }, "unknown block size");
    expect_refused({ type42("o", F8, { 4096, 512 }), type42("x", 70, { 4096, 512 }), f32("z", 1) }, "unknown block size");
    expect_refused({ type42("x", F8, { 64, 64 }), f32("z", 1) }, "needs rows of a multiple of 128");
    // 128 values: 34 and 36 bytes both end before the next multiple of 32
    expect_refused({ type42("small", PRISM, { 128 }), type42("x", PRISM, { 4096, 512 }), f32("z", 1) }, "not supported");
    CHECK(open_buffer(make_file({ type42("x", PRISM, { 128 }), f32("z", 1) })).is("x", T_Q2_0), "too small: stock's meaning");
    CHECK(open_buffer(make_file({ type42("x", PRISM, { 128 }), type42("big", Q2_0, { 4096, 512 }), f32("z", 1) })).is("x", T_Q2_0), "stock");

    // the message carries all that is needed to judge it
    open_buffer(make_file({ type42("x", 100, { 4096, 512 }), f32("z", 1) }));
    for (const char * part : { "2097152 values", "1638400 bytes", "557056", "589824", "2113536" }) {
        CHECK(last_log.find(part) != std::string::npos, "log has no '%s': %s", part, last_log.c_str());
    }
}

// padding of 256 hides the difference for one block: the others decide, else stock's meaning
static void test_large_alignment() {
    const opened alone = open_buffer(make_file({ type42("x", F8, { 128 }), f32("z", 1) }, 256));
    CHECK(alone.is("x", T_Q2_0), "alone");
    const opened helped = open_buffer(make_file({ type42("x", F8, { 128 }), type42("big", F8, { 128, 64 }), f32("z", 1) }, 256));
    CHECK(helped.is("x", T_F8) && helped.is("big", T_F8), "beside FP8");
    const opened stock = open_buffer(make_file({ type42("x", Q2_0, { 128 }), type42("big", Q2_0, { 128, 64 }), f32("z", 1) }, 256));
    CHECK(stock.is("x", T_Q2_0) && stock.is("big", T_Q2_0), "beside Q2_0");
}

// names are no evidence: a stock file that uses the native dialect's names stays Q2_0
static void test_names() {
    const std::vector<int64_t> ne = { 256, 64 };
    const char * names[] = { "blk.0.attn_kv_latent.weight", "blk.0.attn_output_a.weight", "hc_head_fn", "blk.0.ffn_gate_shexp.weight" };
    std::vector<tensor_spec> tensors;
    for (const char * name : names) {
        tensors.push_back(type42(name, Q2_0, ne));
    }
    const opened o = open_buffer(make_file(tensors));
    for (const char * name : names) {
        CHECK(o.is(name, T_Q2_0), "%s", name);
    }
}

static void test_hostile_shapes() {
    const int64_t big = INT64_C(1) << 62;
    for (int64_t ne0 : { big, big - 128, (INT64_MAX/129)/128*128, INT64_C(1) << 57, INT64_C(1) << 40 }) {
        for (bool other : { false, true }) {
            std::vector<tensor_spec> tensors;
            if (other) {
                tensors.push_back(type42("o", F8, { 256, 64 }));
            }
            tensors.push_back({ "x", 42, { ne0 }, 0 });
            const opened o = open_buffer(make_file(tensors));
            // whatever the answer, sizes may not have wrapped around
            if (o.is("x", T_F8)) {
                CHECK(gguf_get_tensor_size(o.gguf, gguf_find_tensor(o.gguf, "x")) == uint64_t(ne0/128)*129, "ne0 = %lld", (long long) ne0);
            }
        }
    }
    // offsets out of order or beyond the end: refused, as in stock
    file_bytes f = make_file({ type42("x", F8, { 128 }), type42("y", F8, { 128 }) });
    const uint64_t huge = UINT64_MAX - 31;
    memcpy(&f.data[f.n_header - 32 - f.n_header % 8], &huge, 8);
    open_buffer(f);
}

struct entry {
    int64_t  n;      // 0: another type
    uint64_t offset;
};

static std::vector<dsv4_type42> decide(const std::vector<entry> & entries, uint64_t alignment, uint64_t n_data_bytes,
        std::vector<dsv4_type42_tensor> * full = nullptr) {
    std::vector<dsv4_type42_tensor> list(entries.size());
    for (size_t i = 0; i < list.size(); i++) {
        list[i].is_42  = entries[i].n > 0;
        list[i].n      = entries[i].n > 0 ? entries[i].n : 1;
        list[i].ne0    = entries[i].n > 0 ? 128 : 1;
        list[i].offset = entries[i].offset;
    }
    dsv4_type42_decide(list, alignment, n_data_bytes);
    std::vector<dsv4_type42> verdicts;
    for (const dsv4_type42_tensor & t : list) {
        verdicts.push_back(t.verdict);
    }
    if (full) {
        *full = list;
    }
    return verdicts;
}

// the rule itself, with distances that no well-formed file has
static void test_decide() {
    typedef std::vector<dsv4_type42> verdicts;
    const dsv4_type42 NONE = DSV4_TYPE42_NONE, V_F8 = DSV4_TYPE42_F8, V_Q2 = DSV4_TYPE42_Q2_0, V_PRISM = DSV4_TYPE42_PRISM;
    const int64_t n = 128*1000;

    // a claimant fits up to one byte less than one alignment beyond its size
    for (int i : { 0, 1, 2 }) {
        const uint64_t size = 1000*(i == 0 ? F8 : i == 1 ? Q2_0 : PRISM);
        const dsv4_type42 want = i == 0 ? V_F8 : i == 1 ? V_Q2 : V_PRISM;
        CHECK(decide({ { n, 0 }, { 0, size      } }, 32, 1000000)[0] == want, "exact, claimant %d", i);
        CHECK(decide({ { n, 0 }, { 0, size + 31 } }, 32, 1000000)[0] == want, "padded, claimant %d", i);
        CHECK(decide({ { n, 0 }, { 0, size + 32 } }, 32, 1000000)[0] == NONE, "too far, claimant %d", i);
        CHECK(decide({ { n, 0 }, { 0, size - 1  } }, 32, 1000000)[0] == NONE, "too near, claimant %d", i);
    }

    // the order is that of the offsets
    CHECK((decide({ { n, 129000 }, { n, 0 }, { 0, 165000 } }, 32, 165004) == verdicts { V_Q2, V_F8, NONE }), "out of order");

    // 34 and 36 both fit one block: stock, unless another tensor can only be PrismML's, wherever it stands
    CHECK((decide({ { 128, 0 }, { 0, 64 } }, 32, 68) == verdicts { V_Q2, NONE }), "one block alone");
    CHECK((decide({ { 128, 0 }, { n, 64 }, { 0, 34064 } }, 32, 34068) == verdicts { V_PRISM, V_PRISM, NONE }), "beside PrismML's");
    CHECK((decide({ { 128, 0 }, { n, 64 } }, 32, 34064) == verdicts { V_PRISM, V_PRISM }), "PrismML's is the last");
    CHECK((decide({ { 128, 0 }, { n, 64 }, { 0, 129064 } }, 32, 129068) == verdicts { V_Q2, V_F8, NONE }), "beside FP8");

    // all three fit one block at alignment 256: the common verdict of the others, if they agree
    CHECK((decide({ { 128, 0 }, { 0, 256 } }, 256, 260) == verdicts { NONE, NONE }), "nothing decides");
    CHECK((decide({ { 128, 0 }, { n, 256 }, { 0, 129256 } }, 256, 129260) == verdicts { V_F8, V_F8, NONE }), "FP8 decides");
    CHECK((decide({ { 128, 0 }, { n, 256 }, { n, 129256 }, { 0, 165256 } }, 256, 165260) == verdicts { NONE, V_F8, V_Q2, NONE }), "F8, Q2_0");
    CHECK((decide({ { 128, 0 }, { n, 256 }, { n, 36256 }, { 0, 165256 } }, 256, 165260) == verdicts { NONE, V_Q2, V_F8, NONE }), "Q2_0, F8");
    // 290 bytes: too many for 34, enough for 36 and 129; a verdict that does not fit is not borrowed
    CHECK((decide({ { 128, 0 }, { n, 290 }, { 0, 34290 } }, 256, 34294) == verdicts { NONE, V_PRISM, NONE }), "PrismML's does not fit");

    // the last tensor borrows when its window says nothing, also if the others stand behind each other
    CHECK((decide({ { n, 0 }, { n, 129000 } }, 32, 129000) == verdicts { V_F8, V_F8 }), "no data for the last");
    CHECK((decide({ { n, 0 }, { n, 36000 }, { n, 165000 } }, 32, 165000) == verdicts { V_Q2, V_F8, NONE }), "the others disagree");
    std::vector<dsv4_type42_tensor> full;
    CHECK((decide({ { n, 0 }, { n, 129000 } }, 32, 1000, &full) == verdicts { V_F8, V_F8 }), "the file ends before the last tensor");
    CHECK(full[1].avail == 0 && full[1].is_last && !full[0].is_last && full[0].avail == 129000, "avail %llu", (unsigned long long) full[1].avail);
    CHECK(decide({}, 32, 0).empty(), "no tensors");
}

struct callback_data {
    const std::vector<uint8_t> * data;
};

static size_t read_callback(void * userdata, void * output, uint64_t offset, size_t len) {
    const std::vector<uint8_t> & d = *((callback_data *) userdata)->data;
    if (offset >= d.size()) {
        return 0;
    }
    const size_t n = std::min<uint64_t>(len, d.size() - offset);
    memcpy(output, d.data() + offset, n);
    return n;
}

static void test_entry_points() {
    const file_bytes f = make_file({ type42("x", F8, { 256, 4 }), type42("y", Q2_0, { 256, 4 }), type42("l", F8, { 256, 4 }) });
    const auto good = [](const opened & o) { return o.is("x", T_F8) && o.is("y", T_Q2_0) && o.is("l", T_F8); };

    FILE * file = tmpfile();
    const char junk[7] = { 1, 2, 3, 4, 5, 6, 7 };
    fwrite(junk, 1, sizeof(junk), file); // embedded in a larger file, at an odd position
    fwrite(f.data.data(), 1, f.data.size(), file);
    fseek(file, sizeof(junk), SEEK_SET);
    opened from_ptr;
    from_ptr.gguf = gguf_init_from_file_ptr(file, { true, &from_ptr.ctx });
    CHECK(good(from_ptr), "file pointer");
    fclose(file);

    callback_data cd = { &f.data };
    opened from_callback;
    from_callback.gguf = gguf_init_from_callback(read_callback, &cd, 100, f.data.size(), { true, &from_callback.ctx });
    CHECK(good(from_callback), "callback that knows the size");

    // a callback that claims more than there is: only the last tensor is in doubt
    opened claimed;
    claimed.gguf = gguf_init_from_callback(read_callback, &cd, 4096, 4ull << 30, { true, &claimed.ctx });
    CHECK(claimed.is("x", T_F8) && claimed.is("y", T_Q2_0) && claimed.is("l", T_Q2_0), "callback that does not know the size");
}

// write with gguf.cpp, read the raw ids, read again with gguf.cpp
static void test_roundtrip() {
    std::mt19937 rng(11);
    for (int iter = 0; iter < 200; iter++) {
        ggml_init_params params = { 16*1024*1024, nullptr, false };
        ggml_context * ctx = ggml_init(params);
        gguf_context * out = gguf_init_empty();
        const uint32_t alignment = iter % 3 == 0 ? 64 : 32;
        gguf_set_val_u32(out, "general.alignment", alignment);
        // gguf_add_tensor places tensors by the context's alignment, which only reading sets: 32 unless read back
        const ggml_type types[] = { T_F8, T_Q2_0, GGML_TYPE_F32, GGML_TYPE_MXFP4 };
        const int n = 1 + int(rng() % 8);
        std::vector<ggml_type> want;
        for (int i = 0; i < n; i++) {
            const ggml_type type = types[rng() % 4];
            ggml_tensor * t = ggml_new_tensor_2d(ctx, type, 128*(1 + rng() % 4), 1 + rng() % 5);
            ggml_format_name(t, "t%d", i);
            for (size_t j = 0; j < ggml_nbytes(t); j++) {
                ((uint8_t *) t->data)[j] = uint8_t(rng());
            }
            want.push_back(type);
            gguf_add_tensor(out, t);
        }
        if (alignment != 32) {
            gguf_remove_key(out, "general.alignment");
        }

        FILE * file = tmpfile();
        CHECK(gguf_write_to_file_ptr(out, file, false), "write");
        rewind(file);
        opened o;
        o.gguf = gguf_init_from_file_ptr(file, { false, &o.ctx });
        fclose(file);
        CHECK(o.gguf, "round %d: %s", iter, last_log.c_str());
        for (int i = 0; o.gguf && i < n; i++) {
            const ggml_tensor * t = ggml_get_tensor(ctx, ("t" + std::to_string(i)).c_str());
            const ggml_tensor * r = ggml_get_tensor(o.ctx, t->name);
            CHECK(r->type == want[i], "round %d, tensor %d of %d: %s instead of %s", iter, i, n, ggml_type_name(r->type), ggml_type_name(want[i]));
            CHECK(ggml_nbytes(r) == ggml_nbytes(t) && memcmp(r->data, t->data, ggml_nbytes(t)) == 0, "round %d, tensor %d: data", iter, i);
        }

        // the file never holds 43
        std::vector<uint8_t> meta(gguf_get_meta_size(out));
        gguf_get_meta_data(out, meta.data());
        for (int i = 0; i < n; i++) {
            const std::string name = "t" + std::to_string(i);
            const auto at = std::search(meta.begin(), meta.end(), name.begin(), name.end());
            const ggml_tensor * t = ggml_get_tensor(ctx, name.c_str());
            int32_t id;
            memcpy(&id, &*at + name.size() + 4 + 8*ggml_n_dims(t), 4);
            CHECK(id == (want[i] == T_Q2_0 ? 42 : int32_t(want[i])), "round %d: id %d", iter, id);
        }
        gguf_free(out);
        ggml_free(ctx);
    }
}

static void expect_reason(const std::vector<tensor_spec> & tensors, uint32_t alignment, int64_t cut, const char * want) {
    file_bytes f = make_file(tensors, alignment);
    f.data.resize(f.data.size() - cut);
    const opened o = open_buffer(f);
    CHECK(o.gguf, "%s: must open first: %s", want, last_log.c_str());
    if (!o.gguf) {
        return;
    }
    for (const dsv4_type42_tensor & t : dsv4_type42_list(o.gguf, f.data.size())) {
        const std::string reason = t.is_42 ? dsv4_type42_reason(t) : "";
        if (t.name == "x" && want[0] != '\0') {
            CHECK(reason.find(want) != std::string::npos, "'%s' instead of '%s'", reason.c_str(), want);
            CHECK(reason.find(std::to_string(t.avail) + " bytes available") != std::string::npos, "%s", reason.c_str());
        } else {
            CHECK(reason.empty(), "%s: '%s'", t.name.c_str(), reason.c_str());
        }
    }
}

// what a loader must refuse although the container is readable
static void test_reasons() {
    const std::vector<int64_t> ne = { 4096, 64 };
    expect_reason({ f32("a", 1) }, 32, 0, "");
    expect_reason({ type42("o", F8, ne), type42("x", F8, ne) }, 32, 0, "");
    expect_reason({ type42("o", Q2_0, ne), type42("x", Q2_0, ne) }, 32, 0, "");
    // an interrupted download: cut inside the last tensor, though what is left may exceed a smaller claimant
    for (int64_t cut : { 1, 100000, 180000, 264192 }) {
        expect_reason({ type42("o", F8, ne), type42("x", F8, ne) }, 32, cut, "truncated");
    }
    expect_reason({ type42("x", F8, ne) }, 32, 264192 - 100, "truncated");
    expect_reason({ type42("x", F8, ne) }, 32, 100000, "unknown block size");
    expect_reason({ type42("x", PRISM, ne) }, 32, 0, "not supported");
    expect_reason({ type42("x", F8, { 128 }), f32("z", 1) }, 256, 0, "too small");
    // one block of 128 may be either 2-bit format: the other tensor is PrismML's
    expect_reason({ type42("x", PRISM, { 128 }), f32("z", 1) }, 32, 0, "");

    // a file may mix the meanings; a model may not, which is its loader's to check
    file_bytes f = make_file({ type42("q", Q2_0, ne), type42("f", F8, ne), f32("z", 1) });
    const opened mixed = open_buffer(f);
    const std::vector<dsv4_type42_tensor> list = dsv4_type42_list(mixed.gguf, f.data.size());
    CHECK(list.size() == 3 && list[0].verdict == DSV4_TYPE42_Q2_0 && list[1].verdict == DSV4_TYPE42_F8 && !list[2].is_42, "verdicts");
    CHECK(dsv4_type42_size(list[0]) == 73728 && dsv4_type42_size(list[1]) == 264192, "sizes");
}

int main() {
    ggml_log_set([](ggml_log_level, const char * text, void *) { last_log += text; }, nullptr);

    test_single_and_both();
    test_small();
    test_last();
    test_ids();
    test_refused();
    test_decide();
    test_large_alignment();
    test_names();
    test_hostile_shapes();
    test_entry_points();
    test_roundtrip();
    test_reasons();
    return check_result("test-gguf-type42");
}
