"""The parser of every command: mistakes end in one sentence, with what was meant where that can be told."""

import argparse
import difflib
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """
    An `ArgumentParser` whose errors are one sentence: neither the usage of many lines, nor flags without a hint.

    Subcommands that hand on what they do not know set the default `takes_rest`.
    """

    def error(self, message: str):
        """End with the sentence and status 2."""
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` says more)\n")

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse; what is left over is an error here, where the flags that it might stand for are known."""
        words = sys.argv[1:] if args is None else [*args]
        namespace, rest = super().parse_known_args(words, namespace)
        if rest and not getattr(namespace, "takes_rest", False):
            self.error(self._unknown(rest, words))
        return namespace, rest

    def _unknown(self, rest: list[str], words: list[str]) -> str:
        flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
        sentences = []
        for flag in flags:
            sentences.append(f"there is no {flag}{nearest(flag, self._option_string_actions)}")
        return "; ".join(sentences) or f"nothing takes {' '.join(map(repr, rest))}{self._repeated(rest[0], words)}"

    def _repeated(self, word: str, words: list[str]) -> str:
        """`--image A B`: what to do, if the flag in front of B may be repeated."""
        before = words[: words.index(word)] if word in words else []
        flags = [flag for flag in before if flag in self._option_string_actions]
        takes_one = flags and self._option_string_actions[flags[-1]].nargs is None
        if takes_one and isinstance(self._option_string_actions[flags[-1]], argparse._AppendAction):
            return f": repeat {flags[-1]} in front of each"
        return ""

    def _check_value(self, action, value):
        """A choice that does not exist, in words, with the nearest one."""
        if action.choices is not None and value not in action.choices:
            name = action.metavar if isinstance(action.metavar, str) else action.dest
            name = action.option_strings[-1] if action.option_strings else name
            choices = [*map(str, action.choices)]
            hint = nearest(str(value), choices) or f": use one of {', '.join(choices)}"
            raise argparse.ArgumentError(None, f"{name} cannot be {value!r}{hint}")


def add_command(commands, name: str, run: Callable, help: str) -> argparse.ArgumentParser:
    """A subcommand that sets `func` to `run`; the sentence of its help is its description, too."""
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(func=run)
    return parser


def nearest(word: str, known) -> str:
    """`, did you mean X?` for the nearest of the known words; empty where none is near."""
    spellings = {name.replace("_", "-").lower(): name for name in known}
    close = difflib.get_close_matches(word.replace("_", "-").lower(), spellings, n=1)
    return f", did you mean {spellings[close[0]]}?" if close else ""
