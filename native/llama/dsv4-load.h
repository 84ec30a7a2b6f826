// How model files enter memory. Owns one process-wide setting that the loader asks for.

#pragma once

// Whether mapping a model reads all of it at once (MAP_POPULATE, WILLNEED). Off: V4-Flash is larger than most
// memories, the read cannot be cancelled and reports nothing; whoever wants warm pages touches them in pieces.
bool dsv4_mmap_prefetch(void);
void dsv4_set_mmap_prefetch(bool enabled);
