"""Benchmarks of the kernels and of the engine, and the one format of their results (`schema`)."""
