#include "json-number.h"

#include <charconv>
#include <cmath>
#include <cstdlib>

std::string dsv4_json_number(double value) {
    if (!std::isfinite(value)) {
        return "null";
    }

    // d.ddddde[+-]xx: the shortest digits, from which the notation is built below (independent of the locale)
    char buf[64];
    const char * end = std::to_chars(buf, buf + sizeof(buf), value, std::chars_format::scientific).ptr;

    std::string digits;
    std::string sign;
    const char * p = buf;
    if (*p == '-') {
        sign = "-";
        p++;
    }
    for (; p != end && *p != 'e'; p++) {
        if (*p != '.') {
            digits += *p;
        }
    }
    const int exponent = std::atoi(std::string(p + 1, end).c_str()); // of the first digit

    if (exponent < -4 || exponent >= 16) {
        std::string out = sign + digits[0];
        if (digits.size() > 1) {
            out += "." + digits.substr(1);
        }
        const std::string e = std::to_string(std::abs(exponent));
        return out + (exponent < 0 ? "e-" : "e+") + (e.size() < 2 ? "0" + e : e);
    }
    if (exponent < 0) {
        return sign + "0." + std::string(-exponent - 1, '0') + digits;
    }
    const size_t n_int = exponent + 1;
    if (digits.size() <= n_int) {
        return sign + digits + std::string(n_int - digits.size(), '0') + ".0";
    }
    return sign + digits.substr(0, n_int) + "." + digits.substr(n_int);
}
