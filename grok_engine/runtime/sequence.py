"""The state of one sequence. No torch."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

Rank = tuple[int, int]


class Status(Enum):
    NEW = "new"  # not handed to a scheduler yet
    WAITING = "waiting"  # added or preempted; holds no page
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class SequenceState:
    """A prompt and the tokens generated after it, and where its keys and values are.

    `output_ids` is the only list of the generated tokens: the engine appends to it between steps, samplers and
    detokenisers read it. The scheduler owns everything else.
    """

    seq_id: int
    prompt_ids: list[int]
    max_new_tokens: int
    priority: int = 0  # lower is more urgent
    use_cache: bool = True  # start from pages of the prefix index
    logits_from: int = -1  # the first position whose logits are still wanted; −1: that of the prompt's last token
    output_ids: list[int] = field(default_factory=list)
    status: Status = Status.NEW
    arrival: int = -1
    rank: Rank = (0, -1)
    num_computed: int = 0  # tokens whose keys and values are in `pages`
    num_registered: int = 0  # full pages already offered to the prefix index
    pages: array[int] = field(default_factory=lambda: array("i"))
    cached_tokens: int = 0  # prompt tokens found in the prefix index when first admitted
    preemptions: int = 0

    def __post_init__(self) -> None:
        if self.logits_from < 0:
            self.logits_from = len(self.prompt_ids) - 1

    @property
    def length(self) -> int:
        """Tokens known so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def decodes(self) -> bool:
        """Whether exactly one token is left to compute."""
        return len(self.prompt_ids) + len(self.output_ids) - self.num_computed == 1

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start..stop, without building the others."""
        prompt = len(self.prompt_ids)
        if start >= prompt:
            return self.output_ids[start - prompt : stop - prompt]
        return self.prompt_ids[start:stop] + self.output_ids[: max(stop - prompt, 0)]
