# Write a C++ source that holds a text file as one constant.
# cmake -DINPUT=<file> -DOUTPUT=<source> -DSYMBOL=<name> -P embed_text.cmake
#
# The text is emitted as numbers: no quoting rules, no limit on the length of a string literal.
foreach (_arg INPUT OUTPUT SYMBOL)
    if (NOT DEFINED ${_arg})
        message(FATAL_ERROR "embed_text.cmake: -D${_arg}=... is missing")
    endif()
endforeach()

file(READ "${INPUT}" _hex HEX)
string(REGEX REPLACE "(................................)" "\\1\n    " _hex "${_hex}") # 16 bytes a line
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "'\\\\x\\1'," _bytes "${_hex}")
get_filename_component(_name "${INPUT}" NAME)
file(WRITE "${OUTPUT}"
"// Generated from ${_name} by cmake/embed_text.cmake.
static const char text[] = {
    ${_bytes} '\\0'
};

extern const char * const ${SYMBOL};
const char * const ${SYMBOL} = text;
")
