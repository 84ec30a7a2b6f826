// The Python module `_codec`: the codecs of this folder over numpy arrays. Owns the checks of arguments, the messages,
// the allocation of results and the release of the GIL; leaves every byte of every format to the headers. The
// functions are documented in pyllama_dsv4/_codec.pyi.

#include "cpu-features.h"
#include "f8-e4m3-b128.h"
#include "mxfp4.h"
#include "parallel.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace py = pybind11;
using namespace dsv4_codec;

namespace {

using shape_t = std::vector<py::ssize_t>;

// --- arguments -----------------------------------------------------------------------------------------------------

// "fn: argument 'name': found F, expected E. Hint"
std::string message(const char * fn, const char * arg, const std::string & found, const std::string & expected,
                    const char * hint = nullptr) {
    std::string text = std::string(fn) + ": argument '" + arg + "': found " + found + ", expected " + expected;
    if (hint != nullptr) {
        text += std::string(". ") + hint;
    }
    return text;
}

std::string to_text(const py::handle & object) {
    return py::cast<std::string>(py::str(object));
}

std::string type_name(const py::handle & object) {
    return to_text(py::type::handle_of(object).attr("__name__"));
}

// "uint8 array of shape (2, 3)"
std::string describe(const py::array & a) {
    return to_text(a.dtype()) + " array of shape " + to_text(a.attr("shape"));
}

template <typename T>
std::string dtype_name() {
    return to_text(py::dtype::of<T>());
}

// The array behind an argument, refused unless the loops can walk it as a plain `T *`. Nothing is converted: a silent
// copy of a memory-mapped tensor would cost its size in memory.
template <typename T>
py::array check_array(const char * fn, const char * arg, const py::object & object) {
    if (!py::isinstance<py::array>(object)) {
        throw py::type_error(message(fn, arg, type_name(object), "a C-contiguous " + dtype_name<T>() + " numpy array"));
    }
    py::array a = py::reinterpret_borrow<py::array>(object);
    if (!py::isinstance<py::array_t<T>>(object)) {
        const bool same_size = a.itemsize() == (py::ssize_t) sizeof(T) && sizeof(T) == 1;
        throw py::type_error(message(fn, arg, describe(a), dtype_name<T>(),
                                     same_size ? "Reinterpret the bytes with .view(numpy.uint8)" : nullptr));
    }
    if (!(a.flags() & py::array::c_style)) {
        throw py::value_error(message(fn, arg, describe(a) + " with strides " + to_text(a.attr("strides")),
                                      "a C-contiguous array", "Copy it with numpy.ascontiguousarray"));
    }
    if ((uintptr_t) a.data() % alignof(T) != 0) {
        throw py::value_error(message(fn, arg, describe(a) + " at an unaligned address", "an aligned array",
                                      "Copy it with .copy()"));
    }
    return a;
}

// Number of blocks in an array whose rows must be whole blocks of `block` elements.
py::ssize_t check_rows(const char * fn, const char * arg, const py::array & a, py::ssize_t block) {
    if (a.ndim() == 0 || a.shape(a.ndim() - 1) % block != 0) {
        const std::string expected = "a last dimension that is a multiple of " + std::to_string(block);
        throw py::value_error(message(fn, arg, describe(a), expected));
    }
    return a.size()/block;
}

// A 2-D array whose dimensions are multiples of `rows` and `cols`.
void check_matrix(const char * fn, const char * arg, const py::array & a, py::ssize_t rows, py::ssize_t cols) {
    if (a.ndim() != 2 || a.shape(0) % rows != 0 || a.shape(1) % cols != 0) {
        const std::string first = rows == 1 ? "any number of" : "a multiple of " + std::to_string(rows);
        throw py::value_error(message(fn, arg, describe(a),
                                      "two dimensions, " + first + " rows by a multiple of " + std::to_string(cols)));
    }
}

void check_shape(const char * fn, const char * arg, const py::array & a, py::ssize_t rows, py::ssize_t cols) {
    if (a.ndim() != 2 || a.shape(0) != rows || a.shape(1) != cols) {
        throw py::value_error(message(fn, arg, describe(a),
                                      "shape (" + std::to_string(rows) + ", " + std::to_string(cols) + ")"));
    }
}

void check_threads(const char * fn, int n_threads) {
    if (n_threads < 0) {
        throw py::value_error(message(fn, "n_threads", std::to_string(n_threads), "0 (one per core) or more"));
    }
}

bool overlaps(const py::array & a, const py::array & b) {
    const uintptr_t a0 = (uintptr_t) a.data();
    const uintptr_t b0 = (uintptr_t) b.data();
    return a0 < b0 + (uintptr_t) b.nbytes() && b0 < a0 + (uintptr_t) a.nbytes();
}

// The array that a pack function writes: the caller's `out`, or a new one for None.
py::array check_out(const char * fn, const py::object & out, py::ssize_t rows, py::ssize_t cols,
                    const py::array & weight, const py::array & scale) {
    if (out.is_none()) {
        return py::array_t<uint8_t>(shape_t { rows, cols });
    }
    py::array a = check_array<uint8_t>(fn, "out", out);
    check_shape(fn, "out", a, rows, cols);
    if (!a.writeable()) {
        throw py::value_error(message(fn, "out", "a read-only array", "a writeable one",
                                      "Open the memory map with mode 'r+' or 'w+'"));
    }
    if (overlaps(a, weight) || overlaps(a, scale)) {
        throw py::value_error(message(fn, "out", "memory shared with 'weight' or 'scale'", "memory of its own"));
    }
    return a;
}

// "(3, 17)", the position of flat element i in a
std::string position(const py::array & a, int64_t i) {
    py::tuple index((size_t) a.ndim());
    for (py::ssize_t dim = a.ndim(); dim-- > 0;) {
        index[(size_t) dim] = i % a.shape(dim);
        i /= a.shape(dim);
    }
    return to_text(index);
}

// --- loops ---------------------------------------------------------------------------------------------------------

shape_t shape_of(const py::array & a) {
    return shape_t(a.shape(), a.shape() + a.ndim());
}

template <typename T>
T * data_of(py::array & a) {
    return (T *) a.mutable_data();
}

template <typename F>
void run(int64_t n_items, int64_t bytes_per_item, int n_threads, const F & fn) {
    const py::gil_scoped_release nogil;
    parallel_ranges(n_items, bytes_per_item, n_threads, fn);
}

// y[i] = convert(x[i])
template <typename X, typename Y, typename F>
py::array map_elements(const char * fn, const char * arg, const py::object & object, int n_threads, const F & convert) {
    const py::array in = check_array<X>(fn, arg, object);
    check_threads(fn, n_threads);

    py::array_t<Y> out(shape_of(in));
    const X * x = (const X *) in.data();
    Y       * y = data_of<Y>(out);
    run(in.size(), sizeof(X) + sizeof(Y), n_threads, [=](int64_t begin, int64_t end) {
        const X * __restrict src = x;
        Y       * __restrict dst = y;
        for (int64_t i = begin; i < end; i++) {
            dst[i] = convert(src[i]);
        }
    });
    return std::move(out);
}

// The same for a convert(x[i], &y[i]) that returns false for values without a code. The first of them is refused.
template <typename X, typename Y, typename F>
py::array map_elements_strict(const char * fn, const char * arg, const py::object & object, int n_threads,
                              const char * expected, const char * hint, const F & convert) {
    const py::array in = check_array<X>(fn, arg, object);
    check_threads(fn, n_threads);

    py::array_t<Y> out(shape_of(in));
    const X   * x = (const X *) in.data();
    Y         * y = data_of<Y>(out);
    first_index bad;
    run(in.size(), sizeof(X) + sizeof(Y), n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            if (!convert(x[i], &y[i])) {
                bad.report(i);
                return;
            }
        }
    });
    if (bad.get() >= 0) {
        const std::string found = to_text(py::cast(x[bad.get()])) + " at index " + position(in, bad.get());
        throw py::value_error(message(fn, arg, found, expected, hint));
    }
    return std::move(out);
}

// y = convert(x) block by block, nx elements of X to ny of Y
template <typename X, typename Y, typename F>
py::array map_blocks(const char * fn, const char * arg, const py::object & object, int n_threads, int64_t nx,
                     int64_t ny, const F & convert) {
    const py::array in       = check_array<X>(fn, arg, object);
    const int64_t   n_blocks = check_rows(fn, arg, in, nx);
    check_threads(fn, n_threads);

    shape_t shape = shape_of(in);
    shape.back() = shape.back()/nx*ny;
    py::array_t<Y> out(shape);

    const X * x = (const X *) in.data();
    Y       * y = data_of<Y>(out);
    run(n_blocks, nx*sizeof(X) + ny*sizeof(Y), n_threads, [=](int64_t begin, int64_t end) {
        convert(x + begin*nx, y + begin*ny, end - begin);
    });
    return std::move(out);
}

// --- single codes --------------------------------------------------------------------------------------------------

// Lambdas, where the codec function itself would do, because only those are inlined and vectorised.

py::array py_e4m3_decode(const py::object & codes, int n_threads) {
    const auto convert = [](uint8_t code) { return e4m3_to_f32(code); };
    return map_elements<uint8_t, float>("e4m3_decode", "codes", codes, n_threads, convert);
}

py::array py_e4m3_encode(const py::object & x, int n_threads) {
    const auto convert = [](float value) { return e4m3_from_f32(value); };
    return map_elements<float, uint8_t>("e4m3_encode", "x", x, n_threads, convert);
}

py::array py_e8m0_decode(const py::object & codes, int n_threads) {
    const auto convert = [](uint8_t code) { return e8m0_to_f32(code); };
    return map_elements<uint8_t, float>("e8m0_decode", "codes", codes, n_threads, convert);
}

py::array py_e8m0_encode(const py::object & x, int n_threads) {
    return map_elements_strict<float, uint8_t>("e8m0_encode", "x", x, n_threads, "powers of two in 2**-127 .. 2**127",
                                               "E8M0 holds nothing else", e8m0_from_f32);
}

py::array py_e2m1_decode(const py::object & codes, int n_threads) {
    const auto convert = [](uint8_t code, float * value) {
        *value = e2m1_to_f32(code);
        return code < 16;
    };
    return map_elements_strict<uint8_t, float>("e2m1_decode", "codes", codes, n_threads, "one code of 0 .. 15 per byte",
                                               "Split packed bytes into nibbles first", convert);
}

py::array py_e2m1_encode(const py::object & x, int n_threads) {
    const auto convert = [](float value, uint8_t * code) {
        *code = e2m1_from_f32(value);
        return value == value;
    };
    return map_elements_strict<float, uint8_t>("e2m1_encode", "x", x, n_threads, "numbers", "E2M1 has no NaN", convert);
}

// --- F8_E4M3_B128 --------------------------------------------------------------------------------------------------

py::array py_f8_decode(const py::object & blocks, int n_threads) {
    return map_blocks<uint8_t, float>("f8_e4m3_b128_decode", "blocks", blocks, n_threads, F8_E4M3_B128_BYTES,
                                      F8_E4M3_B128_N, f8_e4m3_b128_decode_row);
}

py::array py_f8_encode(const py::object & x, int n_threads) {
    return map_blocks<float, uint8_t>("f8_e4m3_b128_encode", "x", x, n_threads, F8_E4M3_B128_N, F8_E4M3_B128_BYTES,
                                      f8_e4m3_b128_encode_row);
}

py::array py_f8_pack(const py::object & weight, const py::object & scale, const py::object & out, int n_threads) {
    const char * fn = "f8_e4m3_b128_pack";
    const py::array w = check_array<uint8_t>(fn, "weight", weight);
    check_matrix(fn, "weight", w, F8_TILE_ROWS, F8_E4M3_B128_N);
    const int64_t n_rows   = w.shape(0);
    const int64_t n_blocks = w.shape(1)/F8_E4M3_B128_N; // per row

    const py::array s = check_array<uint8_t>(fn, "scale", scale);
    check_shape(fn, "scale", s, n_rows/F8_TILE_ROWS, n_blocks);
    py::array result = check_out(fn, out, n_rows, n_blocks*F8_E4M3_B128_BYTES, w, s);
    check_threads(fn, n_threads);

    const uint8_t * codes  = (const uint8_t *) w.data();
    const uint8_t * scales = (const uint8_t *) s.data();
    uint8_t       * blocks = data_of<uint8_t>(result);
    run(n_rows, n_blocks*(F8_E4M3_B128_N + F8_E4M3_B128_BYTES), n_threads, [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            f8_e4m3_b128_pack_row(codes + r*n_blocks*F8_E4M3_B128_N, scales + r/F8_TILE_ROWS*n_blocks,
                                  blocks + r*n_blocks*F8_E4M3_B128_BYTES, n_blocks);
        }
    });
    return result;
}

py::tuple py_f8_unpack(const py::object & blocks, int n_threads) {
    const char * fn = "f8_e4m3_b128_unpack";
    const py::array in = check_array<uint8_t>(fn, "blocks", blocks);
    check_matrix(fn, "blocks", in, F8_TILE_ROWS, F8_E4M3_B128_BYTES);
    check_threads(fn, n_threads);
    const int64_t n_rows    = in.shape(0);
    const int64_t n_blocks  = in.shape(1)/F8_E4M3_B128_BYTES; // per row
    const int64_t row_bytes = in.shape(1);

    py::array_t<uint8_t> weight(shape_t { n_rows, n_blocks*F8_E4M3_B128_N });
    py::array_t<uint8_t> scale(shape_t { n_rows/F8_TILE_ROWS, n_blocks });
    const uint8_t * src    = (const uint8_t *) in.data();
    uint8_t       * codes  = data_of<uint8_t>(weight);
    uint8_t       * scales = data_of<uint8_t>(scale);
    first_index     bad; // flat index of a block
    run(n_rows/F8_TILE_ROWS, F8_TILE_ROWS*2*row_bytes, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) { // a row of tiles
            uint8_t * tile_scales = scales + t*n_blocks;
            for (int64_t b = 0; b < n_blocks; b++) {
                tile_scales[b] = src[t*F8_TILE_ROWS*row_bytes + b*F8_E4M3_B128_BYTES];
            }
            for (int64_t r = t*F8_TILE_ROWS; r < (t + 1)*F8_TILE_ROWS; r++) {
                const int64_t b = f8_e4m3_b128_unpack_row(src + r*row_bytes, tile_scales,
                                                          codes + r*n_blocks*F8_E4M3_B128_N, n_blocks);
                if (b >= 0) {
                    bad.report(r*n_blocks + b);
                    return;
                }
            }
        }
    });
    if (bad.get() >= 0) {
        const int64_t r     = bad.get()/n_blocks;
        const int64_t b     = bad.get()%n_blocks;
        const int64_t first = r/F8_TILE_ROWS*F8_TILE_ROWS;
        throw py::value_error(message(fn, "blocks",
            "scale byte " + std::to_string(src[r*row_bytes + b*F8_E4M3_B128_BYTES]) + " in row " + std::to_string(r) +
                ", block " + std::to_string(b),
            std::to_string(scales[r/F8_TILE_ROWS*n_blocks + b]) + " as in row " + std::to_string(first) +
                ", since the 128 rows of a tile share one scale",
            "The tensor was not repacked from 128x128 tiles; decode it instead"));
    }
    return py::make_tuple(weight, scale);
}

// --- MXFP4 ---------------------------------------------------------------------------------------------------------

py::array py_mxfp4_decode(const py::object & blocks, int n_threads) {
    return map_blocks<uint8_t, float>("mxfp4_decode", "blocks", blocks, n_threads, MXFP4_BYTES, MXFP4_N,
                                      mxfp4_decode_row);
}

py::array py_mxfp4_encode(const py::object & x, int n_threads) {
    return map_blocks<float, uint8_t>("mxfp4_encode", "x", x, n_threads, MXFP4_N, MXFP4_BYTES, mxfp4_encode_row);
}

py::array py_mxfp4_pack(const py::object & weight, const py::object & scale, const py::object & out, int n_threads) {
    const char * fn = "mxfp4_pack";
    const py::array w = check_array<uint8_t>(fn, "weight", weight);
    check_matrix(fn, "weight", w, 1, MXFP4_N/2);
    const int64_t n_rows   = w.shape(0);
    const int64_t n_blocks = w.shape(1)/(MXFP4_N/2); // per row

    const py::array s = check_array<uint8_t>(fn, "scale", scale);
    check_shape(fn, "scale", s, n_rows, n_blocks);
    py::array result = check_out(fn, out, n_rows, n_blocks*MXFP4_BYTES, w, s);
    check_threads(fn, n_threads);

    // one scale per block on both sides, so rows do not matter
    const uint8_t * codes  = (const uint8_t *) w.data();
    const uint8_t * scales = (const uint8_t *) s.data();
    uint8_t       * blocks = data_of<uint8_t>(result);
    run(n_rows*n_blocks, 2*MXFP4_BYTES, n_threads, [=](int64_t begin, int64_t end) {
        mxfp4_pack_row(codes + begin*(MXFP4_N/2), scales + begin, blocks + begin*MXFP4_BYTES, end - begin);
    });
    return result;
}

py::tuple py_mxfp4_unpack(const py::object & blocks, int n_threads) {
    const char * fn = "mxfp4_unpack";
    const py::array in = check_array<uint8_t>(fn, "blocks", blocks);
    check_matrix(fn, "blocks", in, 1, MXFP4_BYTES);
    check_threads(fn, n_threads);
    const int64_t n_rows   = in.shape(0);
    const int64_t n_blocks = in.shape(1)/MXFP4_BYTES; // per row

    py::array_t<uint8_t> weight(shape_t { n_rows, n_blocks*(MXFP4_N/2) });
    py::array_t<uint8_t> scale(shape_t { n_rows, n_blocks });
    const uint8_t * src    = (const uint8_t *) in.data();
    uint8_t       * codes  = data_of<uint8_t>(weight);
    uint8_t       * scales = data_of<uint8_t>(scale);
    run(n_rows*n_blocks, 2*MXFP4_BYTES, n_threads, [=](int64_t begin, int64_t end) {
        mxfp4_unpack_row(src + begin*MXFP4_BYTES, codes + begin*(MXFP4_N/2), scales + begin, end - begin);
    });
    return py::make_tuple(weight, scale);
}

// --- statistics ----------------------------------------------------------------------------------------------------

// Counts the bytes that a converter or quantiser should not have written. count_nan(block) -> number of NaN codes.
template <typename F>
py::object check_blocks(const char * fn, const py::object & stats_type, const py::object & blocks, int n_threads,
                        int block_bytes, const F & count_nan) {
    const py::array in       = check_array<uint8_t>(fn, "blocks", blocks);
    const int64_t   n_blocks = check_rows(fn, "blocks", in, block_bytes);
    check_threads(fn, n_threads);

    const uint8_t * src = (const uint8_t *) in.data();
    struct stats { counter scale_nan, scale_zero, code_nan; };
    stats total;
    std::mutex mutex;
    run(n_blocks, block_bytes, n_threads, [&](int64_t begin, int64_t end) {
        stats part;
        for (int64_t i = begin; i < end; i++) {
            const uint8_t * block = src + i*block_bytes;
            part.scale_nan.add(block[0] == E8M0_NAN, i);
            part.scale_zero.add(block[0] == 0, i);
            part.code_nan.add(count_nan(block), i);
        }
        const std::lock_guard<std::mutex> lock(mutex);
        total.scale_nan.merge(part.scale_nan);
        total.scale_zero.merge(part.scale_zero);
        total.code_nan.merge(part.code_nan);
    });
    return stats_type(n_blocks, total.scale_nan.n, total.scale_nan.first, total.scale_zero.n, total.scale_zero.first,
                      total.code_nan.n, total.code_nan.first);
}

} // namespace

// Holds no state of its own, so threads of a free-threaded interpreter may call it at once.
PYBIND11_MODULE(_codec, m, py::mod_gil_not_used()) {
    m.doc() = "FP8 and FP4 codecs over numpy arrays; see _codec.pyi for shapes, rounding and errors.";

    const auto def = [&m](const char * name, auto fn, const char * arg, const char * doc) {
        m.def(name, fn, doc, py::arg(arg), py::kw_only(), py::arg("n_threads") = 0);
    };
    def("e4m3_decode", py_e4m3_decode, "codes", "E4M3FN codes to float32.");
    def("e4m3_encode", py_e4m3_encode, "x", "float32 to the nearest E4M3FN codes, ties to even, saturating.");
    def("e8m0_decode", py_e8m0_decode, "codes", "E8M0 scale bytes to float32.");
    def("e8m0_encode", py_e8m0_encode, "x", "Powers of two to E8M0 scale bytes.");
    def("e2m1_decode", py_e2m1_decode, "codes", "E2M1 codes, one per byte, to float32.");
    def("e2m1_encode", py_e2m1_encode, "x", "float32 to the nearest E2M1 codes, ties to even, saturating.");

    def("f8_e4m3_b128_decode", py_f8_decode, "blocks", "F8_E4M3_B128 blocks to float32.");
    def("f8_e4m3_b128_encode", py_f8_encode, "x", "float32 to F8_E4M3_B128 blocks.");
    def("f8_e4m3_b128_unpack", py_f8_unpack, "blocks", "The inverse of f8_e4m3_b128_pack: (weight, scale).");
    def("mxfp4_decode", py_mxfp4_decode, "blocks", "MXFP4 blocks to float32.");
    def("mxfp4_encode", py_mxfp4_encode, "x", "float32 to MXFP4 blocks, as ggml quantises.");
    def("mxfp4_unpack", py_mxfp4_unpack, "blocks", "The inverse of mxfp4_pack: (weight, scale).");

    const auto def_pack = [&m](const char * name, auto fn, const char * doc) {
        m.def(name, fn, doc, py::arg("weight"), py::arg("scale"), py::kw_only(), py::arg("out") = py::none(),
              py::arg("n_threads") = 0);
    };
    def_pack("f8_e4m3_b128_pack", py_f8_pack, "FP8 codes and 128x128 tile scales to blocks, bytes untouched.");
    def_pack("mxfp4_pack", py_mxfp4_pack, "FP4 codes in checkpoint order and scales to blocks, bits untouched.");

    m.attr("cpu_features") = PYLLAMA_DSV4_CPU_FEATURES;
    m.def("missing_cpu_features", [] { return py::tuple(py::cast(missing_cpu_features())); },
          "Instruction sets that the engine's module was built for and this CPU lacks.");

    const py::object stats_type = py::module_::import("collections").attr("namedtuple")(
        "BlockStats", "n_blocks n_scale_nan i_scale_nan n_scale_zero i_scale_zero n_code_nan i_code_nan",
        py::arg("module") = "pyllama_dsv4._codec");
    m.attr("BlockStats") = stats_type;
    const auto f8_check = [stats_type](const py::object & blocks, int n_threads) {
        const auto count_nan = [](const uint8_t * block) { return f8_e4m3_b128_count_nan(block); };
        return check_blocks("f8_e4m3_b128_check", stats_type, blocks, n_threads, F8_E4M3_B128_BYTES, count_nan);
    };
    const auto mxfp4_check = [stats_type](const py::object & blocks, int n_threads) {
        const auto count_nan = [](const uint8_t *) { return 0; }; // E2M1 has none
        return check_blocks("mxfp4_check", stats_type, blocks, n_threads, MXFP4_BYTES, count_nan);
    };
    def("f8_e4m3_b128_check", f8_check, "blocks", "Count NaN scales, smallest scales and NaN codes: a BlockStats.");
    def("mxfp4_check", mxfp4_check, "blocks", "Count NaN scales and smallest scales: a BlockStats.");
}
