// How the ops from hidden states cut the vocabulary into chunks, and how many chunks of logits they
// keep for the backward. The fake kernels in Python compute the same shapes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace simpo_ext::ops {

// The largest number of columns of a chunk. On a CPU, a chunk of logits stays in a core's share of
// the last-level cache from one product through the kernel to the next product. Fewer columns would
// slow the products down.
constexpr int64_t kCpuChunkColumns = 4096;
// On a GPU, the products keep every multiprocessor busy for many waves. Reading and writing the sum
// of dhidden for each chunk then takes a few percent of the products' time.
constexpr int64_t kCudaChunkColumns = 8192;
// The width of a chunk is a multiple of this, so that its rows are aligned.
constexpr int64_t kChunkAlignment = 64;

struct LogitsPlan {
  int64_t chunks;  // the last one may be narrower
  int64_t width;   // columns of a chunk
  int64_t kept;    // chunks of logits that are kept for the backward

  LogitsPlan(int64_t R, int64_t V, int64_t element_size, int64_t budget_bytes,
             int64_t most_columns) {
    chunks = (V + most_columns - 1) / most_columns;
    width = chunks == 0 ? 0 : (V + chunks - 1) / chunks;
    width = (width + kChunkAlignment - 1) / kChunkAlignment * kChunkAlignment;
    const int64_t chunk_bytes = std::max<int64_t>(R * width * element_size, 1);
    // The budget also has to hold the chunk in progress.
    kept = std::clamp<int64_t>(budget_bytes / chunk_bytes - 1, 0, chunks);
  }
};

}  // namespace simpo_ext::ops
