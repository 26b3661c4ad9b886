"""`python -m benchmarks.cpu_model`: a model of 1.30 B parameters, end to end, beside llama.cpp on the same weights."""
