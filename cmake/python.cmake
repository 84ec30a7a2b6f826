# The two Python modules: _llama (cffi, API mode; everything native in one file) and _codec (pybind11, header-only).
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)

set(_package ${CMAKE_SOURCE_DIR}/pyllama_dsv4)

# --- capi: the seam to upstream's C++ ---
configure_file(${PYLLAMA_DSV4_NATIVE}/capi/build-info.cpp.in ${CMAKE_BINARY_DIR}/pyl-build-info.cpp @ONLY)
add_library(pyllama-capi STATIC ${_capi_sources} ${CMAKE_BINARY_DIR}/pyl-build-info.cpp)
target_include_directories(pyllama-capi PUBLIC ${PYLLAMA_DSV4_NATIVE}/capi)
target_include_directories(pyllama-capi PRIVATE ${PYLLAMA_DSV4_NATIVE}/llama ${PYLLAMA_DSV4_LLAMA_CPP}/src)
target_link_libraries(pyllama-capi PUBLIC llama-common llama)

include(cmake/server.cmake)

# --- _llama ---
set(_llama_c ${CMAKE_BINARY_DIR}/_llama.c)
add_custom_command(
    OUTPUT  ${_llama_c}
    COMMAND ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/buildutils/build_cffi.py ${_package}/cdef.h ${_llama_c}
    DEPENDS ${CMAKE_SOURCE_DIR}/buildutils/build_cffi.py ${_package}/cdef.h
    COMMENT "cffi: _llama.c"
    VERBATIM)

python_add_library(_llama MODULE WITH_SOABI ${_llama_c})
target_link_libraries(_llama PRIVATE pyllama-server pyllama-capi)

# Only the init symbol is visible: no clash with another llama.cpp in the same process.
if (APPLE)
    target_link_options(_llama PRIVATE "LINKER:-exported_symbol,_PyInit__llama" "LINKER:-dead_strip")
elseif (UNIX)
    file(WRITE ${CMAKE_BINARY_DIR}/exports.map "{ global: PyInit__llama; local: *; };\n")
    target_link_options(_llama PRIVATE "LINKER:--version-script=${CMAKE_BINARY_DIR}/exports.map"
        "LINKER:--gc-sections" "$<$<CONFIG:Release>:LINKER:--strip-all>")
endif()

# --- _codec ---
execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
    OUTPUT_VARIABLE _pybind11_dir OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(pybind11 CONFIG REQUIRED PATHS ${_pybind11_dir} NO_DEFAULT_PATH)
pybind11_add_module(_codec MODULE ${PYLLAMA_DSV4_NATIVE}/codec/module.cpp)
target_include_directories(_codec PRIVATE ${PYLLAMA_DSV4_NATIVE}/codec)
target_compile_definitions(_codec PRIVATE PYLLAMA_DSV4_CPU_FEATURES="${PYLLAMA_DSV4_CPU_FEATURES}")
find_package(Threads REQUIRED)
target_link_libraries(_codec PRIVATE Threads::Threads)

add_custom_target(pyllama_dsv4_modules DEPENDS _llama _codec)

install(TARGETS _llama _codec LIBRARY DESTINATION pyllama_dsv4 COMPONENT pyllama_dsv4)
install(FILES ${PYLLAMA_DSV4_LLAMA_CPP}/models/templates/deepseek-ai-DeepSeek-V4.jinja
    DESTINATION pyllama_dsv4/data RENAME chat_template_v4.jinja COMPONENT pyllama_dsv4)
install(FILES ${PYLLAMA_DSV4_LLAMA_CPP}/models/templates/deepseek-ai-DeepSeek-V4-Flash-0731.jinja
    DESTINATION pyllama_dsv4/data RENAME chat_template_v4_0731.jinja COMPONENT pyllama_dsv4)
