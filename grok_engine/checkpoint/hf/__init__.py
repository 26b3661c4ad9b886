"""Reads folders as the Hugging Face hub has them: a `config.json` and safetensors files."""
