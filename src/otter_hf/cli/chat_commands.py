"""What may be typed in `otter-hf chat` beside questions."""

import difflib
import os
import shlex


# name -> what follows it, and what it does
COMMANDS = {
    "/image": ("PATH ...", "add pictures to your next message; paths or URLs"),
    "/video": ("PATH", "add a film to your next message; a path or URL"),
    "/example": ("PATH QUESTION::ANSWER", "show the model how to answer"),
    "/controls": ("", "the last answer again with a blank picture and with another: did it look?"),
    "/clear": ("", "forget the conversation and the pictures that wait"),
    "/help": ("", "list these commands"),
    "/quit": ("", "leave, as /exit and Ctrl-D do"),
}
ALIASES = {"/exit": "/quit"}
HELP = ", ".join(f"{name} {what}".rstrip() for name, (what, _) in COMMANDS.items()) + "; Ctrl-C stops an answer"


def parse_line(line: str) -> tuple[str | None, str]:
    """
    A command and what follows it, or None and a question. A question that begins with `/` is written with `//`.

    Raises:
        ValueError: saying what to type instead, for a command that there is not or that lacks something.
    """
    line = line.strip()
    if line.startswith("//"):
        return None, line[1:]
    if not line.startswith("/"):
        return None, line
    typed, _, rest = line.partition(" ")
    name, rest = ALIASES.get(typed, typed), rest.strip()
    if name not in COMMANDS:
        close = difflib.get_close_matches(typed.lower(), [*COMMANDS, *ALIASES], n=1)
        is_path = "/" in typed[1:] or "." in typed
        hint = f"did you mean {close[0]}? " if close else "/image adds a picture; " if is_path else ""
        raise ValueError(
            f"{typed} is no command; {hint}/help lists them, and // begins a message that begins with a /."
        )
    what, _ = COMMANDS[name]
    if bool(rest) != bool(what):
        raise ValueError(f"{typed} takes nothing behind it." if rest else f"write {name} {what}")
    return name, rest


def split_paths(text: str) -> list[str]:
    """
    The paths in what follows a command: quoted or escaped as in a shell, or one path with spaces as it is.

    Raises:
        ValueError: for a quote without its end.
    """
    from ..serving.media import local_path

    if os.path.isfile(local_path(text)):
        return [text]
    paths = []
    while text:
        path, text = split_path(text)
        paths.append(path)
    return paths


def split_path(text: str) -> tuple[str, str]:
    """The first path in a text, see `split_paths`, and what follows it."""
    words = shlex.shlex(text, posix=True, punctuation_chars=False)
    words.whitespace_split, words.commenters = True, ""
    try:
        return words.get_token() or "", words.instream.read().strip()
    except ValueError:
        raise ValueError(f"{text} has a quote without its end; put paths with quotes or spaces in quotes.") from None


def media_parts(images: list[str], videos: list[str] = (), num_frames: int = 16) -> list[dict]:
    """Pictures and films at paths or URLs, as parts of a message; ValueError naming the one that cannot be read."""
    from ..serving.media import image_part, local_source, open_image, read_frames, video_part

    pictures = [image_part(open_image(local_source(name), name)) for name in images]
    return pictures + [video_part(read_frames(local_source(name), name, num_frames)) for name in videos]


def other_pictures() -> list[list[dict]]:
    """Pictures of this package, one of which stands in for those of a question: a circle, a square, a triangle."""
    from importlib.resources import files

    from ..serving.media import image_part, open_image

    folder = files("otter_hf.demo") / "examples"
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(".png"))
    return [[image_part(open_image((folder / name).read_bytes(), name))] for name in names]


def describe(part: dict) -> str:
    """A picture or film in words."""
    if part["type"] == "image":
        return f"{part['image'].width} x {part['image'].height}"
    frames = part["video"]
    return f"{len(frames)} frame{'s' * (len(frames) > 1)} of {frames[0].width} x {frames[0].height}"
