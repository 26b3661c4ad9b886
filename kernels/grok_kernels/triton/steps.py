"""The few ways in which the size of a step selects compiled code, so that an engine can compile all before it serves.

All other compile-time values depend on the model. What depends on the batch is passed as a number that is not
specialised (`launch.jit`). Does not import Triton.
"""

from __future__ import annotations

REQUESTS = 256  # the smallest size of attention's searches over requests: two a thread
FEW = 128  # rows that the small block of `group_tokens` takes: 64 decoding requests with two experts each


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def requests_of(requests: int) -> int:
    """The number of requests that attention is compiled for, where a step has so many."""
    return max(_power_of_two(requests), REQUESTS)


def startup(max_requests: int, max_tokens: int) -> list[tuple[int, ...]]:
    """Steps, each given as the number of queries of every request, that together compile every kernel of an engine.

    max_requests and max_tokens bound one step. Run a step of one query a request as decoding does, and sample its
    tokens. Products that have a tile for few rows (`tuning.FEW_ROWS`) compile it in the first step, and the other
    tile in the largest prompt, if max_requests of its rows go through the output head.
    """
    # the second step's rows are grouped by the router itself in the large block, the third's by kernels of their own
    steps: list[tuple[int, ...]] = [(1,), (min(FEW + 1, max_tokens),), (max_tokens,)]
    requests = REQUESTS + 1
    while requests <= max_requests:
        steps.append((1,) * requests)
        if requests < max_tokens:
            steps.append((2, *(1,) * (requests - 1)))
        requests = 2 * requests - 1
    return steps
