"""Whether an extension that Python found is the one that was built for this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

OWN = Path(__file__).resolve().parent


def misfit(module: Any, name: str, remedy: str, *, compiled_here: bool = False) -> str:
    """Why an extension cannot be used, and `remedy`; "" if it can. compiled_here: from these sources, into a cache.

    An imported one lies in another folder where Python finds this package in one checkout and the extension in another:
    an editable installation does that while this checkout is not built. Its kernels are those of other sources.
    """
    folder = OWN if compiled_here else Path(module.__file__).parent.resolve()
    if folder != OWN:
        return f"the extension {name} lies in {folder}, this package in {OWN}: it is another checkout's; {remedy}"
    built, running = (".".join(v.split(".")[:2]) for v in (module.torch_version, torch.__version__))
    if built != running:  # the ABI holds within a minor version only: it may load, and then fail anywhere
        return f"the extension {name} was built against torch {built}, this is torch {running}; {remedy}"
    return ""
