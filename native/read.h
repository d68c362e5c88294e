// How fast the pool's threads read memory: the yardstick that `bench` holds decoding against.
#pragma once
#include <cstddef>
#include <cstdint>

#include "threads.h"

namespace chalot {

// The sum, modulo 2^64, of `count` numbers; each thread reads one contiguous share, front to back.
uint64_t read_all(Pool& pool, const uint64_t* data, size_t count);

}  // namespace chalot
