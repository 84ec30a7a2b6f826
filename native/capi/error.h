// The one place where C++ exceptions become status codes. Internal to native/capi.

#pragma once

#include "pyllama.h"
#include "dsv4-link.h"

#include <exception>
#include <new>
#include <string>

void pyl_set_error(const std::string & text);

// Run fn; return its value, or the status of what it threw (as a pyl_status converted to the return type).
template <typename F>
int32_t pyl_guard(F && fn) {
    try {
        pyl_set_error("");
        return fn();
    } catch (const std::bad_alloc &) {
        pyl_set_error("out of memory");
        return PYL_ERROR_MEMORY;
    } catch (const dsv4_rpc_error & err) {
        pyl_set_error(err.what());
        return PYL_ERROR_WORKER;
    } catch (const std::exception & err) {
        pyl_set_error(err.what());
        return PYL_ERROR;
    } catch (...) {
        pyl_set_error("unknown exception");
        return PYL_ERROR;
    }
}
