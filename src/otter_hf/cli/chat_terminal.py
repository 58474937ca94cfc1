"""The conversation of `otter-hf chat`: lines in, answers as they come."""

import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from prompt_toolkit import PromptSession, completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from rich.console import Console
from rich.table import Table
from torch import OutOfMemoryError

from ..serving.session import ChatSession
from ..serving.stop import StopFilter
from ..serving.streamer import AnswerStreamer
from .chat_commands import (
    COMMANDS,
    HELP,
    describe,
    media_parts,
    other_pictures,
    parse_line,
    split_path,
    split_paths,
)


HISTORY = Path(HF_HOME) / "otter_hf_chat_history"


class Chat:
    """
    A person's side of a conversation. What is refused goes to the standard error, all else to the standard output.

    Args:
        session: the conversation.
        media: of the next message.
        options: for `generate`.
        num_frames: read of a film.
        controls: after each answer, say what it would be with a blank picture and with another.
    """

    def __init__(
        self, session: ChatSession, media: list[dict], options: dict, num_frames: int, controls: bool = False
    ):
        self.session, self.media, self.options, self.num_frames = session, media, options, num_frames
        self.controls = controls
        self.notes, self.errors = _console(sys.stdout), _console(sys.stderr)

    def interact(self, model: str) -> None:
        """Questions and commands until they end: from a terminal with line editing, else line by line."""
        if sys.stdin.isatty() and sys.stdout.isatty():
            self._say(f"{model} listens. Ask; /image PATH adds a picture, /help lists commands, Ctrl-D leaves.")
            self.follow(line_editor(), keeps_on=True)
        else:
            print(f"commands: {HELP}")
            self.follow(read_line)

    def follow(self, read: Callable[[], str | None], keeps_on: bool = False) -> None:
        """
        Args:
            read: gives what was typed or pasted, None at the end.
            keeps_on: Ctrl-C at the prompt does not end the conversation.
        """
        while True:
            try:
                text = read()
            except KeyboardInterrupt:
                if not keeps_on:
                    raise
                self._say("Ctrl-D or /quit leaves.")
                continue
            if text is None:
                return
            try:
                if self._take(text):
                    return
            except ValueError as error:
                self.errors.print(str(error).strip(), style="red")
            except OutOfMemoryError:
                self.errors.print("The conversation is too long for the device's memory: /clear it.", style="red")
            except KeyboardInterrupt:
                print("\n(stopped)", flush=True)
                self._say("Nothing of that answer is kept. Ask on, or leave with Ctrl-D or /quit.")

    def _take(self, text: str) -> bool:
        """One message, in front of which there may be lines with commands; True to leave."""
        while text.strip():
            line, _, rest = text.strip().partition("\n")
            command, words = parse_line(line)
            if command is None:
                self.ask(words + ("\n" + rest if rest else ""))
                return False
            if command == "/quit":
                return True
            self._run(command, words)
            text = rest
        return False

    def _run(self, command: str, words: str) -> None:
        if command == "/help":
            self._help()
        elif command == "/clear":
            self.session.clear()
            self.media = []
            kept = "" if self.session.skill is None else " that begins with the skill"
            self._say(f"Forgotten: a new conversation{kept}.")
        elif command == "/controls":
            self._control()
        elif command == "/image":
            paths = split_paths(words)
            self._add(paths, media_parts(paths))
        elif command == "/video":
            for path in split_paths(words):
                self._add([path], media_parts([], [path], self.num_frames))
        elif command == "/example":
            path, exchange = split_path(words)
            question, separator, answer = exchange.partition("::")
            if not separator:
                raise ValueError(f"write /example {COMMANDS['/example'][0]}")
            media = media_parts([path])
            self.session.add_example(question.strip(), answer.strip(), media)
            self._say(f"{path} ({describe(media[0])}) shows how to answer.")

    def _add(self, names: list[str], media: list[dict]) -> None:
        self.media = [*self.media, *media]
        added = ", ".join(f"{name} ({describe(part)})" for name, part in zip(names, media, strict=True))
        kinds = {"image": "picture", "video": "film"}
        counts = {word: sum(part["type"] == kind for part in self.media) for kind, word in kinds.items()}
        waiting = " and ".join(f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items() if count)
        self._say(f"{added}; your next message has {waiting}.")

    def ask(self, question: str) -> None:
        """Ask about the media that wait, and print the answer as it comes; with beams, when it is whole."""
        tokenizer = self.session.processor.tokenizer
        stop = StopFilter(self.options.get("stop_strings") or [])
        waiting = self.notes.status("")  # a spinner, in a terminal only

        def show(piece: str | None) -> None:
            if text := stop.flush() if piece is None else stop.feed(piece):
                waiting.stop()
                print(_printable(text), end="", flush=True)

        with waiting:
            if self.options.get("num_beams", 1) == 1:
                self.session.ask(question, self.media, streamer=AnswerStreamer(tokenizer, show), **self.options)
            else:
                show(self.session.ask(question, self.media, **self.options))
                show(None)
        print(flush=True)
        self.media = []
        if self.controls:
            self._control()

    def _control(self) -> None:
        """What the last answer would be with other pictures."""
        if not any(message["role"] == "assistant" for message in self.session.messages):
            raise ValueError("There is no answer yet: ask about a picture first.")
        for control, name in (("blank", "a blank picture"), ("swapped", "another picture")):
            answer = self.session.ask_with_control(control, other_pictures(), **self.options)
            if answer is None:
                self._say("No picture was asked about.")
                return
            print(f"with {name}: {_printable(answer)}", flush=True)

    def _help(self) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, (what, does) in COMMANDS.items():
            table.add_row(f"{name} {what}", does)
        table.add_row("Ctrl-C", "stop an answer")
        table.add_row("Up, Tab, Alt-Enter", "earlier lines, complete a command or path, a new line")
        self.notes.print(table)

    def _say(self, sentence: str) -> None:
        self.notes.print(sentence, style="dim")


def _console(file) -> Console:
    # lines are broken for a terminal only
    return Console(file=file, highlight=False, markup=False, soft_wrap=not file.isatty())


def _printable(text: str) -> str:
    """Without the characters that would command a terminal, where there is one."""
    if not sys.stdout.isatty():
        return text
    return "".join(character for character in text if character in "\n\t" or unicodedata.category(character) != "Cc")


def read_line() -> str | None:
    """One line of the standard input; None at its end."""
    try:
        return input("> ")
    except EOFError:
        return None


def line_editor(history: Path = HISTORY) -> Callable[[], str | None]:
    """
    A function like `read_line` for a terminal: with editing, the lines of earlier sessions, and completion of commands
    and paths. What is pasted stays together.

    Args:
        history: file of the lines that were typed.
    """
    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    editor: PromptSession = PromptSession(
        HTML("<ansigreen>&gt; </ansigreen>"),
        history=_open_history(history),
        completer=Completer(),
        complete_while_typing=False,
        key_bindings=keys,
        prompt_continuation="  ",
    )

    def read() -> str | None:
        try:
            return editor.prompt()
        except EOFError:
            return None

    return read


def _open_history(path: Path) -> History:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:  # no place to write
        return InMemoryHistory()
    return FileHistory(path)


class Completer(completion.Completer):
    """Commands, and paths behind those that take one."""

    def get_completions(self, document, complete_event):
        typed, space, rest = document.text_before_cursor.partition(" ")
        if not space:
            names = [name for name in COMMANDS if typed.startswith("/") and name.startswith(typed)]
            yield from (completion.Completion(name, start_position=-len(typed)) for name in names)
        elif typed in COMMANDS and COMMANDS[typed][0].startswith("PATH"):
            path = Document(rest.rpartition(" ")[2])
            yield from completion.PathCompleter(expanduser=True).get_completions(path, complete_event)
