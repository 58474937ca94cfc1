"""What a server allows."""

import math
from dataclasses import dataclass, field

from .fetch import FetchPolicy
from .media import MediaLimits


@dataclass(frozen=True)
class ServerSettings:
    """
    Limits of the server; each bounds time or memory that a stranger could take.

    Args:
        api_key: clients must send it as `Authorization: Bearer ...`; None lets everyone in.
        body_bytes: of a request.
        media: of the pictures and videos of a request.
        fetch: which addresses of pictures are read.
        new_tokens: of an answer; who asks for more gets this many.
        body_seconds: for a request to arrive.
        request_seconds: from a request to the end of its answer, waiting included.
        slots: requests prepared or answered at a time: the rows of a model's batch.
        batch_tokens: rows of a batch times the length of the longest, answer included; rows wait until there is room
            for all that they may say. See [`ContinuousBatch`].
        prefill_tokens: of new prompts that are read before others get their next token.
        prefix_bytes: of the keys and values of what prompts begin with alike, kept for each model; 0 keeps none.
        queue: requests that may wait; one more is answered with status 429.
        allow_origins: web pages of these origins (`http://localhost:3000`, or `*` for all) may ask from a browser.
        allow_hosts: names of this server, as in the `Host` of a request, beside those that are none of the web, see
            `is_allowed_host`; `*` for all.
        num_frames: read of a video, unless the request says otherwise (`chat_template_kwargs: {"num_frames": 8}`);
            None for as many as the model was trained with, see [`~otter_hf.loading.read_num_frames`].

    Raises:
        ValueError: naming a limit that lets nothing through.
    """

    api_key: str | None = None
    body_bytes: int = 20 << 20
    media: MediaLimits = field(default_factory=MediaLimits)
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    new_tokens: int = 1024
    body_seconds: float = 30.0
    request_seconds: float = 300.0
    slots: int = 16
    batch_tokens: int = 16_384
    prefill_tokens: int = 512
    prefix_bytes: int = 256 << 20
    queue: int = 64
    num_frames: int | None = None
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()

    def __post_init__(self):
        for name in (
            *("body_bytes", "new_tokens", "body_seconds", "request_seconds", "num_frames"),
            *("slots", "batch_tokens", "prefill_tokens"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be more than 0, not {value}.")
        for name in ("queue", "prefix_bytes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}.")
