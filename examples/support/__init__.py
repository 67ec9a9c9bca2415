"""Helpers of the examples and the benchmarks, imported as ``support`` by both."""
