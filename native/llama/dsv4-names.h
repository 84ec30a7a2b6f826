// Tensor names of the two dialects of DeepSeek-V4 files. Owns the one table of names that differ.

#pragma once

#include <string>

// Which dialect a name can only belong to; most names are the same in both.
enum dsv4_form {
    DSV4_FORM_BOTH,
    DSV4_FORM_NATIVE,
    DSV4_FORM_UPSTREAM,
};

dsv4_form dsv4_name_form(const std::string & name);

// Names that do not differ come back unchanged.
std::string dsv4_native_to_upstream(const std::string & name);
std::string dsv4_upstream_to_native(const std::string & name);
