# Native tests: our own programs below native/tests, and those of upstream that the patches touch.
set(_upstream_tests ${PYLLAMA_DSV4_LLAMA_CPP}/tests)

file(GLOB _test_sources CONFIGURE_DEPENDS
    ${PYLLAMA_DSV4_NATIVE}/tests/test-*.c ${PYLLAMA_DSV4_NATIVE}/tests/test-*.cpp)

add_custom_target(pyllama_dsv4_tests)

foreach (_source ${_test_sources})
    get_filename_component(_name ${_source} NAME_WE)
    add_executable(${_name} EXCLUDE_FROM_ALL ${_source})
    target_link_libraries(${_name} PRIVATE llama-common llama)
    target_include_directories(${_name} PRIVATE
        ${PYLLAMA_DSV4_NATIVE}/codec ${PYLLAMA_DSV4_NATIVE}/llama
        ${PYLLAMA_DSV4_LLAMA_CPP}/src ${PYLLAMA_DSV4_LLAMA_CPP}/ggml/src)
    add_test(NAME ${_name} COMMAND ${_name})
    set_tests_properties(${_name} PROPERTIES LABELS own WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
    add_dependencies(pyllama_dsv4_tests ${_name})
endforeach()

# name, then the arguments of its run
function(pyllama_dsv4_upstream_test name)
    add_executable(${name} EXCLUDE_FROM_ALL ${_upstream_tests}/${name}.cpp)
    target_link_libraries(${name} PRIVATE llama-common llama)
    target_include_directories(${name} PRIVATE ${PYLLAMA_DSV4_NATIVE}/tests ${PYLLAMA_DSV4_LLAMA_CPP}/ggml/src)
    add_test(NAME ${name} COMMAND ${name} ${ARGN})
    set_tests_properties(${name} PROPERTIES LABELS upstream)
    add_dependencies(pyllama_dsv4_tests ${name})
endfunction()

pyllama_dsv4_upstream_test(test-quantize-fns)
pyllama_dsv4_upstream_test(test-gguf 1234)
pyllama_dsv4_upstream_test(test-backend-ops test -b CPU -p "f8_e4m3|mxfp4|q2_0|act_quant")
pyllama_dsv4_upstream_test(test-llama-archs)

# bench/: not part of any test
add_executable(bench-products EXCLUDE_FROM_ALL ${CMAKE_SOURCE_DIR}/bench/products.cpp)
target_link_libraries(bench-products PRIVATE llama)
target_include_directories(bench-products PRIVATE ${PYLLAMA_DSV4_LLAMA_CPP}/ggml/src)

# The CUDA kernels' own source on the CPU, no CUDA toolkit needed: once fast, once under the sanitizers. The fibers are
# POSIX's.
if (UNIX AND NOT APPLE)
    file(GLOB _kernels CONFIGURE_DEPENDS ${PYLLAMA_DSV4_NATIVE}/cuda/*.cu)
    list(FILTER _kernels EXCLUDE REGEX "/dsv4-cuda\\.cu$") # belongs to upstream's backend
    set(_host ${PYLLAMA_DSV4_NATIVE}/tests/cuda-host)
    set(_host_sources ${_host}/test-cuda-kernels.cpp ${_host}/cuda-host.cpp)
    foreach (_kernel ${_kernels})
        get_filename_component(_name ${_kernel} NAME_WE)
        # a C++ file for each, because .cu is CUDA's where that is enabled
        file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/cuda-host/${_name}.cpp CONTENT "#include \"${_kernel}\"\n")
        list(APPEND _host_sources ${CMAKE_BINARY_DIR}/cuda-host/${_name}.cpp)
    endforeach()

    foreach (_name test-cuda-kernels test-cuda-kernels-asan)
        add_executable(${_name} EXCLUDE_FROM_ALL ${_host_sources})
        target_link_libraries(${_name} PRIVATE llama)
        target_compile_definitions(${_name} PRIVATE DSV4_CUDA_HOST)
        target_compile_options(${_name} PRIVATE -Wno-unknown-pragmas -ffp-contract=off)
        target_include_directories(${_name} PRIVATE
            ${_host} ${PYLLAMA_DSV4_NATIVE}/cuda ${PYLLAMA_DSV4_LLAMA_CPP}/ggml/src)
        add_test(NAME ${_name} COMMAND ${_name})
        set_tests_properties(${_name} PROPERTIES LABELS own)
        add_dependencies(pyllama_dsv4_tests ${_name})
    endforeach()
    target_compile_options(test-cuda-kernels-asan PRIVATE -fsanitize=address,undefined -fno-sanitize-recover=all)
    target_link_options(test-cuda-kernels-asan PRIVATE -fsanitize=address,undefined)
endif()

# on a machine without the GPU it would pass without a test
if (GGML_CUDA)
    add_test(NAME test-backend-ops-cuda COMMAND test-backend-ops test -b CUDA0 -p "f8_e4m3|mxfp4|bf16|act_quant|SOFTPLUS|ROPE")
    set_tests_properties(test-backend-ops-cuda PROPERTIES LABELS gpu SKIP_REGULAR_EXPRESSION "Testing 1 devices")
endif()
