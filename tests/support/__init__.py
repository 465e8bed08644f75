"""What several tests share: oracles, batches, builds of C++ programs, ranks, trainers."""
