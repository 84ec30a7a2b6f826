# Configure upstream: static libraries, nothing installed, nothing downloaded, no dependence on the enclosing git.
set(PYLLAMA_DSV4_LLAMA_CPP ${CMAKE_SOURCE_DIR}/vendor/llama.cpp)
set(PYLLAMA_DSV4_STAMP     ${PYLLAMA_DSV4_LLAMA_CPP}/.pyllama-dsv4-stamp.json)

if (NOT EXISTS ${PYLLAMA_DSV4_STAMP})
    message(FATAL_ERROR
        "vendor/llama.cpp is missing or unfinished. Build with pip (pip install .), or run: "
        "python buildutils/vendor.py")
endif()

# a new stamp (pin or patches changed) must configure again: the digest is compiled in
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PYLLAMA_DSV4_STAMP})
file(READ ${PYLLAMA_DSV4_STAMP} _stamp)
string(JSON PYLLAMA_DSV4_PIN_COMMIT    GET "${_stamp}" commit)
string(JSON PYLLAMA_DSV4_SERIES_DIGEST GET "${_stamp}" series)

set(BUILD_SHARED_LIBS    OFF)
set(LLAMA_BUILD_COMMON   ON)
set(LLAMA_BUILD_TESTS    OFF)
set(LLAMA_BUILD_TOOLS    OFF)
set(LLAMA_BUILD_EXAMPLES OFF)
set(LLAMA_BUILD_SERVER   OFF)
set(LLAMA_BUILD_APP      OFF)
set(LLAMA_BUILD_UI       OFF)
set(LLAMA_BUILD_MTMD     ON) # the server's; its targets are cmake/server.cmake's
set(LLAMA_USE_PREBUILT_UI OFF)
set(LLAMA_OPENSSL        OFF)
set(LLAMA_SUBPROCESS     OFF)
set(LLAMA_LLGUIDANCE     OFF)
set(LLAMA_BUILD_NUMBER   0)
string(SUBSTRING ${PYLLAMA_DSV4_PIN_COMMIT} 0 9 LLAMA_BUILD_COMMIT)

# ggml's own thread pool: libgomp would be a run-time dependency of the wheel, and it does not survive a fork
option(GGML_OPENMP "ggml: use OpenMP" OFF)

# Upstream asks git for a commit, and git would answer with ours: every commit would recompile ggml.
set(_saved_git_dir "$ENV{GIT_DIR}")
set(ENV{GIT_DIR} "${CMAKE_BINARY_DIR}/no-git")
add_subdirectory(${PYLLAMA_DSV4_LLAMA_CPP} ${CMAKE_BINARY_DIR}/llama.cpp EXCLUDE_FROM_ALL SYSTEM)
if (_saved_git_dir)
    set(ENV{GIT_DIR} "${_saved_git_dir}")
else()
    unset(ENV{GIT_DIR})
endif()
