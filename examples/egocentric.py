"""
An assistant that sees what you see: a film plays on, a window of its last frames is what the model is asked about.

    python examples/egocentric.py FILM --model MODEL
    > /frame 12           the film is at second 12 now, and so are the frames of the window before it
    > what am I holding?
    0:05-0:12  a cup
    > /when am I holding a cup?
    0:09  (0.83)
    > /frame              one step further

Frames are read once, in the film's order, `--step` seconds apart; the window holds the last `--window` of them, as one
video. `/when` asks of each frame of the window by itself, and answers with the time of the one that is most of all a
yes.
"""

import argparse
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from otter_hf.evaluation.model import ConversationModel
from otter_hf.films import open_film


class RollingWindow:
    """
    The last frames of a film as it plays on.

    Args:
        film: path of the film.
        step: seconds between two frames.
        size: frames in the window.
    """

    def __init__(self, film: str | Path, step: float = 1.0, size: int = 8):
        if step <= 0 or size < 1:
            raise ValueError(f"step must be a positive number of seconds and size at least 1, got {step} and {size}.")
        self.step = step
        self.frames: deque[tuple[float, Image.Image]] = deque(maxlen=size)
        self._coming, self._due = self._sampled(film), 0.0

    @property
    def time(self) -> float:
        """Second of the last frame; 0 before the first."""
        return self.frames[-1][0] if self.frames else 0.0

    def play(self, until: float | None = None) -> bool:
        """Plays to a second, or by one frame; whether the film still had any. What has been played does not return."""
        if until is not None and until < self.time:
            raise ValueError(f"The film is at {clock(self.time)} and does not go back to {clock(until)}.")
        played = False
        while until is None or self._due <= until:
            frame = next(self._coming, None)
            if frame is None:
                break
            self.frames.append(frame)
            played = True
            if until is None:
                break
        return played

    def _sampled(self, film: str | Path) -> Iterator[tuple[float, Image.Image]]:
        with open_film(Path(film)) as opened:
            for frame in opened.frames():
                time = float(frame.time)
                if time >= self._due:
                    # the next multiple of the step; a film may have fewer frames than that
                    self._due = self.step * (math.floor(time / self.step) + 1)
                    yield time, frame.image()


def answer(model: ConversationModel, window: RollingWindow, question: str, max_new_tokens: int = 64) -> str:
    """What the model says about the window, behind the times of its first and last frame."""
    frames = [image for _, image in window.frames]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": question}]
    reply = model.generate([[{"role": "user", "content": content}]], max_new_tokens=max_new_tokens)[0]
    return f"{clock(window.frames[0][0])}-{clock(window.time)}  {reply}"


def when(model: ConversationModel, window: RollingWindow, question: str) -> tuple[float, float]:
    """Time of the frame that is most of all a yes to the question, and the probability of yes there."""

    def yes(image: Image.Image) -> float:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        scores = model.log_likelihood([{"role": "user", "content": content}], ["yes", "no"])
        return 1 / (1 + math.exp(min(700.0, scores[1][0] - scores[0][0])))

    score, time = max(((yes(image), time) for time, image in window.frames), key=lambda pair: (pair[0], -pair[1]))
    return time, score


def clock(seconds: float) -> str:
    """`m:ss`, with a tenth where the time is not whole."""
    minutes, rest = divmod(max(0.0, round(seconds, 1)), 60)
    return f"{int(minutes)}:{int(rest):02d}" + (f".{round(rest % 1 * 10)}" if rest % 1 else "")


def converse(model: ConversationModel, window: RollingWindow, lines: Iterable[str]) -> Iterator[str]:
    """The answers to what is typed."""
    for line in map(str.strip, lines):
        command, _, rest = line.partition(" ")
        if not line or command == "/quit":
            if line:
                return
        elif command == "/frame":
            try:
                more = window.play(float(rest) if rest else None)
            except ValueError as error:
                yield f"/frame takes a second of the film that is still to come: {error}"
                continue
            yield f"at {clock(window.time)}, {len(window.frames)} frames" + ("" if more else "; nothing more to play")
        elif line.startswith("/") and command != "/when":
            yield "there are /frame [SECOND], /when QUESTION, /quit, and questions"
        elif not window.frames:
            yield "no frame has been seen: /frame plays the film"
        elif command == "/when":
            time, score = when(model, window, rest)
            yield f"{clock(time)}  ({score:.2f})"
        else:
            yield answer(model, window, line)


def main(arguments: list[str] | None = None) -> None:
    """Talks on the terminal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("film")
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--step", type=float, default=1.0, help="seconds between frames (default: 1)")
    parser.add_argument("--window", type=int, default=8, help="frames that are remembered (default: 8)")
    given = parser.parse_args(arguments)
    window = RollingWindow(given.film, given.step, given.window)
    for reply in converse(ConversationModel(given.model), window, sys.stdin):
        print(reply, flush=True)


if __name__ == "__main__":
    main()
