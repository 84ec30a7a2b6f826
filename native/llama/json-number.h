// How a floating-point number is written in the JSON text of a prompt. Called by the tojson filter of upstream's
// template engine (patches/common-jinja-json-numbers.patch); integers never come here.
#pragma once

#include <string>

// The shortest decimal text that reads back as the same double, in the notation of Python's json module, because
// DeepSeek's own prompt encoder uses that: 1.0, 0.1, 1e-05, 1e+16, 1000000000000000.0. JSON has no NaN and no
// infinity; these give null.
std::string dsv4_json_number(double value);
