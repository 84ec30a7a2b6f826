# Attach our kernels to upstream's CUDA backend. Compiled apart: upstream compiles its own with -use_fast_math, which flushes
# subnormals, and those are part of FP8.
get_target_property(CMAKE_CUDA_ARCHITECTURES ggml-cuda CUDA_ARCHITECTURES)
enable_language(CUDA)

target_include_directories(ggml-cuda SYSTEM PRIVATE ${PYLLAMA_DSV4_CUDA_INCLUDE})
target_include_directories(ggml-cuda PRIVATE ${PYLLAMA_DSV4_NATIVE}/cuda)

file(GLOB _cuda_sources CONFIGURE_DEPENDS ${PYLLAMA_DSV4_NATIVE}/cuda/*.cu)
add_library(dsv4-cuda OBJECT ${_cuda_sources})
target_include_directories(dsv4-cuda SYSTEM PRIVATE ${PYLLAMA_DSV4_CUDA_INCLUDE})
target_include_directories(dsv4-cuda PRIVATE ${PYLLAMA_DSV4_NATIVE}/cuda ${PYLLAMA_DSV4_LLAMA_CPP}/ggml/src)
target_link_libraries(dsv4-cuda PRIVATE ggml-base CUDA::cudart)
target_compile_options(dsv4-cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-extended-lambda>")
# what upstream's common.cuh must see as its own files do
target_compile_definitions(dsv4-cuda PRIVATE $<TARGET_PROPERTY:ggml-cuda,COMPILE_DEFINITIONS>)
target_sources(ggml-cuda PRIVATE $<TARGET_OBJECTS:dsv4-cuda>)
