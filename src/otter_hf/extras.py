"""What is not installed with the package, and the line that installs it."""

import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement


_PACKAGE = "otter-hf"


def missing(what: str, extra: str) -> str:
    """
    The sentence for what needs packages that are not there, with the line that installs them in this environment.

    The line names the packages, not an extra of ours, so that it is right from a clone and from a wheel alike.

    Args:
        what: that needs them, such as `"serving"`.
        extra: of `pyproject.toml`.
    """
    needed = requirements(extra)
    if not needed:
        return f"{what} needs the extra {extra!r}, which is newer than this installation: install the package again."
    # all of them, where one is there and cannot be imported
    absent = [requirement for requirement in needed if not _is_installed(requirement)] or needed
    names = [requirement.name for requirement in absent]
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{what} needs {listed}: {pip_install(*map(str, absent))}"


def require(what: str, extra: str) -> None:
    """`ValueError` with the sentence of `missing`, if a package of the extra is not installed."""
    if not all(map(_is_installed, requirements(extra))):
        raise ValueError(missing(what, extra))


def pip_install(*arguments: str) -> str:
    """A line for the shell: the pip of this very environment, whether or not it is activated."""
    found = shutil.which("pip")
    is_ours = found is not None and Path(found).parent == Path(sys.executable).parent
    return shlex.join([*(["pip"] if is_ours else [sys.executable, "-m", "pip"]), "install", *arguments])


def requirements(extra: str) -> list[Requirement]:
    """The packages of an extra, with those of the extras that it takes in."""
    found: list[Requirement] = []
    try:
        lines = requires(_PACKAGE) or ()
    except PackageNotFoundError:  # a source tree on the path
        return found
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        requirement.marker = None
        if requirement.name == _PACKAGE:
            found += [one for other in sorted(requirement.extras) for one in requirements(other)]
        else:
            found.append(requirement)
    return found


def _is_installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False
