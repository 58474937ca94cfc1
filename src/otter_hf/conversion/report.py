"""What a conversion did with every tensor, as a table for people and programs."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers

from .tensors import ConversionError


@dataclass
class ConversionReport:
    """
    Filled while a conversion is planned and written; saved as `conversion_report.json` beside the result.

    `tensors` maps `source: name` to the name in the result; `unused` and `missing` map names to the reason why that is
    right; `initialised` maps names to what was filled in; `unexplained` holds everything else, which is an error
    unless it is allowed.
    """

    conversion: str
    sources: dict[str, list[dict]] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    initialised: dict[str, str] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    token_table: dict[str, int] = field(default_factory=dict)
    dtype: str | None = None
    files: list[dict] = field(default_factory=list)
    verification: dict | None = None

    def check(self, allow: bool) -> None:
        """Raise ConversionError if anything is unexplained and that is not allowed."""
        if self.unexplained and not allow:
            more = f" (and {len(self.unexplained) - 3} more)" if len(self.unexplained) > 3 else ""
            raise ConversionError(
                f"{'; '.join(self.unexplained[:3])}{more}; nothing was written, pass --allow to convert all the same."
            )

    def to_dict(self) -> dict:
        """The report with the versions it was made with."""
        # the package's version is not known while it is being imported
        from otter_hf import __version__

        versions = {"otter_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
        return {**asdict(self), "versions": versions}

    def save(self, folder: Path) -> None:
        """Write `conversion_report.json`."""
        (folder / "conversion_report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{self.conversion}: {len(self.tensors)} tensors taken over, {len(self.unused)} left out with a reason, "
            f"{len(self.initialised)} initialised, {len(self.unexplained)} unexplained; dtype {self.dtype}"
        ]
        lines += [f"  initialised {name}: {how}" for name, how in _first(self.initialised.items())]
        lines += [f"  missing {name}: {why}" for name, why in _first(self.missing.items())]
        lines += [f"  unexplained: {what}" for what in _first(self.unexplained)]
        lines += [f"  {reason}: {count} tensors left out" for reason, count in Counter(self.unused.values()).items()]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  token {token}: {token_id}" for token, token_id in self.token_table.items()]
        if self.verification:
            difference, largest, equal = (self.verification[key] for key in _VERIFIED)
            lines.append(
                "  verified: the folder was loaded, and compared with a model put together from the sources on one "
                f"random prompt with a picture: logits of up to {largest:.3g} differ by {difference:.3g} at most, the "
                f"most likely token is the same at {equal:.0%} of the places"
            )
        return "\n".join(lines)


_VERIFIED = ("max_logit_difference", "max_logit", "equal_most_likely_tokens")


def _first(items, number: int = 5) -> list:
    return list(items)[:number]
