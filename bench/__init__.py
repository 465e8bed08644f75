"""Benchmarks: programs that verify results against float64 before they time them."""
