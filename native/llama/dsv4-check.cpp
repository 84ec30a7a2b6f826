#include "dsv4-check.h"

#include "dsv4-refusal.h"
#include "dsv4-tensors.h"

#include "gguf-type42.h"

#include "ggml-cpp.h"
#include "llama.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_set>

#include <sys/stat.h>

// the CPU backend asserts that mapped weights start at such addresses
static constexpr size_t MIN_ALIGNMENT = GGUF_DEFAULT_ALIGNMENT;

static const char * const HINT_DOWNLOAD = "The download or copy was interrupted: fetch the file again";

// --- header ---

std::string dsv4_dims_str(const int64_t * ne, size_t n) {
    while (n > 1 && ne[n - 1] == 1) {
        --n;
    }
    std::string text;
    for (size_t i = 0; i < n; ++i) {
        text += (i ? "x" : "") + std::to_string(ne[i]);
    }
    return text;
}

void dsv4_add_tensors(dsv4_header & header, const struct gguf_context * gguf) {
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); ++i) {
        dsv4_tensor t = { gguf_get_tensor_name(gguf, i), gguf_get_tensor_type(gguf, i), {} };
        memcpy(t.ne, gguf_get_tensor_ne(gguf, i), sizeof(t.ne));
        header.tensors.push_back(std::move(t));
    }
}

void dsv4_header::index_names() {
    const dsv4_tensor * first = nullptr; // the first tensor whose name tells the dialect
    for (const dsv4_tensor & t : tensors) {
        const dsv4_form form = dsv4_name_form(t.name);
        if (form == DSV4_FORM_BOTH) {
            continue;
        }
        if (!first) {
            first     = &t;
            is_native = form == DSV4_FORM_NATIVE;
        } else if (is_native != (form == DSV4_FORM_NATIVE)) {
            throw dsv4_refusal(DSV4_DIALECT, { path, t.name, "", "the file mixes native and upstream tensor names",
                std::string("a name of the ") + (is_native ? "upstream" : "native") + " dialect",
                std::string("the ") + (is_native ? "native" : "upstream") + " dialect, as in '" + first->name + "'",
                "The file was put together from two sources: convert the checkpoint again" });
        }
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
        by_upstream_name.emplace(is_native ? dsv4_native_to_upstream(tensors[i].name) : tensors[i].name, i);
    }
}

// --- model-level checks ---

void dsv4_type42_check::add(const struct gguf_context * gguf, uint64_t n_file_bytes) {
    for (const dsv4_type42_tensor & t : dsv4_type42_list(gguf, n_file_bytes)) {
        if (!t.is_42) {
            continue;
        }
        const std::string reason = dsv4_type42_reason(t);
        if (!reason.empty()) {
            throw dsv4_refusal(DSV4_TYPE42, { path, t.name, "", "cannot tell what tensor type 42 means", reason,
                "F8_E4M3_B128 or Q2_0 blocks", "" });
        }
        const char * name = t.verdict == DSV4_TYPE42_F8 ? "F8_E4M3_B128" : "Q2_0";
        if (first.empty()) {
            first   = std::string(name) + ", as in '" + t.name + "'";
            meaning = t.verdict;
        } else if (meaning != t.verdict) {
            throw dsv4_refusal(DSV4_TYPE42, { path, t.name, "", "mixed meanings of tensor type 42 in one model",
                name, first, "The file was put together from two sources: convert the checkpoint again" });
        }
    }
}

void dsv4_refuse_architecture(const std::string & path, const std::string & found) {
    if (found == "deepseek4") {
        return;
    }
    throw dsv4_refusal(DSV4_UNSUPPORTED, { path, "", "general.architecture", "this engine does not run the model's architecture",
        "'" + found + "'", "'deepseek4'", found != "deepseek41" ? "" :
            "DeepSeek-V4.1 shares V4's name only: layers, tensors and FP8 tiles differ" });
}

void dsv4_check_alignment(const std::string & path, const struct gguf_context * gguf) {
    const size_t alignment = gguf_get_alignment(gguf);
    if (alignment < MIN_ALIGNMENT) {
        throw dsv4_refusal(DSV4_FORMAT, { path, "", GGUF_KEY_GENERAL_ALIGNMENT, "the tensors are packed too tightly to be mapped",
            std::to_string(alignment), "at least " + std::to_string(MIN_ALIGNMENT), "" });
    }
}

void dsv4_check_model(dsv4_header & header, bool is_mtp_accepted, dsv4_derived & derived) {
    header.index_names();
    const dsv4_hparams hp = dsv4_read_hparams(header, derived);

    if (hp.n_layer_nextn > 0) {
        const dsv4_tensor * mtp = header.find(
            "blk." + std::to_string(hp.n_layer - hp.n_layer_nextn) + ".nextn.eh_proj.weight");
        if (mtp) {
            if (is_mtp_accepted) {
                return;
            }
            throw dsv4_refusal(DSV4_UNSUPPORTED, { header.path, mtp->name, "", "the file has multi-token prediction layers",
                dsv4_dims_str(mtp->ne), "", "Use a file without them: they are for speculative decoding only" });
        }
    }

    dsv4_check_tensors(header, hp);
}

// --- files ---

namespace {

// Keeps the error lines that the GGUF parser logs in this thread: it has no other way to say why it refuses a file.
struct log_capture {
    log_capture() {
        lock.lock();
        ggml_log_get(&prev, &prev_data);
        lines.clear();
        active = true;
        ggml_log_set(on_line, nullptr);
    }

    ~log_capture() {
        ggml_log_set(prev, prev_data);
        active = false;
        lock.unlock();
    }

    static void on_line(enum ggml_log_level level, const char * text, void *) {
        if (!active) {
            if (prev) {
                prev(level, text, prev_data);
            }
        } else if (level == GGML_LOG_LEVEL_ERROR) {
            std::string line = text;
            const size_t name_end = line.find(": "); // "function: text\n"
            line.erase(0, name_end == std::string::npos ? 0 : name_end + 2);
            line.erase(line.find_last_not_of('\n') + 1);
            lines.push_back(line);
        }
    }

    static std::mutex         lock;
    static ggml_log_callback  prev;
    static void *             prev_data;
    static thread_local bool                     active;
    static thread_local std::vector<std::string> lines;
};

std::mutex        log_capture::lock;
ggml_log_callback log_capture::prev;
void *            log_capture::prev_data;
thread_local bool                     log_capture::active;
thread_local std::vector<std::string> log_capture::lines;

bool contains(const std::string & text, const char * part) {
    return text.find(part) != std::string::npos;
}

// text between the first `open` and the last "'" before `close`, or "" if the two are not there
std::string quoted_after(const std::string & line, const char * open, const char * close) {
    const size_t a = line.find(open);
    if (a == std::string::npos) {
        return "";
    }
    const size_t from = a + strlen(open);
    const size_t to   = line.rfind(close);
    return to == std::string::npos || to < from ? "" : line.substr(from, to - from);
}

// Turn the parser's first complaint into facts. The texts are upstream's; a bump shows up in the tests.
[[noreturn]] void refuse_unparsed(const std::string & path, const std::vector<std::string> & lines) {
    const std::string line = lines.empty() ? "" : lines[0];

    for (const char * text : { "failed to read magic", "invalid magic characters", "bad GGUF version",
            "mismatch between the host and model endianness", "GGUFv1 is no longer supported", "only supports up to version" }) {
        if (contains(line, text)) {
            throw dsv4_refusal(DSV4_NOT_GGUF, { path, "", "", "not a GGUF file that can be read", line,
                "a little-endian file of version 2 or 3", "" });
        }
    }
    // what is logged when a read runs into the end of the file, and nothing else was wrong before
    for (const char * text : { "failed to read header", "failed to read key-value pairs", "failed to read tensor info",
            "failed to seek to beginning of data section", "exceeds remaining file size" }) {
        if (contains(line, text)) {
            throw dsv4_refusal(DSV4_TRUNCATED, { path, "", "", "the file ends inside its header", line, "", HINT_DOWNLOAD });
        }
    }

    struct pattern {
        const char * open;
        const char * close;
    };
    std::string tensor;
    for (const pattern & p : { pattern { "duplicate tensor name '", "' for tensor " },
                               pattern { "shape for a tensor '",    "' may cause overflow" },
                               pattern { "tensor '",                "' has " },
                               pattern { "tensor '",                "' dimension " },
                               pattern { "tensor '",                "' of type " },
                               pattern { "tensor '",                "' with shape " },
                               pattern { "tensor '",                "' size " },
                               pattern { "tensor '",                "': " } }) {
        tensor = quoted_after(line, p.open, p.close);
        if (!tensor.empty()) {
            break;
        }
    }
    std::string key;
    for (const pattern & p : { pattern { "duplicate key '", "' for KV pair " },
                               pattern { "key '",           "' has invalid GGUF type" },
                               pattern { "key '",           "' must be of type " } }) {
        key = quoted_after(line, p.open, p.close);
        if (!key.empty()) {
            break;
        }
    }
    if (contains(line, "alignment ") && contains(line, "not a power of 2")) {
        key = GGUF_KEY_GENERAL_ALIGNMENT;
    }
    const bool is_type42 = contains(line, "PrismML's Q2_0") || contains(line, "type 42 with");
    throw dsv4_refusal(is_type42 ? DSV4_TYPE42 : DSV4_FORMAT, { path, tensor, key, "the GGUF header is malformed", line, "", "" });
}

struct shard {
    std::string      path;
    uint64_t         size = 0;
    gguf_context_ptr gguf;

    // Parser's checks and file bounds. Throws dsv4_refusal.
    explicit shard(const std::string & path) : path(path) {
        struct stat st;
        if (stat(path.c_str(), &st) != 0) {
            const int  err        = errno;
            const bool is_missing = err == ENOENT || err == ENOTDIR;
            throw dsv4_refusal(is_missing ? DSV4_MODEL_NOT_FOUND : DSV4_MODEL_FILE, { path, "", "",
                "cannot open the model file", strerror(err), "", "" });
        }
        if ((st.st_mode & S_IFMT) != S_IFREG) {
            throw dsv4_refusal(DSV4_MODEL_FILE, { path, "", "", "cannot open the model file",
                (st.st_mode & S_IFMT) == S_IFDIR ? "a directory" : "not a regular file", "a GGUF file", "" });
        }
        size = st.st_size;

        std::unique_ptr<FILE, int (*)(FILE *)> file(fopen(path.c_str(), "rb"), fclose);
        if (!file) {
            throw dsv4_refusal(DSV4_MODEL_FILE, { path, "", "", "cannot open the model file", strerror(errno), "", "" });
        }

        std::vector<std::string> lines;
        {
            log_capture capture;
            gguf.reset(gguf_init_from_file_ptr(file.get(), { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }));
            lines = log_capture::lines;
        }
        if (!gguf) {
            refuse_unparsed(path, lines);
        }
        check_bounds();
    }

    void check_bounds() const {
        std::unordered_set<std::string> seen;
        const uint64_t data = gguf_get_data_offset(gguf.get());
        for (const dsv4_type42_tensor & t : dsv4_type42_list(gguf.get(), size)) {
            // the parser compares whole names, the loader C strings
            if (!seen.insert(t.name).second) {
                throw dsv4_refusal(DSV4_FORMAT, { path, t.name, "", "two tensors have the same name", "", "", "" });
            }
            const int64_t  id   = seen.size() - 1; // file order, no duplicates so far
            const uint64_t need = t.is_42 ? dsv4_type42_size(t) : gguf_get_tensor_size(gguf.get(), id);
            const uint64_t have = size - std::min(size, data + t.offset);
            if (need > have) {
                throw dsv4_refusal(DSV4_TRUNCATED, { path, t.name, "", "the file ends before the tensor does",
                    std::to_string(have) + " bytes", std::to_string(need), HINT_DOWNLOAD });
            }
        }
    }

    [[noreturn]] void refuse_key(dsv4_kind kind, const char * key, const std::string & what,
            const std::string & found, const std::string & expected, const std::string & hint) const {
        throw dsv4_refusal(kind, { path, "", key, what, found, expected, hint });
    }

    // value of an integer key that belongs to splitting; -1 if it is absent
    int64_t split_key(const char * key, enum gguf_type type, bool required) const {
        const int64_t id = gguf_find_key(gguf.get(), key);
        if (id < 0 && !required) {
            return -1;
        }
        if (id < 0 || gguf_get_kv_type(gguf.get(), id) != type) {
            refuse_key(DSV4_MISSING_KEY, key, "a shard does not say where it belongs",
                id < 0 ? "no such key" : gguf_type_name(gguf_get_kv_type(gguf.get(), id)), gguf_type_name(type),
                "The shards were not written by a GGUF splitter: fetch them again");
        }
        return type == GGUF_TYPE_UINT16 ? gguf_get_val_u16(gguf.get(), id) : gguf_get_val_i32(gguf.get(), id);
    }
};

// All shards of the model whose first one is at `path`.
std::vector<shard> open_shards(const std::string & path) {
    std::vector<shard> shards;
    shards.emplace_back(path);

    const int64_t n_shards = shards[0].split_key("split.count", GGUF_TYPE_UINT16, false);
    if (n_shards <= 1) {
        return shards;
    }
    const int64_t no = shards[0].split_key("split.no", GGUF_TYPE_UINT16, true);
    if (no != 0) {
        shards[0].refuse_key(DSV4_FORMAT, "split.no", "a split model is opened by its first shard", std::to_string(no), "0",
            "Open the file that ends in -00001-of-...");
    }
    std::vector<char> prefix(path.size() + 1);
    if (llama_split_prefix(prefix.data(), prefix.size(), path.c_str(), 0, n_shards) <= 0) {
        char suffix[64];
        snprintf(suffix, sizeof(suffix), "-00001-of-%05d.gguf", (int) n_shards);
        shards[0].refuse_key(DSV4_FORMAT, "split.count", "the shard's file name does not fit its keys", "", suffix,
            "Give the shards their original names");
    }

    std::unordered_set<std::string> seen;
    int64_t n_tensors = 0;
    const auto add = [&](const shard & s) {
        for (int64_t i = 0; i < gguf_get_n_tensors(s.gguf.get()); ++i, ++n_tensors) {
            const char * name = gguf_get_tensor_name(s.gguf.get(), i);
            if (!seen.insert(name).second) {
                throw dsv4_refusal(DSV4_FORMAT, { s.path, name, "", "two shards have a tensor of the same name", "", "",
                    "The shards do not belong together: fetch them again" });
            }
        }
    };
    add(shards[0]);
    for (int64_t i = 1; i < n_shards; ++i) {
        std::vector<char> name(path.size() + 32);
        llama_split_path(name.data(), name.size(), prefix.data(), i, n_shards);
        shards.emplace_back(name.data());
        const int64_t found = shards[i].split_key("split.no", GGUF_TYPE_UINT16, true);
        if (found != i) {
            shards[i].refuse_key(DSV4_FORMAT, "split.no", "a shard has the wrong number", std::to_string(found), std::to_string(i),
                "Give the shards their original names");
        }
        add(shards[i]);
    }

    const int64_t n_expected = shards[0].split_key("split.tensors.count", GGUF_TYPE_INT32, true);
    if (n_expected != n_tensors) {
        shards[0].refuse_key(DSV4_FORMAT, "split.tensors.count", "the shards do not have all tensors of the model",
            std::to_string(n_tensors), std::to_string(n_expected), "Fetch the missing shard again");
    }
    return shards;
}

std::string check_file(const std::string & path) {
    const std::vector<shard> shards = open_shards(path);

    dsv4_type42_check type42;
    dsv4_header       header;
    for (const shard & s : shards) {
        type42.path = s.path;
        type42.add(s.gguf.get(), s.size);
        dsv4_add_tensors(header, s.gguf.get());
    }
    header.path = path;
    header.keys = shards[0].gguf.get();

    const char *  key = "general.architecture";
    const int64_t id  = gguf_find_key(header.keys, key);
    if (id < 0 || gguf_get_kv_type(header.keys, id) != GGUF_TYPE_STRING) {
        shards[0].refuse_key(DSV4_MISSING_KEY, key, "the file does not say what model it is",
            id < 0 ? "no such key" : gguf_type_name(gguf_get_kv_type(header.keys, id)), "str", "");
    }
    dsv4_refuse_architecture(path, gguf_get_val_str(header.keys, id));
    for (const shard & s : shards) {
        dsv4_check_alignment(s.path, s.gguf.get());
    }

    dsv4_derived derived;
    dsv4_check_model(header, /*is_mtp_accepted =*/ false, derived);
    return std::string("{\"ok\": true, \"dialect\": \"") + (header.is_native ? "native" : "upstream") +
        "\", \"derived\": " + dsv4_derived_json(derived) + "}";
}

} // namespace

int dsv4_check_file(const char * path, std::string & verdict_json) {
    try {
        verdict_json = check_file(path);
        return 0;
    } catch (const dsv4_refusal & refusal) {
        verdict_json = refusal.json();
    }
    return 1;
}
