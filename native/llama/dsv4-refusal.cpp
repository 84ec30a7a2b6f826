#include "dsv4-refusal.h"

#include <cstdint>
#include <cstdio>

const char * dsv4_kind_name(dsv4_kind kind) {
    switch (kind) {
        case DSV4_MODEL_NOT_FOUND: return "ModelNotFoundError";
        case DSV4_MODEL_FILE:      return "ModelFileError";
        case DSV4_NOT_GGUF:        return "NotGGUFError";
        case DSV4_TRUNCATED:       return "TruncatedFileError";
        case DSV4_FORMAT:          return "FormatError";
        case DSV4_TYPE42:          return "Type42Error";
        case DSV4_UNSUPPORTED:     return "UnsupportedModelError";
        case DSV4_DIALECT:         return "DialectError";
        case DSV4_MISSING_KEY:     return "MissingKeyError";
        case DSV4_MISSING_TENSOR:  return "MissingTensorError";
        case DSV4_TENSOR_SHAPE:    return "TensorShapeError";
    }
    return "FormatError";
}

// Same sentence as PyllamaError builds: path: what (tensor 'T', key 'K'); found F, expected E. Hint.
static std::string message_of(const dsv4_facts & f) {
    std::string where;
    if (!f.tensor.empty()) {
        where += "tensor '" + f.tensor + "'";
    }
    if (!f.key.empty()) {
        where += (where.empty() ? "key '" : ", key '") + f.key + "'";
    }

    std::string text = f.path.empty() ? f.what : f.path + ": " + f.what;
    if (!where.empty()) {
        text += " (" + where + ")";
    }
    if (!f.found.empty()) {
        text += "; found " + f.found;
    }
    if (!f.expected.empty()) {
        text += (f.found.empty() ? "; expected " : ", expected ") + f.expected;
    }
    if (!f.hint.empty()) {
        text += ". " + f.hint;
    }
    return text;
}

dsv4_refusal::dsv4_refusal(dsv4_kind kind, const dsv4_facts & facts) :
    std::runtime_error(message_of(facts)), kind(kind), facts(facts) {
}

// Length of the UTF-8 sequence at s[i], 0 if it is not one (overlong forms and surrogates are not).
static size_t utf8_len(const std::string & s, size_t i) {
    const auto at = [&](size_t j) { return j < s.size() ? (uint8_t) s[j] : (uint8_t) 0; };

    const uint8_t c = at(i);
    if (c < 0x80) {
        return 1;
    }

    size_t  n  = 0;
    uint8_t lo = 0x80; // range of the second byte
    uint8_t hi = 0xBF;
    if      (c >= 0xC2 && c <= 0xDF) { n = 2; }
    else if (c >= 0xE0 && c <= 0xEF) { n = 3; lo = c == 0xE0 ? 0xA0 : 0x80; hi = c == 0xED ? 0x9F : 0xBF; }
    else if (c >= 0xF0 && c <= 0xF4) { n = 4; lo = c == 0xF0 ? 0x90 : 0x80; hi = c == 0xF4 ? 0x8F : 0xBF; }
    else                             { return 0; }

    if (at(i + 1) < lo || at(i + 1) > hi) {
        return 0;
    }
    for (size_t j = 2; j < n; ++j) {
        if (at(i + j) < 0x80 || at(i + j) > 0xBF) {
            return 0;
        }
    }
    return n;
}

std::string dsv4_json_string(const std::string & s) {
    std::string out = "\"";
    char buf[8];
    for (size_t i = 0; i < s.size(); ) {
        const uint8_t c = s[i];
        const size_t  n = utf8_len(s, i);
        if (n == 0) {
            snprintf(buf, sizeof(buf), "\\udc%02x", c);
            out += buf;
            i += 1;
        } else if (n == 1 && (c < 0x20 || c == '"' || c == '\\')) {
            snprintf(buf, sizeof(buf), "\\u%04x", c);
            out += buf;
            i += 1;
        } else {
            out.append(s, i, n);
            i += n;
        }
    }
    return out + "\"";
}

std::string dsv4_refusal::json() const {
    const auto field = [](const char * name, const std::string & value) {
        return std::string(", \"") + name + "\": " + (value.empty() ? "null" : dsv4_json_string(value));
    };
    return "{\"ok\": false" +
        field("kind",     dsv4_kind_name(kind)) +
        field("path",     facts.path) +
        field("tensor",   facts.tensor) +
        field("key",      facts.key) +
        field("what",     facts.what) +
        field("found",    facts.found) +
        field("expected", facts.expected) +
        field("hint",     facts.hint) +
        field("message",  what()) + "}";
}
