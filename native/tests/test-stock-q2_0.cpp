// A Q2_0 file made by the unpatched quantiser loads as what it is, computes what the unpatched engine computes, is
// copied without a changed byte, and can be requantised to FP8. With --record FILE the program prints the logits
// instead: built against the unpatched pin, it made the fixture.

#include "check.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "gguf.h"
#include "llama.h"

#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

static const std::vector<llama_token> TOKENS = { 1, 17, 95, 3, 3, 42, 8, 60 };

// (n_tokens, n_vocab), or empty if the file does not load
static std::vector<float> logits_of(const std::string & path, std::string & desc) {
    llama_model_params mparams = llama_model_default_params();
    llama_model * model = llama_model_load_from_file(path.c_str(), mparams);
    if (!model) {
        return {};
    }
    char buf[256];
    llama_model_desc(model, buf, sizeof(buf));
    desc = buf;

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = 64;
    cparams.n_threads       = 1;
    cparams.n_threads_batch = 1;
    llama_context * ctx = llama_init_from_model(model, cparams);
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    std::vector<float> out;
    for (size_t i = 0; ctx && i < TOKENS.size(); i++) {
        llama_token token = TOKENS[i];
        if (llama_decode(ctx, llama_batch_get_one(&token, 1)) != 0) {
            break;
        }
        const float * logits = llama_get_logits_ith(ctx, 0);
        out.insert(out.end(), logits, logits + n_vocab);
    }
    llama_free(ctx);
    llama_model_free(model);
    return out;
}

static int record(const char * path) {
    std::string desc;
    for (float x : logits_of(path, desc)) {
        std::printf("%a\n", x);
    }
    return 0;
}

static std::vector<char> read_bytes(const std::string & path) {
    std::ifstream file(path, std::ios::binary);
    return { std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>() };
}

// number of tensors of the type; the file must open and say file type 41
static int count_type(const std::string & path, const char * type) {
    gguf_context * gguf = gguf_init_from_file(path.c_str(), { true, nullptr });
    CHECK(gguf, "%s does not open", path.c_str());
    if (!gguf) {
        return -1;
    }
    int n = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); i++) {
        n += strcmp(ggml_type_name(gguf_get_tensor_type(gguf, i)), type) == 0;
    }
    const uint32_t file_type = gguf_get_val_u32(gguf, gguf_find_key(gguf, "general.file_type"));
    CHECK(file_type == 41, "%s: file type %u", path.c_str(), file_type);
    gguf_free(gguf);
    return n;
}

static void check_logits(const std::string & path, const std::vector<double> & want, double bound, const char * name) {
    std::string desc;
    const std::vector<float> got = logits_of(path, desc);
    CHECK(desc.find(name) != std::string::npos, "description: '%s'", desc.c_str());
    CHECK(got.size() == want.size() && got.size() == TOKENS.size()*96, "%zu logits, %zu recorded", got.size(), want.size());
    if (got.size() != want.size()) {
        return;
    }
    double error = 0.0, power = 0.0;
    for (size_t i = 0; i < got.size(); i++) {
        error += (got[i] - want[i])*(got[i] - want[i]);
        power += want[i]*want[i];
    }
    CHECK(error <= bound*power, "%s: NMSE %g", name, error/power);
}

static void quantize(const std::string & from, const std::string & to, llama_ftype ftype, bool only_copy) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.nthread          = 1;
    params.ftype            = ftype;
    params.only_copy        = only_copy;
    params.allow_requantize = true;
    CHECK(llama_model_quantize(from.c_str(), to.c_str(), &params) == 0, "quantise to %s", llama_ftype_name(ftype));
}

int main(int argc, char ** argv) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    if (argc == 3 && strcmp(argv[1], "--record") == 0) {
        return record(argv[2]);
    }
    const std::string folder = argc == 2 ? argv[1] : "tests/data"; // tests run in the source folder
    const std::string stock = folder + "/stock-q2_0.gguf";
    std::vector<double> want; // (n_tokens, n_vocab)
    std::ifstream file(folder + "/stock-q2_0.logits");
    for (std::string line; std::getline(file, line); ) {
        want.push_back(strtod(line.c_str(), nullptr));
    }

    CHECK(count_type(stock, "q2_0") == 7, "%d Q2_0 tensors", count_type(stock, "q2_0"));
    // exact on the machine that recorded; another instruction set adds in another order, and an activation next to a
    // rounding boundary of Q8_0 may fall on its other side
    check_logits(stock, want, 1e-3, "Q2_0");

    std::string made = (std::filesystem::temp_directory_path() / "q2_0-XXXXXX").string();
    const int fd = mkstemp(&made[0]);
    CHECK(fd >= 0, "no temporary file");
    close(fd);
    quantize(stock, made, LLAMA_FTYPE_MOSTLY_Q2_0, true);
    CHECK(read_bytes(made) == read_bytes(stock), "the copy differs");

    quantize(stock, made, LLAMA_FTYPE_MOSTLY_F8_E4M3_MXFP4, false);
    CHECK(count_type(made, "f8_e4m3_b128") == 7, "%d FP8 tensors", count_type(made, "f8_e4m3_b128"));
    // 3 bits of mantissa: a relative error of at most 1/16, on average well below
    check_logits(made, want, 1e-2, "F8_E4M3_MXFP4");
    std::remove(made.c_str());
    return check_result("test-stock-q2_0");
}
