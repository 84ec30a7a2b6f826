# The instruction set of the engine: this machine's, or one that most machines have. Our kernels are chosen at run time
# either way; this is about everything else, which is compiled once.
option(PYLLAMA_DSV4_PORTABLE "x86-64: build for AVX2 (x86-64-v3) instead of for this machine, to give the wheel away" OFF)

if (PYLLAMA_DSV4_PORTABLE)
    set(GGML_NATIVE OFF)
endif()

# What a CPU must have before the extension may be loaded: an instruction it lacks ends the process.
set(PYLLAMA_DSV4_CPU_FEATURES "")
if (CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_C_COMPILER_ID MATCHES "GNU|Clang")
    set(_known AVX AVX2 FMA BMI2 AVX512F AVX512BW AVX512CD AVX512DQ AVX512VL AVX512VBMI AVX512VNNI AVX512BF16)
    if (PYLLAMA_DSV4_PORTABLE)
        set(_has AVX AVX2 FMA BMI2)
    else()
        execute_process(COMMAND ${CMAKE_C_COMPILER} -march=native -dM -E -x c /dev/null
            OUTPUT_VARIABLE _macros ERROR_QUIET)
        set(_has "")
        foreach (_feature ${_known})
            if (_macros MATCHES "#define __${_feature}__ 1")
                list(APPEND _has ${_feature})
            endif()
        endforeach()
    endif()
    string(TOLOWER "${_has}" _has)
    list(JOIN _has " " PYLLAMA_DSV4_CPU_FEATURES)
endif()
