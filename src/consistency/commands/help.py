"""`--help` of each command, and what is said of options, groups and values that do not exist."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from consistency.config import CONF_DIR, EXPERIMENTS_DIR

_OPTION = re.compile(r"(?P<name>[a-z]\w*):(?: (?P<value>.*?))?(?:\s+# (?P<comment>.*))?")
_GROUP = re.compile(r"  - (?P<name>[a-z]\w*): (?P<value>\S+)(?:\s+# (?P<comment>.*))?")
_WIDTH = 100


def help_page(command: str, config_name: str) -> str:
    """What the command does, examples, its options with their defaults and comments, and its groups of settings."""
    lines = _lines(config_name)
    head = [line[2:] for line in lines if line.startswith("# ")]
    purpose, examples = head[0], [line.strip() for line in head if line.startswith("  consistency-")]
    page = [f"consistency-{command}: {purpose}", "", "Examples:", *(f"  {line}" for line in examples), "", "Options:"]
    for found in _matches(_OPTION, lines):
        if found["name"] not in ("defaults", "hydra"):
            value = "(needed)" if found["value"] == "???" else found["value"] or "null"
            page += _entry(f"{found['name']}={value}", found["comment"] or "")
    groups = {found["name"]: found["value"] for found in _matches(_GROUP, lines) if _choices(found["name"])}
    groups |= {name: "(of the method)" for name in _brought_by(groups) if name not in groups}
    if groups:
        page += ["", "Groups (GROUP=CHOICE; each setting of one is an option, as GROUP.SETTING=VALUE):"]
    for name, value in groups.items():
        page += _entry(f"{name}={value}", ", ".join(_choices(name)))
    more = f"consistency-{command} ... --cfg job shows all settings; docs/ explains them."
    return "\n".join([*page, "", more])


def _entry(what: str, comment: str) -> list[str]:
    indented = textwrap.wrap(comment, _WIDTH - 30) or [""]
    first = f"  {what:<26}  {indented[0]}" if len(what) <= 26 else f"  {what}\n{'':30}{indented[0]}"
    return [first.rstrip(), *(f"{'':30}{line}" for line in indented[1:])]


def _matches(pattern: re.Pattern[str], lines: Sequence[str]) -> Iterator[re.Match[str]]:
    for line in lines:
        if found := pattern.fullmatch(line):
            yield found


def _lines(config_name: str) -> list[str]:
    """Of a command's file, and of those that it extends: curve.yaml begins with evaluate.yaml."""
    own = (CONF_DIR / f"{config_name}.yaml").read_text().splitlines()
    extended = [line.removeprefix("  - ") for line in own if re.fullmatch(r"  - [a-z]+", line)]
    inherited = [line for name in extended for line in _lines(name) if not line.startswith("# ")]
    named = {found["name"] for found in _matches(_OPTION, own)}
    return own + [line for line in inherited if not (found := _OPTION.fullmatch(line)) or found["name"] not in named]


def _brought_by(groups: Iterable[str]) -> list[str]:
    """Groups that the files of others put beside themselves, as a method its metric and levels."""
    files = [file for group in groups for file in sorted((CONF_DIR / group).glob("*.yaml"))]
    return [name for file in files for name in re.findall(r"- /(\w+)@_global_\.\1:", file.read_text())]


def _choices(group: str) -> list[str]:
    """Names that a group may have."""
    folders = (CONF_DIR / group, EXPERIMENTS_DIR / group)
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})


def refuse_unknown(config_name: str, arguments: Sequence[str]) -> None:
    """Refuse `+num_sample=5`: what is added under a name that the command does not have would do nothing.

    Raises:
        ValueError: with the name that may have been meant.
    """
    if any(re.match(r"--config-dir|-cd\b", argument) for argument in arguments):
        return  # a folder of the user's may have options of its own
    lines = _lines(config_name)
    options = {found["name"] for pattern in (_OPTION, _GROUP) for found in _matches(pattern, lines)}
    for argument in arguments:
        name = re.match(r"\++(\w+)=", argument)
        if name and name[1] not in options and not _choices(name[1]):
            raise ValueError(f"there is no option {name[1]}{_meant(name[1], sorted(options))}")


def explained(config_name: str, error: Exception) -> str:
    """One line about a configuration that does not compose, without Hydra's hint to add what nothing reads."""
    text = str(error)
    if found := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        group, value = found[1], found[2]
        choices = re.findall(r"^\t(\w+)$", text, re.MULTILINE) or _choices(group)
        return f"{group} is {value}; allowed: {', '.join(choices)}{_meant(value, choices)}"
    if found := re.search(r"Could not override '([^']+)'", text):
        option = found[1]
        if "defaults list" in text:
            return f"{option} is no group of this command and its other choices{_meant(option, _groups(config_name))}"
        return f"there is no option {option} here{_meant(option, _options(config_name))}"
    return text.splitlines()[0]


def _meant(given: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _groups(config_name: str) -> list[str]:
    return [found["name"] for found in _matches(_GROUP, _lines(config_name))]


def _options(config_name: str) -> list[str]:
    """Dotted names of the options of a command and of all files of its groups."""
    names = [found["name"] for found in _matches(_OPTION, _lines(config_name))]
    for file in CONF_DIR.glob("*/*.yaml"):
        names += _dotted(file, file.parent.name)
    return sorted(set(names))


def _dotted(file: Path, group: str) -> list[str]:
    """Names of the settings in a file, from the indentation of its lines."""
    above, names = list[str](), list[str]()
    for line in file.read_text().splitlines():
        if found := re.match(r"(\s*)([a-z]\w*):", line):
            depth = len(found[1]) // 2
            above = [*above[:depth], found[2]]
            names.append(".".join([group, *above]))
    return names
