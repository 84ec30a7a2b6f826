# The CUDA flavour (-C cmake.define.GGML_CUDA=ON): finds what a toolkit without development packages lacks, in pip's
# packages. Read before upstream is added; cuda-kernels.cmake after it.
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
    set(PYLLAMA_DSV4_CUDA_INCLUDE ${_folder}/include CACHE PATH "of pip" FORCE)
    message(STATUS "cuBLAS: ${CUDA_cublas_LIBRARY}")
endif()
if (CUDA_cudart_static_LIBRARY)
    set(CUDA_cudart_LIBRARY ${CUDA_cudart_static_LIBRARY} CACHE FILEPATH "the runtime is linked statically" FORCE)
endif()
