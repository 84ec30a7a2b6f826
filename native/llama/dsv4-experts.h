// Which experts' weights belong together and which of them tokens choose by themselves, for dsv4-paging.h.

#pragma once

struct ggml_cgraph;
struct llama_ubatch;

// Before a graph is computed: joins the weights of products that use the same chosen experts, and announces those of the layers
// that route by token. Does nothing unless experts are paged.
void dsv4_page_experts(const ggml_cgraph * graph, const llama_ubatch & ubatch);
