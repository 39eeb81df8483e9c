"""Texts that may be published: where a model was made is private."""

import re
from pathlib import Path
from typing import Any

IS_PATH = re.compile(r"(file://)?(/|~/)[\w.]")
# A path inside a text, such as a command or an error: from the root or somebody's home.
IN_TEXT = re.compile(r"(?:file:/)?(?<![\w:/.~])~?(?:/[^\s/'\"=,;:\])]+)+")


def without_places(tree: Any, home: str) -> Any:
    """A config's tree in which each text that is a path is relative to the home, or is the last
    name of that path alone."""
    if isinstance(tree, dict):
        return {without_places(k, home): without_places(v, home) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_places(value, home) for value in tree]
    if not isinstance(tree, str):
        return tree
    text = _shortened(tree, home)
    return Path(text).name if IS_PATH.match(text) and "\n" not in text else text


def without_places_in(text: str, home: str) -> str:
    """A text in which each path is relative to the home, or is its last name alone."""
    return IN_TEXT.sub(lambda found: found[0].rpartition("/")[2], _shortened(text, home))


def _shortened(text: str, home: str) -> str:
    return text.replace(f"{home}/", "").replace(f"{Path.home()}/", "~/")
