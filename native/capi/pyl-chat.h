// Chat: messages to the exact prompt (token ids), and generated text back to messages.
//
// Owns: the seam to upstream's chat engine (templates, tool grammar, reasoning and DSML parsing) as strings in, JSON
// out. Leaves checking and normalising of messages to pyllama_dsv4/chat_request.py, the shapes of answers to
// responses.py, and the tokeniser that knows message text from template text to native/llama/prompt-tokens. Included
// by pyllama.h; the file is not called chat.h because upstream is. Parsed by pycparser: plain C, no macros.

#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct llama_model;

struct pyl_chat;        // a parsed template and a vocabulary; not changed by use
struct pyl_chat_parser; // one answer being read; for one thread at a time

// The model must outlive the result. template_text NULL: the one in the file's metadata; a file without one is an
// error, because a prompt in a foreign format gives fluent, wrong text. NULL on failure: see pyl_last_error().
struct pyl_chat * pyl_chat_init(const struct llama_model * model, const char * template_text);

void pyl_chat_free(struct pyl_chat * chat);

// Format messages. Returns a pyl_status: PYL_ERROR_ARGUMENT when the request is not as below, PYL_ERROR when the
// template refuses it. On PYL_OK *out is JSON, to be freed with pyl_string_free; otherwise NULL.
//
// request: {"messages": [...], "add_generation_prompt": bool, "thinking": bool}, in OpenAI's form, and optionally
//   "tools": [...]              OpenAI function tools; written into the prompt as given
//   "tool_choice": "auto" | "required" | "none"    "parallel_tool_calls": bool (true)
//   "tool_name": str            the only tool that may be called; with "tool_choice": "required"
//   "json_schema": {...}        the answer must follow it
//   "template_kwargs": {...}    further variables of the template, e.g. {"reasoning_effort": "max"}
// Other members are refused. With a V4 template, messages may have the roles developer and latest_reminder, and beside
// the content a "task" (dsv4-template.h), which the answer or nothing follows.
//
// out: {
//   "tokens": [ids],            the exact prompt, BOS included
//   "parts": [{"text": str, "is_input": bool}],   its display; input is text that came with the request
//   "parser": {...},            for pyl_chat_parser_init
//   "grammar": str,             GBNF, or ""; grammar_lazy: from the first of grammar_triggers on
//   "grammar_lazy": bool, "grammar_triggers": [{"type": "token"|"word"|"pattern"|"pattern_full", "value": str}],
//   "preserved_tokens": [ids],  named tokens whose text the parser needs to see
//   "generation_tokens": [ids], end of the prompt that a grammar which is not lazy begins with
//   "stops": [str],             strings that end the answer, besides the vocabulary's end-of-generation tokens
//   "supports_thinking": bool }
int32_t pyl_chat_format(const struct pyl_chat * chat, const char * request, char ** out);

// state: the "parser" member of what pyl_chat_format returned. NULL on failure.
struct pyl_chat_parser * pyl_chat_parser_init(const char * state);

void pyl_chat_parser_free(struct pyl_chat_parser * parser);

// Read the next piece of the answer: whole UTF-8 characters. is_final: nothing follows. What may be the beginning of
// markup is held back until it is clear what it is, at the latest until the end. Returns a pyl_status.
//
// out: {"deltas": {"content": str, "reasoning_content": str,
//                  "tool_calls": [{"index": int, "name": str, "arguments": str}]}, members only when not empty; "name"
//                  with the first piece of a call only; arguments is JSON text that grows
//       "message": {"content": str, "reasoning_content": str, "tool_calls": [{"name": str, "arguments": str}]},
//       "complete": bool}       the last two only if is_final
// The deltas add up to the message. complete false: the text stops early or does not follow the format (a call of an
// unknown tool, say); message is what could be read, its arguments possibly cut off.
int32_t pyl_chat_parser_push(
        struct pyl_chat_parser * parser, const char * text, int32_t n_bytes, bool is_final, char ** out);

void pyl_string_free(char * text);

#ifdef __cplusplus
}
#endif
