// The stride rule for GGUF type 42 and the mapping of ids between memory and files; see gguf-type42.h.

#include "gguf-type42.h"

#include "ggml-impl.h"
#include "gguf.h"

#include <algorithm>
#include <cstdint>
#include <numeric>

// ids as they stand in files
static constexpr int32_t FILE_TYPE_42 = 42;

// in memory Q2_0 has the first id that upstream has not given away
static_assert(GGML_TYPE_F8_E4M3_B128 == FILE_TYPE_42 && GGML_TYPE_Q2_0 == FILE_TYPE_42 + 1 &&
              GGML_TYPE_COUNT == GGML_TYPE_Q2_0 + 1, "type 42 must be the last id of upstream's; rename after a bump");

struct claimant {
    dsv4_type42 id;
    const char * name;
    int64_t      block;       // values
    uint64_t     block_bytes;
};

// the smallest first
static constexpr claimant CLAIMANTS[] = {
    { DSV4_TYPE42_PRISM, "PrismML Q2_0", 128,  34 },
    { DSV4_TYPE42_Q2_0,  "Q2_0",          64,  18 },
    { DSV4_TYPE42_F8,    "F8_E4M3_B128", 128, 129 },
};

static constexpr uint32_t bit(dsv4_type42 id) {
    return 1u << id;
}

static const claimant * find_claimant(dsv4_type42 id) {
    for (const claimant & c : CLAIMANTS) {
        if (c.id == id) {
            return &c;
        }
    }
    return nullptr;
}

// Whether rows of t can be made of blocks of c. The bound keeps ggml_nbytes(), which multiplies ne0 by the block's
// bytes before it divides, from overflowing for shapes that a hostile header can name.
static bool divides(const claimant & c, const dsv4_type42_tensor & t) {
    return t.ne0 % c.block == 0 && t.n <= INT64_MAX/int64_t(c.block_bytes);
}

static uint64_t size_as(const claimant & c, const dsv4_type42_tensor & t) {
    return uint64_t(t.n/c.block)*c.block_bytes;
}

int32_t dsv4_gguf_type_to_file(ggml_type type) {
    return type == GGML_TYPE_Q2_0 ? FILE_TYPE_42 : int32_t(type);
}

bool dsv4_gguf_type_from_file(ggml_tensor & t) {
    if (int32_t(t.type) == GGML_TYPE_Q2_0) {
        GGML_LOG_ERROR("%s: tensor '%s' has invalid ggml type %d: no file format defines it\n", __func__, t.name, t.type);
        return false;
    }
    if (int32_t(t.type) == FILE_TYPE_42) {
        t.type = GGML_TYPE_Q2_0;
    }
    return true;
}

std::string dsv4_type42_tensor::describe() const {
    std::string text = "type 42, " + std::to_string(n) + " values in rows of " + std::to_string(ne0) + ", " +
        std::to_string(avail) + " bytes available";
    for (const claimant & c : CLAIMANTS) {
        text += std::string("; ") + c.name;
        if (ne0 % c.block == 0) {
            text += " takes " + std::to_string(size_as(c, *this));
        } else {
            text += " needs rows of a multiple of " + std::to_string(c.block);
        }
    }
    return text;
}

// The one verdict that the other tensors of the file share, or DSV4_TYPE42_NONE.
static dsv4_type42 common_verdict(const std::vector<dsv4_type42_tensor> & tensors) {
    dsv4_type42 common = DSV4_TYPE42_NONE;
    for (const dsv4_type42_tensor & t : tensors) {
        if (t.verdict == DSV4_TYPE42_NONE || t.verdict == common) {
            continue;
        }
        if (common != DSV4_TYPE42_NONE) {
            return DSV4_TYPE42_NONE;
        }
        common = t.verdict;
    }
    return common;
}

void dsv4_type42_decide(std::vector<dsv4_type42_tensor> & tensors, uint64_t alignment, uint64_t n_data_bytes) {
    std::vector<size_t> order(tensors.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return tensors[a].offset < tensors[b].offset; });

    bool has_prism = false;
    for (size_t i = 0; i < order.size(); i++) {
        dsv4_type42_tensor & t = tensors[order[i]];
        t.is_last = i + 1 == order.size();
        const uint64_t end = t.is_last ? n_data_bytes : tensors[order[i + 1]].offset;
        t.avail = end > t.offset ? end - t.offset : 0;
        if (!t.is_42) {
            continue;
        }
        for (const claimant & c : CLAIMANTS) {
            if (divides(c, t) && size_as(c, t) <= t.avail && t.avail - size_as(c, t) < alignment) {
                t.fits |= bit(c.id);
            }
        }
        has_prism = has_prism || t.fits == bit(DSV4_TYPE42_PRISM);
    }

    for (dsv4_type42_tensor & t : tensors) {
        if (t.fits == bit(DSV4_TYPE42_F8)) {
            t.verdict = DSV4_TYPE42_F8;
        } else if (t.fits == bit(DSV4_TYPE42_Q2_0)) {
            t.verdict = DSV4_TYPE42_Q2_0;
        } else if (t.fits == bit(DSV4_TYPE42_PRISM)) {
            t.verdict = DSV4_TYPE42_PRISM;
        } else if (t.fits == (bit(DSV4_TYPE42_Q2_0) | bit(DSV4_TYPE42_PRISM))) {
            t.verdict = has_prism ? DSV4_TYPE42_PRISM : DSV4_TYPE42_Q2_0;
        }
    }

    const dsv4_type42 common = common_verdict(tensors);
    if (common == DSV4_TYPE42_NONE) {
        return;
    }
    for (dsv4_type42_tensor & t : tensors) {
        if (!t.is_42 || t.verdict != DSV4_TYPE42_NONE) {
            continue;
        }
        if (t.fits == 0 ? t.is_last && divides(*find_claimant(common), t) : (t.fits & bit(common)) != 0) {
            t.verdict = common;
        }
    }
}

uint64_t dsv4_type42_size(const dsv4_type42_tensor & t) {
    return size_as(*find_claimant(t.verdict == DSV4_TYPE42_NONE ? DSV4_TYPE42_Q2_0 : t.verdict), t);
}

std::string dsv4_type42_reason(const dsv4_type42_tensor & t) {
    const char * reason = nullptr;
    if (t.verdict == DSV4_TYPE42_PRISM) {
        reason = "PrismML's Q2_0 with 34 bytes per 128 values is a known format, but not supported";
    } else if (t.is_last && t.fits == 0 && t.avail < dsv4_type42_size(t)) {
        reason = "the file is truncated; an interrupted download?";
    } else if (t.verdict == DSV4_TYPE42_NONE && t.fits == 0) {
        reason = "type 42 with an unknown block size";
    } else if (t.verdict == DSV4_TYPE42_NONE) {
        reason = "too small to tell what type 42 means here, and no other tensor decides";
    }
    return reason ? std::string(reason) + " (" + t.describe() + ")" : "";
}

bool dsv4_gguf_apply_type42(
        const std::vector<ggml_tensor *> & tensors, const std::vector<uint64_t> & offsets,
        uint64_t alignment, uint64_t n_data_bytes) {
    std::vector<dsv4_type42_tensor> list(tensors.size());
    for (size_t i = 0; i < list.size(); i++) {
        list[i].name   = tensors[i]->name;
        list[i].is_42  = tensors[i]->type == GGML_TYPE_Q2_0;
        list[i].ne0    = tensors[i]->ne[0];
        list[i].n      = ggml_nelements(tensors[i]);
        list[i].offset = offsets[i];
    }
    dsv4_type42_decide(list, alignment, n_data_bytes);

    for (size_t i = 0; i < list.size(); i++) {
        const dsv4_type42_tensor & t = list[i];
        if (!t.is_42) {
            continue;
        }
        // The successor's offset cannot be right for Q2_0 here: stock would complain about it in other words.
        if (!t.is_last && (t.fits & (bit(DSV4_TYPE42_F8) | bit(DSV4_TYPE42_Q2_0))) == 0) {
            GGML_LOG_ERROR("%s: tensor '%s': %s\n", __func__, t.name.c_str(), dsv4_type42_reason(t).c_str());
            return false;
        }
        if (t.verdict == DSV4_TYPE42_F8) {
            ggml_tensor * cur = tensors[i];
            cur->type  = GGML_TYPE_F8_E4M3_B128;
            cur->nb[0] = ggml_type_size(cur->type);
            cur->nb[1] = cur->nb[0]*(cur->ne[0]/ggml_blck_size(cur->type));
            for (int j = 2; j < GGML_MAX_DIMS; j++) {
                cur->nb[j] = cur->nb[j - 1]*cur->ne[j - 1];
            }
        }
    }
    return true;
}

std::vector<dsv4_type42_tensor> dsv4_type42_list(const gguf_context * gguf, uint64_t n_file_bytes) {
    std::vector<dsv4_type42_tensor> list(gguf_get_n_tensors(gguf));
    for (size_t i = 0; i < list.size(); i++) {
        const ggml_type type = gguf_get_tensor_type(gguf, i);
        const int64_t * ne   = gguf_get_tensor_ne(gguf, i);
        list[i].name   = gguf_get_tensor_name(gguf, i);
        list[i].is_42  = type == GGML_TYPE_F8_E4M3_B128 || type == GGML_TYPE_Q2_0;
        list[i].ne0    = ne[0];
        list[i].n      = ne[0]*ne[1]*ne[2]*ne[3];
        list[i].offset = gguf_get_tensor_offset(gguf, i);
    }
    const uint64_t data_offset = gguf_get_data_offset(gguf);
    dsv4_type42_decide(list, gguf_get_alignment(gguf), n_file_bytes > data_offset ? n_file_bytes - data_offset : 0);
    return list;
}
