// Which experts' weights belong together, for dsv4-paging.h.

#pragma once

struct ggml_cgraph;

// Joins the weights of products that use the same chosen experts. Does nothing unless experts are paged.
void dsv4_join_experts(const ggml_cgraph * graph);
