"""Where a run ends, and where it stands."""

import math
from dataclasses import asdict, dataclass, field, replace

from .journal import Journal


@dataclass(frozen=True)
class Budget:
    """Where a run ends, over all its calls, and what tokens cost.

    No request is begun that would go past a limit, those under way counted at the mean so far; the first ones of a
    run, of which nothing is known yet, may.

    Args:
        max_requests: attempts, failed ones included.
        max_tokens: of prompts and replies together.
        max_cost: in the currency of the prices.
        prompt_price: of a million tokens of prompts.
        completion_price: of a million tokens of replies.
    """

    max_requests: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    prompt_price: float = 0.0
    completion_price: float = 0.0

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value}.")
        if self.max_cost is not None and not (self.prompt_price or self.completion_price):
            raise ValueError(f"max_cost={self.max_cost} needs prompt_price and completion_price.")

    def behind(self, summary: "RunSummary") -> "Budget":
        """What a run leaves of it for another one."""

        def left(limit, spent):
            return None if limit is None else max(0, limit - spent)

        return replace(
            self,
            max_requests=left(self.max_requests, summary.requests),
            max_tokens=left(self.max_tokens, summary.prompt_tokens + summary.completion_tokens),
            max_cost=left(self.max_cost, summary.cost),
        )

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6

    def exhausted(self, journal: Journal, under_way: int) -> str | None:
        """The limit that one more request would pass, None if there is none."""
        # one more, and those whose tokens are not known yet
        share = (under_way + 1) / journal.counts["charged"] if journal.counts["charged"] else 0
        tokens = journal.prompt_tokens + journal.completion_tokens
        spent = {
            "max_requests": (self.max_requests, journal.counts["sent"] + 1),
            "max_tokens": (self.max_tokens, tokens * (1 + share)),
            "max_cost": (self.max_cost, journal.cost * (1 + share)),
        }
        for name, (limit, value) in spent.items():
            if limit is not None and (value > limit or limit == 0):
                return f"{name}={limit}"
        return None


@dataclass
class RunSummary:
    """Where a run stands. `lost` are requests under way when a call of it was killed; tokens include all calls."""

    queries: int = 0
    replies: int = 0
    failed: int = 0
    in_batch: int = 0
    pending: int = 0
    requests: int = 0
    errors: int = 0
    lost: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    stopped: str | None = None
    reasons: dict[str, int] = field(default_factory=dict)
