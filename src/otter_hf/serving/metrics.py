"""Counters of the server in the text form that Prometheus reads."""

from collections import Counter


HELP = {
    "otter_requests_total": "Requests for a chat completion by HTTP status.",
    "otter_cancelled_total": "Answers that ended because the client left.",
    "otter_prompt_tokens_total": "Tokens of prompts, pictures included where they are tokens.",
    "otter_completion_tokens_total": "Tokens generated.",
    "otter_request_seconds_total": "Seconds from a request to the end of its answer, summed.",
    "otter_running": "Requests being prepared or answered.",
    "otter_waiting": "Requests waiting for their turn.",
    "otter_batch_rows": "Answers that get a token in each step.",
    "otter_batch_waiting": "Prompts that are being read, or wait for room in a batch.",
    "otter_batch_tokens": "Tokens that the caches of the batches have room for at the moment.",
}


class Metrics:
    """Counts that only the event loop changes."""

    def __init__(self):
        self._counts = Counter()

    def add(self, name: str, amount: float = 1, **labels) -> None:
        """Add to a counter; `labels` tell apart its kinds, such as `status=200`."""
        text = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
        self._counts[name, f"{{{text}}}" if text else ""] += amount

    def render(self, **gauges: float) -> str:
        """Everything in text format 0.0.4; `gauges` are values of this moment."""
        lines = []
        for name, description in HELP.items():
            lines.append(f"# HELP {name} {description}")
            lines.append(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
            if name in gauges:
                lines.append(f"{name} {gauges[name]}")
            else:
                values = {labels: value for (of, labels), value in self._counts.items() if of == name}
                lines += [f"{name}{labels} {value}" for labels, value in sorted(values.items())] or [f"{name} 0"]
        return "\n".join(lines) + "\n"
