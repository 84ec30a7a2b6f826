// Why a model file is refused: one exception type that carries the facts, and its two renderings (text, JSON).
// Owns the wording rules; leaves the checks themselves to dsv4-check, dsv4-hparams and dsv4-tensors.

#pragma once

#include <stdexcept>
#include <string>

// Classes of refusals. The names are those of the Python exceptions (pyllama_dsv4/errors.py).
enum dsv4_kind {
    DSV4_MODEL_NOT_FOUND,
    DSV4_MODEL_FILE,
    DSV4_NOT_GGUF,
    DSV4_TRUNCATED,
    DSV4_FORMAT,
    DSV4_TYPE42,
    DSV4_UNSUPPORTED,
    DSV4_DIALECT,
    DSV4_MISSING_KEY,
    DSV4_MISSING_TENSOR,
    DSV4_TENSOR_SHAPE,
};

const char * dsv4_kind_name(dsv4_kind kind);

// All but `what` may be empty.
struct dsv4_facts {
    std::string path;
    std::string tensor;   // as spelled in the file
    std::string key;      // full name
    std::string what;     // what was attempted and went wrong, one clause
    std::string found;
    std::string expected;
    std::string hint;     // what the user can do, one sentence without its full stop
};

// A JSON string. Bytes that are not UTF-8 become \udc80..\udcff, as Python's "surrogateescape" reads them.
std::string dsv4_json_string(const std::string & text);

struct dsv4_refusal : std::runtime_error {
    dsv4_refusal(dsv4_kind kind, const dsv4_facts & facts);

    dsv4_kind  kind;
    dsv4_facts facts;

    // {"ok": false, "kind", "path", "tensor", "key", "what", "found", "expected", "hint", "message"}; absent facts are null.
    std::string json() const;
};
