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
