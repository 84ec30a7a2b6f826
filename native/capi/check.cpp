// The loader's verdict on a file, without loading it.

#include "error.h"

#include "dsv4-check.h"

#include <cstring>

int32_t pyl_check_file(const char * path, char ** verdict) {
    return pyl_guard([&]() -> int32_t {
        *verdict = nullptr;
        std::string json;
        dsv4_check_file(path, json);
        *verdict = strdup(json.c_str());
        return *verdict ? PYL_OK : PYL_ERROR_MEMORY;
    });
}
