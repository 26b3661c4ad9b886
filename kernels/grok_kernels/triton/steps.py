"""How the size of a step enters what is compiled: in a few classes, all of which an engine can meet before it serves.

Everything else that the kernels are compiled for is the model's. What follows the batch is passed as a number that no
machine code depends on (`launch.jit`). Does not import Triton.
"""

from __future__ import annotations

REQUESTS = 256  # of attention's searches, at least: two a thread
FEW = (
    128  # rows by experts that the small block takes of `group_tokens`: 64 requests that decode, with two experts each
)


def _power_of_two(n: int) -> int:
    """The next, from n up."""
    return 1 << max(n - 1, 0).bit_length()


def requests_of(requests: int) -> int:
    """For how many requests attention is compiled, where there are so many."""
    return max(_power_of_two(requests), REQUESTS)


def startup(max_requests: int, max_tokens: int) -> list[tuple[int, ...]]:
    """Steps, each the number of queries by request, that meet every compile of an engine's steps.

    max_requests and max_tokens are the most of one step. A step of one query a request is to run as decoding does, and its
    tokens are to be sampled. Products that have a tile of their own for up to `tuning.FEW_ROWS` rows meet it in the first,
    the other in the largest prompt, if as many of its rows as there may be requests go through the head.
    """
    # the second's rows are grouped in the large block by the router itself, the third's by kernels of their own
    steps: list[tuple[int, ...]] = [(1,), (min(FEW + 1, max_tokens),), (max_tokens,)]
    requests = REQUESTS + 1
    while requests <= max_requests:
        steps.append((1,) * requests)
        if requests < max_tokens:
            steps.append((2, *(1,) * (requests - 1)))
        requests = 2 * requests - 1
    return steps
