// How model files enter memory. Owns one process-wide setting that the loader asks for.

#pragma once

#include <cstddef>
#include <functional>

struct llama_file;
struct llama_model;

// Whether mapping a model reads all of it at once (MAP_POPULATE, WILLNEED). Off: V4-Flash is larger than most
// memories, the read cannot be cancelled and reports nothing; whoever wants warm pages touches them in pieces.
bool dsv4_mmap_prefetch(void);
void dsv4_set_mmap_prefetch(bool enabled);

// Read n_bytes of a file that is not mapped, from where it stands, in pieces between which a load can be cancelled: a
// tensor of experts has a gigabyte. go_on gets the bytes read so far; false: it wants no more.
bool dsv4_read_in_pieces(llama_file & file, void * to, size_t n_bytes, const std::function<bool(size_t)> & go_on);

// Whether the CPU backend may repack this model's weights when its parameters allow it. Not DeepSeek-V4's: the copy
// would be as large as the file, and its products would round their inputs to 8 bits.
bool dsv4_may_repack(const llama_model & model);
