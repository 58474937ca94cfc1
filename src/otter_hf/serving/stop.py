"""Stop strings in a stream of text."""


class StopFilter:
    """
    Passes text on up to the first stop string, which may come in pieces; white space at both ends is left out, so that
    a streamed answer equals a whole one.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: list[str]):
        self._stops = stops
        self._held = ""
        self._started = False
        self.stopped = False

    def feed(self, text: str) -> str:
        """What can be said for sure after another piece of text."""
        if self.stopped:
            return ""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self.flush()
        # what a stop string could begin with has to wait
        safe = len(self._held)
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
                if self._held.endswith(stop[:length]):
                    safe = min(safe, len(self._held) - length)
                    break
        return self._emit(self._held[:safe].rstrip())

    def flush(self) -> str:
        """What was held back, at the end."""
        text = self._emit(self._held.rstrip())
        self._held = ""
        return text

    def _emit(self, text: str) -> str:
        self._held = self._held[len(text) :]
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        return text
