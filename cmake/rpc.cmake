# Upstream's RPC backend as a static library of our own, entered by function. Upstream's option GGML_RPC would define a
# macro for every file that is compiled, and look for RDMA libraries.
set(_rpc ${PYLLAMA_DSV4_LLAMA_CPP}/ggml/src/ggml-rpc)
file(GLOB _rpc_native CONFIGURE_DEPENDS ${PYLLAMA_DSV4_NATIVE}/rpc/*.cpp)

add_library(pyllama-rpc STATIC EXCLUDE_FROM_ALL ${_rpc}/ggml-rpc.cpp ${_rpc}/transport.cpp ${_rpc_native})
target_include_directories(pyllama-rpc PUBLIC  ${PYLLAMA_DSV4_NATIVE}/rpc)
target_include_directories(pyllama-rpc PRIVATE ${_rpc} ${PYLLAMA_DSV4_LLAMA_CPP}/ggml/src)
find_package(Threads REQUIRED)
target_link_libraries(pyllama-rpc PUBLIC ggml Threads::Threads)

# peers of another patch series are refused
set_source_files_properties(${PYLLAMA_DSV4_NATIVE}/rpc/dsv4-link.cpp
    PROPERTIES COMPILE_DEFINITIONS DSV4_RPC_SERIES="${PYLLAMA_DSV4_SERIES_DIGEST}")

# a buffer on a worker that was lost throws through this C file
set_source_files_properties(${PYLLAMA_DSV4_LLAMA_CPP}/ggml/src/ggml-alloc.c
    TARGET_DIRECTORY ggml-base PROPERTIES COMPILE_OPTIONS "$<$<C_COMPILER_ID:GNU,Clang,AppleClang>:-fexceptions>")
