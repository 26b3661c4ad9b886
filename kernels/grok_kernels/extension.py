"""Whether the extensions that Python found were built for this package and for the torch that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

OWN = Path(__file__).resolve().parent
WHEEL_TORCH = OWN / "wheel_torch.txt"  # written into wheels by setup.py


def in_wheel() -> bool:
    """Whether this package was installed from a wheel that holds compiled modules (`make wheel`)."""
    return WHEEL_TORCH.exists()


def check_wheel() -> None:
    """ImportError where this package comes from a wheel for another minor version of torch than the one that runs.

    pip installs the right one, but another package's installation may change torch later.
    """
    if not in_wheel():
        return
    built = WHEEL_TORCH.read_text(encoding="utf-8").strip()
    if built != _minor(torch.__version__):
        raise ImportError(
            f"this wheel of grok-engine is built for torch {built} and does not work with torch {torch.__version__}: "
            f"install torch {built} (`pip install 'torch=={built}.*'`), or the wheel for torch "
            f"{_minor(torch.__version__)}, or the sources where there is a C++ compiler"
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def misfit(module: Any, name: str, remedy: str, *, compiled_here: bool = False) -> str:
    """Why an extension cannot be used, and `remedy`; "" if it can. compiled_here: from these sources, into a cache.

    An imported one lies in another folder where Python finds this package in one checkout and the extension in another:
    an editable installation does that while this checkout is not built. Its kernels are those of other sources.
    """
    folder = OWN if compiled_here else Path(module.__file__).parent.resolve()
    if folder != OWN:
        return f"the extension {name} lies in {folder}, this package in {OWN}: it is another checkout's; {remedy}"
    built, running = (_minor(v) for v in (module.torch_version, torch.__version__))
    if built != running:  # the ABI holds within a minor version only: it may load, and then fail anywhere
        return f"the extension {name} was built against torch {built}, this is torch {running}; {remedy}"
    return ""
