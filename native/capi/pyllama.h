// C interface between the Python package and the engine.
//
// Owns: everything of llama.h that may throw or abort, wrapped so that no C++ exception leaves this library; the log
// ring; cancellation. Leaves to llama.h: plain getters and sampler constructors, which Python calls directly.
// Chat formatting and parsing are in pyl-chat.h. Parsed by pycparser: plain C, no macros in declarations.

#pragma once

#include "llama.h"
#include "pyl-chat.h"

#ifdef __cplusplus
extern "C" {
#endif

enum pyl_status {
    PYL_OK             =  0,
    PYL_ERROR          = -1, // see pyl_last_error() and the log
    PYL_ERROR_MEMORY   = -2, // an allocation failed
    PYL_ERROR_ARGUMENT = -3, // a precondition does not hold; nothing was changed
    PYL_CANCELLED      = -4, // the monitor's cancel flag was seen
    PYL_CONTEXT_FULL   = -5, // no room for the batch; nothing was changed
    PYL_ERROR_WORKER   = -6, // another machine cannot be used any more
};

// Shared with the thread that waits: it may set `cancel` and read `progress` at any time.
struct pyl_monitor {
    int32_t cancel;
    float   progress; // 0..1
};

// --- build identity ---

const char * pyl_build_version(void); // version of the Python package
const char * pyl_build_commit (void); // pinned upstream commit, 40 hex digits
const char * pyl_build_series (void); // digest of the patch series
bool         pyl_knows_architecture(const char * name); // whether the engine has this general.architecture
const char * pyl_build_backends(void); // names of the compiled-in backends, space-separated; valid until the next call

// --- errors and log ---

// Reason of the last failure in this thread; "" if there was none.
const char * pyl_last_error(void);

// Route the engine's log into a ring of the newest lines instead of stderr. Idempotent.
void pyl_log_init(void);

// Move the oldest line out of the ring. Returns its length (cut to size - 1), or -1 when the ring is empty.
// level is a ggml_log_level.
int32_t pyl_log_next(char * buf, int32_t size, int32_t * level);

// --- model and context ---

// NULL on failure; pyl_last_error() is "cancelled" when the monitor asked for it. monitor may be NULL.
struct llama_model * pyl_model_load(const char * path, struct llama_model_params params, struct pyl_monitor * monitor);

// The monitor must outlive the context: its cancel flag is polled while a graph is computed.
struct llama_context * pyl_context_init(
        struct llama_model * model, struct llama_context_params params, struct pyl_monitor * monitor);

// What a load would say of the file. On PYL_OK *verdict is JSON, to be freed with pyl_string_free:
// {"ok": true, "dialect": ..., "derived": {...}}, or {"ok": false, "kind", "tensor", "key", "message"}.
int32_t pyl_check_file(const char * path, char ** verdict);

enum pyl_outputs {
    PYL_OUTPUTS_NONE = 0,
    PYL_OUTPUTS_LAST = 1,
    PYL_OUTPUTS_ALL  = 2,
};

// Evaluate n_tokens (at most n_batch) of one sequence at positions pos, pos + 1, ...
// Returns a pyl_status. After PYL_CANCELLED or PYL_ERROR the sequence's memory is undefined: clear it.
int32_t pyl_decode(struct llama_context * ctx, const int32_t * tokens, int32_t n_tokens, int32_t pos, int32_t seq_id,
        enum pyl_outputs outputs);

// Evaluate one token and copy the logits after it to out[n_vocab]: pyl_decode and pyl_logits_copy in one call.
int32_t pyl_decode_one(struct llama_context * ctx, int32_t token, int32_t pos, int32_t seq_id, float * out, int32_t n_vocab);

// Evaluate a mixed batch: n_tokens (at most n_batch) tokens, each with its position and sequence; outputs[i] != 0 wants
// the logits of token i. Status and memory as with pyl_decode.
int32_t pyl_decode_mixed(struct llama_context * ctx, const int32_t * tokens, const int32_t * pos, const int32_t * seq_id,
        const int8_t * outputs, int32_t n_tokens);

// Copy a sequence's cache to out[size], or put it back from there. *n: the bytes that were; another number than size when
// the engine refuses.
int32_t pyl_state_seq_save(struct llama_context * ctx, int32_t seq_id, uint8_t * out, uint64_t size, uint64_t * n);
int32_t pyl_state_seq_load(struct llama_context * ctx, int32_t seq_id, const uint8_t * data, uint64_t size, uint64_t * n);

// Copy the logits of token i of the last decoded batch (-1: the last output) to out[n_vocab].
int32_t pyl_logits_copy(struct llama_context * ctx, int32_t i, float * out, int32_t n_vocab);

// Copy the embedding of sequence seq_id (with pooling) or of token i of the last batch (seq_id < 0) to out[n_embd].
int32_t pyl_embedding_copy(struct llama_context * ctx, int32_t seq_id, int32_t i, float * out, int32_t n_embd);

// --- speculative decoding ---

enum pyl_draft_kind {
    PYL_DRAFT_MTP    = 0, // a prediction block, in a context of type LLAMA_CONTEXT_TYPE_MTP
    PYL_DRAFT_DSPARK = 1,
    PYL_DRAFT_DFLASH = 2,
};

struct pyl_draft; // a draft model at work beside the sequences of a context

// Whether a model can draft for another; to be asked before it gets a context, which asserts that it does.
int32_t pyl_draft_check(const struct llama_model * target, const struct llama_model * model, enum pyl_draft_kind kind);

// Both contexts must outlive the result; `context` is the draft model's and was made with `target` as ctx_other and the
// same monitor and number of sequences. `target` must be able to drop n_max tokens (n_rs_seq). NULL on failure.
struct pyl_draft * pyl_draft_init(struct llama_context * target, struct llama_context * context,
        enum pyl_draft_kind kind, int32_t n_max, struct pyl_monitor * monitor);
void               pyl_draft_free(struct pyl_draft * draft);

// After every evaluation of `target`, with the same tokens: what the draft model has to know of them. Those of one sequence
// stand together.
int32_t pyl_draft_process(struct pyl_draft * draft, const int32_t * tokens, const int32_t * pos, const int32_t * seq_id,
        int32_t n_tokens);

// What may follow `token`, which is to be evaluated at pos of a sequence: at most n_max tokens.
struct pyl_draft_request {
    int32_t seq_id;
    int32_t token;
    int32_t pos;
    int32_t n_max;
};

// Answer requests of different sequences together: n_out[i] tokens, possibly none, at out + i*n_max.
int32_t pyl_draft_propose(struct pyl_draft * draft, const struct pyl_draft_request * requests, int32_t n_requests,
        int32_t n_max, int32_t * out, int32_t * n_out);

// Of a sequence's last proposal n_accepted tokens were right: drop everything of it from pos on, in both caches.
int32_t pyl_draft_accept(struct pyl_draft * draft, int32_t seq_id, int32_t n_accepted, int32_t pos);

// Forget the tokens of a sequence (-1: of all) in the draft model; what comes next may be at any position.
void pyl_draft_clear(struct pyl_draft * draft, int32_t seq_id);

// --- sampling ---

struct pyl_sampler; // a grammar, if one was set, and upstream's sampler chain; for one thread at a time

// vocab may be one without tokens, if no grammar is set; it must outlive the sampler. NULL on failure.
struct pyl_sampler * pyl_sampler_init(const struct llama_vocab * vocab, int32_t n_vocab);
void                 pyl_sampler_free(struct pyl_sampler * sampler);

// Append a stage, which belongs to the sampler from now on.
int32_t pyl_sampler_add(struct pyl_sampler * sampler, struct llama_sampler * stage);

// Set the grammar (GBNF with a rule "root"). It holds after the token `start` (-1: at once), and with words from the
// first of them on that comes then. PYL_ERROR_ARGUMENT: it cannot be used; pyl_last_error() says why.
int32_t pyl_sampler_set_grammar(struct pyl_sampler * sampler, const char * grammar, const char ** words,
        int32_t n_words, int32_t start);

// Move the grammar, not the chain, past a token that the prompt ends with.
int32_t pyl_sampler_prefill(struct pyl_sampler * sampler, int32_t token);

// Let the chain, not the grammar, know a token of the prompt.
void pyl_sampler_accept(struct pyl_sampler * sampler, int32_t token);

// Sample from logits[n_vocab] and accept the token. Returns the id, or a negative pyl_status (PYL_ERROR_ARGUMENT when
// no logit is finite or one is NaN).
int32_t pyl_sampler_sample(struct pyl_sampler * sampler, const float * logits);

// The grammar that a JSON schema stands for. On PYL_OK *grammar is to be freed with pyl_string_free;
// PYL_ERROR_ARGUMENT: it cannot be expressed, pyl_last_error() says why.
int32_t pyl_grammar_of_schema(const char * schema, char ** grammar);

// Log-probability of a token by logits[n_vocab], and the n_top most likely tokens, most likely first.
int32_t pyl_logprobs(const float * logits, int32_t n_vocab, int32_t token, int32_t n_top, float * logprob,
        int32_t * top_ids, float * top_logprobs);

// --- experts that memory cannot hold ---

// Whether chosen experts are announced to the system before they are read; see native/ggml/cpu/dsv4-paging.h. For contexts
// that are made from now on.
void pyl_paging_set(bool is_on);

// Bytes of experts that were announced in this process, and how many of them were not in memory.
void pyl_paging_counts(int64_t * n_bytes, int64_t * n_bytes_missing);

// --- rounding of activations ---

enum pyl_act_quant_format {
    PYL_ACT_QUANT_E4M3 = 0,
    PYL_ACT_QUANT_E2M1 = 1,
};

// The llama_act_quant that llama_context_default_params() has from now on.
int32_t pyl_act_quant_set_default(int32_t level);

// The operation ggml_act_quant on the CPU: channels [0, n_channels) of each of n_rows rows of n_per_row are rounded to
// the format, with a scale per block. y must not overlap x.
int32_t pyl_act_quant(int32_t format, int64_t block, int64_t n_channels, const float * x, float * y, int64_t n_rows,
        int64_t n_per_row, int32_t n_threads);

// --- memory ---

// What one kind of memory is used for, in bytes.
struct pyl_memory {
    char     name[64]; // of the buffer type, as "CPU" or "CUDA0"
    bool     is_host;
    uint64_t weights;  // a mapped file counts as far as tensors reach
    uint64_t cache;    // KV cache and compressor states
    uint64_t compute;  // buffers of the largest graph
};

// Fill out[] with up to n_max entries; returns their number. With no_alloc in the model's parameters: what a load with
// the same parameters would take.
int32_t pyl_memory_breakdown(const struct llama_context * ctx, struct pyl_memory * out, int32_t n_max);

// --- quantiser ---

enum pyl_dialect {
    PYL_DIALECT_KEEP     = 0, // of the input
    PYL_DIALECT_NATIVE   = 1,
    PYL_DIALECT_UPSTREAM = 2,
};

// Write the model in another type, or only say what would be written (params.dry_run). The monitor's progress counts
// bytes of the output; a cancelled run returns PYL_CANCELLED. On PYL_OK *report is JSON, to be freed with
// pyl_string_free: {"input_dialect", "dialect", "n_bytes", "tensors": [{"name", "type_in", "type_out", "n_bytes_in",
// "n_bytes_out"}]}; a dialect is null for models other than DeepSeek-V4, types are ggml's names.
int32_t pyl_quantize(const char * path_in, const char * path_out, struct llama_model_quantize_params params,
        enum pyl_dialect dialect, struct pyl_monitor * monitor, char ** report);

// Whether the quantiser knows the file type.
bool pyl_quantize_knows(enum llama_ftype ftype);

// --- text ---

// Returns the number of ids, or its negative when n_max is too small; INT32_MIN on failure.
// parse_special: the text of special tokens becomes their ids.
int32_t pyl_tokenize(const struct llama_vocab * vocab, const char * text, int32_t n_bytes, int32_t * ids, int32_t n_max,
        bool parse_special);

// Bytes of one token, special tokens included. Returns their number, or its negative when size is too small;
// INT32_MIN on failure.
int32_t pyl_token_bytes(const struct llama_vocab * vocab, int32_t id, char * buf, int32_t size);

// --- server ---

// Run upstream's server until a signal ends it: argv is the program's name, "-m", the file, and more of the server's
// options. Returns the number of that signal, 0 when it ended by itself, or a pyl_status; what went wrong is in the log,
// which goes to stderr from here on. The second SIGINT or SIGTERM, or one during a load that cannot be cancelled, ends the
// process at once with exit code 128 + signal. Options such as --help end the process as well. Once per process.
int32_t pyl_server_run(int32_t argc, const char * const * argv, int32_t n_requests_max);

// --- several machines ---

const char * pyl_rpc_version(void); // of the protocol, as "212.0.0"

// The 24 bytes by which this build's workers and clients know each other.
void pyl_rpc_identity(uint8_t * out);

// Connect to a worker, or with NULL look at this machine's GPUs, and fill devices[] with what there is and n_bytes[] with
// its free memory; returns their number (at most n_max) or a pyl_status. Devices are kept until the process ends; they
// hold no connection.
int32_t pyl_devices(const char * endpoint, ggml_backend_dev_t * devices, uint64_t * n_bytes, int32_t n_max);

// Let the options of pyl_server_run() name workers.
void pyl_rpc_register(void);

// Shared with the thread that waits: it may set `cancel` and read the rest at any time.
struct pyl_worker {
    int32_t cancel;
    int32_t port;      // 0 until it listens
    int32_t n_clients; // that have come
    int32_t is_busy;   // one is there
};

// Lend this machine to one client after the other until `cancel` is set. host is an IPv4 address; cache_dir may be NULL.
int32_t pyl_rpc_serve(const char * host, int32_t port, const char * cache_dir, int32_t n_threads,
        struct pyl_worker * worker);

// --- placement ---

struct pyl_placement;

struct pyl_placement * pyl_placement_init(void);
void pyl_placement_free(struct pyl_placement * placement);

// Tensors whose name the regular expression finds go to a device's buffer ("CPU", "CUDA0"); the first that finds wins.
int32_t pyl_placement_override(struct pyl_placement * placement, const char * pattern, const char * buffer);

// Shares of the devices in the layers, at most llama_max_devices() of them.
int32_t pyl_placement_split(struct pyl_placement * placement, const float * shares, int32_t n);

// Point params at what the placement owns, which must outlive the load.
void pyl_placement_apply(struct pyl_placement * placement, struct llama_model_params * params);

// Instead of the three above: let upstream choose what fits with margin_bytes left on each device, experts leaving first.
// 1: found, 0: nothing fits (params are as they were), or a pyl_status. Not while another thread uses the engine.
int32_t pyl_placement_fit(struct pyl_placement * placement, const char * path, uint64_t margin_bytes,
        struct llama_model_params * params, struct llama_context_params * context);

// --- machine ---

int32_t pyl_n_cores(void); // physical cores

// Read the given range of the file into the page cache (at most one chunk of a few hundred MiB: it cannot be
// interrupted). n_bytes_resident: what was there already, in whole pages.
int32_t pyl_warm_range(int fd, int64_t offset, int64_t n_bytes, int64_t * n_bytes_resident);

#ifdef __cplusplus
}
#endif
