"""GGUF, llama.cpp's format: metadata, tokenizer and block-quantised tensors in one file."""
