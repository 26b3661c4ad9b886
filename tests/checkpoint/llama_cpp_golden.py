"""What llama.cpp computes with the GGUF files that we write: `python -m tests.checkpoint.llama_cpp_golden`.

It takes `pip install llama-cpp-python`, and writes tests/data/gguf/llama_cpp.npz anew. For each case: the file's
SHA-256, the logits after PROMPT, the next tokens, and how TEXT is tokenised. The test wants the same files again, so
that what llama.cpp ran is what we write; after a change of the writer this program runs again.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from grok_engine.loading.convert import convert

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "gguf" / "llama_cpp.npz"
CASES: dict[str, tuple[str | Path, Any]] = {
    "tiny-int8": ("tiny", None),
    "tiny-fp32": ("tiny", "fp32"),
    "llama-fp32": (DATA / "hf" / "llama-a", None),
    "mixtral-bf16": (DATA / "hf" / "mixtral-a", None),
    "mixtral-int8": (DATA / "hf" / "mixtral-a", "int8"),
}
PROMPT = [5, 6, 7, 100, 3, 2, 9, 17, 60, 33, 4]
TEXT = "To Sherlock Holmes she is always the woman – naïve, 12 [EOS]?"
NEW = 12


def written(case: str, folder: Path) -> tuple[Path, str]:
    """The file of a case, and its SHA-256."""
    model, weights = CASES[case]
    path = convert(model, folder / f"{case}.gguf", format="gguf", weights=weights)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


class Llama:
    """llama.cpp with one file, on fp32 keys and values."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.model = self.api.llama_model_load_from_file(str(path).encode(), self.api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot read {path}")
        params = self.api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 256
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0
        self.context = self.api.llama_init_from_model(self.model, params)
        self.vocabulary = self.api.llama_model_get_vocab(self.model)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """After the last of them."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        room = (self.api.llama_token * len(tokens))(*tokens)  # which a batch points into
        if status := self.api.llama_decode(self.context, self.api.llama_batch_get_one(room, len(tokens))):
            raise RuntimeError(f"llama_decode gave {status}")
        size = self.api.llama_vocab_n_tokens(self.vocabulary)
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (size,)).copy()

    def tokenize(self, text: str) -> list[int]:
        data, room = text.encode(), (self.api.llama_token * 256)()
        count = self.api.llama_tokenize(self.vocabulary, data, len(data), room, 256, False, False)
        return list(room[: max(count, 0)])


def main() -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            path, digest = written(case, Path(folder))
            llama, tokens = Llama(path), list(PROMPT)
            found[f"{case}.sha256"], found[f"{case}.logits"] = digest, llama.logits(tokens)
            for _ in range(NEW):
                tokens.append(int(llama.logits(tokens).argmax()))
            found[f"{case}.greedy"] = tokens[len(PROMPT) :]
            if case.startswith("tiny"):
                found[f"{case}.text"] = llama.tokenize(TEXT)
    np.savez_compressed(GOLDEN, **found)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
