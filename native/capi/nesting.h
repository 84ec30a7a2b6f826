// How deeply JSON text is nested. Upstream's JSON, template and parser code recurses over nested values, and a text
// made of brackets could use up the stack. Internal to native/capi.
#pragma once

#include <algorithm>
#include <cstddef>

constexpr int PYL_N_NESTED_MAX = 256;

inline int pyl_json_nesting(const char * text, size_t n) {
    int  depth     = 0;
    int  deepest   = 0;
    bool in_string = false;
    for (size_t i = 0; i < n; i++) {
        const char c = text[i];
        if (in_string) {
            if (c == '\\') {
                i++;
            } else if (c == '"') {
                in_string = false;
            }
        } else if (c == '"') {
            in_string = true;
        } else if (c == '[' || c == '{') {
            deepest = std::max(deepest, ++depth);
        } else if (c == ']' || c == '}') {
            depth--;
        }
    }
    return deepest;
}
