"""Lines of at most 120 columns, in what ruff does not read: C++, CUDA, Markdown, make, shell, TOML.

In Markdown, tables, code blocks and the targets of links may be longer. Generated pages, which say so, are left out.
"""

import re
import subprocess
import sys
from pathlib import Path

LIMIT = 120
READ = re.compile(r"(\.(h|inl|cuh|cpp|cu|md|toml|in|sh)|(^|/)Makefile|^\.ci/[a-z]+)$")
LINK = re.compile(r"(?<=\])\([^)]*\)|https?://\S+")

long_lines = []
for name in subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines():
    if not READ.search(name) or not Path(name).exists():
        continue
    text, fenced = Path(name).read_text(encoding="utf-8"), False
    if name.endswith(".md") and "do not edit" in text[:200]:
        continue
    for number, line in enumerate(text.splitlines(), 1):
        if name.endswith(".md"):
            fenced ^= line.lstrip().startswith("```")
            line = "" if fenced or line.startswith(("|", "    ")) else LINK.sub("", line)
        if len(line) > LIMIT:
            long_lines.append(f"{name}:{number}: {len(line)} columns, expected at most {LIMIT}")
sys.exit("\n".join(long_lines) or None)
