# The CUDA flavour (-C cmake.define.GGML_CUDA=ON): finds what a toolkit without development packages lacks, in pip's
# packages, and attaches our kernels to upstream's backend. Read before upstream is added; dsv4_attach_cuda() after it.
#
# The extension must be importable on a machine without a GPU or driver: the CUDA runtime is linked statically, and
# libcuda.so not at all, which costs the growing memory pool (GGML_CUDA_NO_VMM). Only libcublas stays a shared library,
# because it is larger than anything else; pyllama_dsv4/_native.py finds the one that pip installed.

find_package(Python REQUIRED COMPONENTS Interpreter)
find_package(CUDAToolkit REQUIRED)

if (NOT DEFINED CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER ${CUDAToolkit_NVCC_EXECUTABLE})
endif()

set(GGML_CUDA_NO_VMM ON CACHE BOOL "the driver's library would be needed at import")

# pip's nvidia-cublas: headers and libcublas.so.<major>, without the link that a linker looks for
set(PYLLAMA_DSV4_CUDA_INCLUDE "")
if (NOT CUDA_cublas_LIBRARY)
    execute_process(
        COMMAND ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/buildutils/find_cuda.py ${CUDAToolkit_VERSION_MAJOR}
        OUTPUT_VARIABLE _folder OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _status)
    if (NOT _status EQUAL 0)
        message(FATAL_ERROR
            "GGML_CUDA is on, but the toolkit in ${CUDAToolkit_LIBRARY_ROOT} has no cuBLAS and pip's is not installed. "
            "Install it beside the build: pip install 'nvidia-cublas==${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}.*', "
            "then build with --no-build-isolation.")
    endif()
    set(CUDA_cublas_LIBRARY   ${_folder}/lib/libcublas.so.${CUDAToolkit_VERSION_MAJOR}   CACHE FILEPATH "of pip" FORCE)
    set(CUDA_cublasLt_LIBRARY ${_folder}/lib/libcublasLt.so.${CUDAToolkit_VERSION_MAJOR} CACHE FILEPATH "of pip" FORCE)
    set(PYLLAMA_DSV4_CUDA_INCLUDE ${_folder}/include)
    message(STATUS "cuBLAS: ${CUDA_cublas_LIBRARY}")
endif()
if (CUDA_cudart_static_LIBRARY)
    set(CUDA_cudart_LIBRARY ${CUDA_cudart_static_LIBRARY} CACHE FILEPATH "the runtime is linked statically" FORCE)
endif()

# Our kernels are compiled apart: upstream compiles its own with -use_fast_math, which flushes subnormals, and those
# are part of FP8.
function(dsv4_attach_cuda)
    target_include_directories(ggml-cuda SYSTEM PRIVATE ${PYLLAMA_DSV4_CUDA_INCLUDE})
    target_include_directories(ggml-cuda PRIVATE ${PYLLAMA_DSV4_NATIVE}/cuda)

    file(GLOB _sources CONFIGURE_DEPENDS ${PYLLAMA_DSV4_NATIVE}/cuda/*.cu)
    if (_sources)
        add_library(dsv4-cuda OBJECT ${_sources})
        target_include_directories(dsv4-cuda SYSTEM PRIVATE ${PYLLAMA_DSV4_CUDA_INCLUDE})
        target_include_directories(dsv4-cuda PRIVATE
            ${PYLLAMA_DSV4_NATIVE}/cuda ${PYLLAMA_DSV4_LLAMA_CPP}/ggml/src ${PYLLAMA_DSV4_LLAMA_CPP}/ggml/src/ggml-cuda)
        target_link_libraries(dsv4-cuda PRIVATE ggml-base CUDA::cudart)
        target_compile_options(dsv4-cuda PRIVATE -extended-lambda)
        target_compile_definitions(dsv4-cuda PRIVATE GGML_CUDA_NO_VMM)
        set_target_properties(dsv4-cuda PROPERTIES CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
        target_sources(ggml-cuda PRIVATE $<TARGET_OBJECTS:dsv4-cuda>)
    endif()
endfunction()
