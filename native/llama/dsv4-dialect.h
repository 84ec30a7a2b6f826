// Opening native-dialect files of DeepSeek-V4 in upstream's loader. The only entry is dsv4_dialect_apply, called once by
// the constructor of llama_model_loader when all shards are read and before anything is looked up.

#pragma once

#include <string>
#include <vector>

struct llama_model_loader;

// The V4 chat template that upstream ships, compiled in (cmake/embed_text.cmake).
extern const char * const dsv4_chat_template;

// For architecture deepseek4: check the model (dsv4-check.h), then, in a native-dialect file, give tensors their
// upstream names, add the keys that follow from them, and replace a chat template that is not V4's. In both dialects a V4
// template gets the roles that it lacks (dsv4-template.h).
// Other architectures are not touched, except that deepseek41 is refused by name. Throws dsv4_refusal.
// fname, splits: as given to the loader; empty when it reads from a FILE or from memory.
void dsv4_dialect_apply(llama_model_loader & ml, const std::string & fname, const std::vector<std::string> & splits);
