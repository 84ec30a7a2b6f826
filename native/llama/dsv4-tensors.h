// The tensors that DeepSeek-V4 consists of, with dimensions and the kinds of types the graph can use them in.

#pragma once

#include "dsv4-header.h"
#include "dsv4-hparams.h"

// Compare the file's tensors with the table: missing, then dimensions, then type, row by row in the native file's
// order; then tensors that the table does not know. Throws dsv4_refusal.
void dsv4_check_tensors(const dsv4_header & header, const dsv4_hparams & hp);
