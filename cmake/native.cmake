# Attach our own sources to upstream's targets. Every folder below native/ is one include root.
set(PYLLAMA_DSV4_NATIVE ${CMAKE_SOURCE_DIR}/native)

file(GLOB _ggml_sources  CONFIGURE_DEPENDS ${PYLLAMA_DSV4_NATIVE}/ggml/*.c ${PYLLAMA_DSV4_NATIVE}/ggml/*.cpp)
file(GLOB _llama_sources CONFIGURE_DEPENDS ${PYLLAMA_DSV4_NATIVE}/llama/*.cpp)
file(GLOB _capi_sources  CONFIGURE_DEPENDS ${PYLLAMA_DSV4_NATIVE}/capi/*.cpp)

if (_ggml_sources)
    target_sources(ggml-base PRIVATE ${_ggml_sources})
endif()
target_include_directories(ggml-base PUBLIC ${PYLLAMA_DSV4_NATIVE}/ggml)

# kernels, compiled with the instruction set of the CPU backend
file(GLOB _ggml_cpu_sources CONFIGURE_DEPENDS ${PYLLAMA_DSV4_NATIVE}/ggml/cpu/*.c)
target_sources(ggml-cpu PRIVATE ${_ggml_cpu_sources})
target_include_directories(ggml-cpu PUBLIC ${PYLLAMA_DSV4_NATIVE}/ggml/cpu)

if (GGML_CUDA)
    include(cmake/cuda-kernels.cmake)
endif()

if (_llama_sources)
    target_sources(llama PRIVATE ${_llama_sources})
    # upstream builds its models as one unit; ours keep their own file scope
    set_source_files_properties(${_llama_sources}
        TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
endif()
target_include_directories(llama PRIVATE ${PYLLAMA_DSV4_NATIVE}/llama)
# CMake 4: unity files include relative paths, so that another clone's compiler cache knows them
set_target_properties(llama PROPERTIES UNITY_BUILD_RELOCATABLE ON)

# the V4 chat template, compiled in: it replaces the malformed one of native files
set(_template ${PYLLAMA_DSV4_LLAMA_CPP}/models/templates/deepseek-ai-DeepSeek-V4.jinja)
set(_template_cpp ${CMAKE_BINARY_DIR}/dsv4-chat-template.cpp)
add_custom_command(
    OUTPUT  ${_template_cpp}
    COMMAND ${CMAKE_COMMAND} -DINPUT=${_template} -DOUTPUT=${_template_cpp} -DSYMBOL=dsv4_chat_template
            -P ${CMAKE_SOURCE_DIR}/cmake/embed_text.cmake
    DEPENDS ${_template} ${CMAKE_SOURCE_DIR}/cmake/embed_text.cmake
    VERBATIM)
add_custom_target(dsv4-chat-template DEPENDS ${_template_cpp})
target_sources(llama PRIVATE ${_template_cpp})
set_source_files_properties(${_template_cpp}
    TARGET_DIRECTORY llama PROPERTIES GENERATED ON SKIP_UNITY_BUILD_INCLUSION ON)
add_dependencies(llama dsv4-chat-template)
