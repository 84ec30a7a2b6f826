# Upstream's server as a static library that the CLI enters by function; without its web pages, which only a download
# or npm could provide. Its own library, so that a change in it compiles nothing else.
set(_server ${PYLLAMA_DSV4_LLAMA_CPP}/tools/server)
file(GLOB _server_sources CONFIGURE_DEPENDS ${_server}/*.cpp)
file(GLOB _server_native  CONFIGURE_DEPENDS ${PYLLAMA_DSV4_NATIVE}/server/*.cpp)

# tools/ui without assets: what scripts/ui-assets.cmake writes when it finds none
set(ASSET_ARRAYS "")
set(N_ASSETS     0)
set(ASSET_TABLE  "")
set(USE_GZIP     false)
unset(LLAMA_UI_HAS_ASSETS)
set(_ui ${CMAKE_BINARY_DIR}/server-ui)
configure_file(${PYLLAMA_DSV4_LLAMA_CPP}/tools/ui/ui.h.in   ${_ui}/ui.h   @ONLY)
configure_file(${PYLLAMA_DSV4_LLAMA_CPP}/tools/ui/ui.cpp.in ${_ui}/ui.cpp @ONLY)

add_library(pyllama-server STATIC EXCLUDE_FROM_ALL ${_server_sources} ${_server_native} ${_ui}/ui.cpp)
target_include_directories(pyllama-server PRIVATE
    ${PYLLAMA_DSV4_NATIVE}/llama ${PYLLAMA_DSV4_NATIVE}/server
    ${_server} ${_ui} ${PYLLAMA_DSV4_LLAMA_CPP} ${PYLLAMA_DSV4_LLAMA_CPP}/src)
target_link_libraries(pyllama-server PUBLIC pyllama-capi llama-common llama mtmd cpp-httplib)
