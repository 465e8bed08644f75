"""What the benchmarks share: batches, peers, verification, timing, memory, tables."""
