"""A whole model on a CPU, beside llama.cpp with the same weights: `python -m benchmarks.cpu_model --help`."""
