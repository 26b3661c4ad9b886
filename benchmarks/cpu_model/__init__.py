"""`python -m benchmarks.cpu_model`: a model, end to end, beside llama.cpp and its forks on the same GGUF file."""
