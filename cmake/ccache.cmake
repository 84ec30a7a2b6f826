# Use ccache when it is installed. Paths below the source folder are hashed relative to it, so that another clone
# of the same sources hits the same entries; the build folder lies inside the source folder for that reason.
option(PYLLAMA_DSV4_CCACHE "use ccache when found" ON)

if (PYLLAMA_DSV4_CCACHE AND NOT CMAKE_C_COMPILER_LAUNCHER)
    find_program(CCACHE_PROGRAM ccache)
    if (CCACHE_PROGRAM)
        set(_launcher ${CMAKE_COMMAND} -E env
            CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=true
            CCACHE_SLOPPINESS=time_macros,include_file_ctime,include_file_mtime
            ${CCACHE_PROGRAM})
        set(CMAKE_C_COMPILER_LAUNCHER    ${_launcher})
        set(CMAKE_CXX_COMPILER_LAUNCHER  ${_launcher})
        set(CMAKE_CUDA_COMPILER_LAUNCHER ${_launcher})
    endif()
    message(STATUS "ccache: ${CCACHE_PROGRAM}")
    # ggml looks for ccache by itself and would set a launcher without our base folder
    set(GGML_CCACHE OFF CACHE BOOL "handled by cmake/ccache.cmake" FORCE)
endif()
