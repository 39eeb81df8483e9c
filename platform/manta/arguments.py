"""Reads the arguments of a job (YAML files and `key=value`) into one tree; writes trees as YAML.

The type of a key decides how `key=value` is read: text is taken literally, anything else is YAML.
"""

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, UnsupportedInterpolationType

from manta.errors import ConfigError
from manta.terminal import visible

# A file may refer to its other keys, `${a.b}`, and to nothing else: OmegaConf's own functions also
# read the environment, so that someone else's file could copy a secret into logs and records.
FUNCTIONS = (
    "oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.env",
    "oc.select",
)  # fmt: skip
for _name in FUNCTIONS:
    OmegaConf.clear_resolver(_name)


class _Positive(tuple[Any, ...]):
    """All numbers above 0; the first of them is named in messages."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and value > 0


POSITIVE = _Positive((1,))
Condition = tuple[str, str, tuple[Any, ...]]
"""(key, choice, values): the key counts only where the key `choice` has one of these values."""


def read(
    cls: type, arguments: Sequence[str], say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Reads `[config.yaml ...] [key=value ...]` for the config class `cls` into one unchecked tree.
    Later arguments override earlier ones.

    A key whose type is text (str, or str | None) takes everything after the first '=' literally; if
    its type allows None, the bare word null means None. The value of any other key is YAML.

    Groups are merged. A value that is a dict is replaced as a whole, unless the argument names one
    of its entries: `mix={a: 1}` sets the whole mix, `mix.a=1` only its entry `a`.

    A class may list conditions, `only_for`. If an argument makes a choice with which a key of a
    file before it does not count, that key is dropped, and `say` gets a line about it.

    Raises:
        ConfigError: an argument cannot be read, or does not fit those before it.
    """
    tree: Any = {}
    files: dict[str, str] = {}
    for argument in arguments:
        over, depth = _read(cls, argument)
        _drop_replaced(cls, tree, over, depth)
        for key, choice, values in _conditions(cls):
            value, chosen = _at(over, key), _at(over, choice)
            if value is not _NOTHING:
                files[key] = argument if depth == 0 else ""
            elif chosen is not _NOTHING and chosen not in values and (file := files.pop(key, "")):
                why = f"of {file} is not used: it is for {choice}={_shown(values[0])}"
                _drop(cls, tree, key, why, say)
        try:
            tree = OmegaConf.to_container(OmegaConf.merge(_container(tree), _container(over)))
        except (OmegaConfBaseException, TypeError) as e:
            raise ConfigError(
                f"'{argument}' does not fit the arguments before it: {_first_line(e)}"
            ) from None
    try:
        plain = OmegaConf.to_container(_container(tree), resolve=True)
    except UnsupportedInterpolationType as e:
        name = str(e).partition("\n")[0].removeprefix("Unsupported interpolation type ")
        raise ConfigError(
            f"{e.full_key}: ${{{name}:...}} is not computed in a config: write the value itself, "
            "refer to another key (${a.b}), or write \\${ for the two characters"
        ) from None
    except OmegaConfBaseException as e:
        raise ConfigError(f"the config cannot be resolved: {_first_line(e)}") from None
    if not isinstance(plain, dict):
        raise ConfigError("a config is a mapping of keys to values, not a list")
    found: dict[str, Any] = _each(plain, lambda v: str(v) if isinstance(v, _Text) else v)
    return {str(key): value for key, value in found.items()}


def _conditions(cls: type, prefix: str = "") -> Iterator[Condition]:
    """The conditions of a config class and of the configs in it; keys have their full path."""
    for base in cls.__mro__:
        for key, choice, values in vars(base).get("only_for", ()):
            yield f"{prefix}{key}", f"{prefix}{choice}", values
    for name, group in groups_of(cls).items():
        yield from _conditions(group, f"{prefix}{name}.")


_NOTHING = object()


def _at(tree: Any, key: str) -> Any:
    """The value of a key in a tree; _NOTHING if it is not there."""
    for name in key.split("."):
        tree = tree.get(name, _NOTHING) if isinstance(tree, dict) else _NOTHING
    return str(tree) if isinstance(tree, _Text) else tree


def _drop(cls: type, tree: Any, key: str, why: str, say: Callable[[str], None]) -> None:
    """Deletes a key from a tree; says so if its value is not the default."""
    *groups, name = key.split(".")
    value = _at(tree, key)
    if value is _NOTHING:
        return
    for group in groups:
        cls, tree = groups_of(cls)[group], tree[group]
    del tree[name]
    (default,) = (f.default for f in dataclasses.fields(cls) if f.name == name)
    if value != default:
        say(f"{key}={_shown(value)} {why}")


def _shown(value: Any) -> str:
    """A value as an argument has it: true, null, [1, 2], or a text as it is."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def is_file(argument: str) -> bool:
    """Whether an argument is a config file rather than key=value."""
    try:
        return Path(argument).is_file()
    except (OSError, ValueError):  # too long for a file name, or has a NUL: a value
        return False


@functools.cache
def groups_of(cls: type) -> Mapping[str, type]:
    """The keys of a config that are configs themselves."""
    hints = typing.get_type_hints(cls)
    return {k: h for k, h in hints.items() if isinstance(h, type) and dataclasses.is_dataclass(h)}


def to_yaml(tree: Any) -> str:
    """Writes a plain tree as YAML that `read` reads back equal."""
    tree = _each(tree, _escaped)
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    # What YAML writes raw and reads back as a space, or a terminal shows as an escape, is quoted.
    if visible(text) != text:
        text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
    return text


class _Dumper(yaml.SafeDumper):
    """A dumper that also quotes texts such as "1e3", which only OmegaConf reads as a number."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class _Text:
    """A text that OmegaConf leaves alone: in a plain str it interprets `${key}` and `???`."""

    def __init__(self, text: str):
        self._text = text

    def __str__(self) -> str:  # the value of `${key}` in a file, if that key has this text
        return self._text


def _container(tree: Any) -> Any:
    return OmegaConf.create(tree, flags={"allow_objects": True})


def _tree_of(container: Any) -> Any:
    """Converts what OmegaConf has read into a tree; texts without `${key}` in it are final."""
    tree = _with_text_keys(OmegaConf.to_container(container))
    return _each(tree, lambda v: _Text(v) if isinstance(v, str) and "${" not in v else v)


def _each(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a tree with `change(value)` in place of each value in its dicts and lists."""
    if isinstance(tree, dict):
        return {key: _each(value, change) for key, value in tree.items()}
    return [_each(v, change) for v in tree] if isinstance(tree, list) else change(tree)


def _escaped(value: Any) -> Any:
    """A text, escaped so that OmegaConf reads it back from a file unchanged."""
    if not isinstance(value, str):
        return value
    escape = "\\" if re.fullmatch(r"\\+\?{3}", value) else ""
    return escape + re.sub(r"(\\*)\$\{", r"\1\1\\${", value)


def _read(cls: type, argument: str) -> tuple[dict[str, Any], int]:
    """Reads an argument; returns its tree and the number of names that lead to its value: 2 for
    optimizer.lr=1, mix[a]=1 or mix.v1\\.5=1, 0 for a file."""
    parts = re.match(r"((?:\\[.=\[\]]|[^=])*+)=(.*)", argument, re.DOTALL)
    try:
        if is_file(argument):
            loaded = OmegaConf.load(argument)
            if not OmegaConf.is_dict(loaded):
                raise ConfigError(f"{argument}: a config is a mapping of keys to values")
            return _tree_of(loaded), 0
        if parts is None:
            raise ConfigError(
                f"'{argument}': no such config file (arguments are a YAML file or key=value)"
            )
        key, text = parts.groups()
        if not key.strip():
            raise ConfigError(f"'{argument}': a key is missing before '='")
        names = _names(key)
        kind = _kind_of(cls, names)
        if kind not in (str, str | None):
            return _tree_of(OmegaConf.from_dotlist([argument])), len(names)
        value: Any = None if text == "null" and kind is not str else _Text(text)
        for name in reversed(names):
            value = {name: value}
        return value, len(names)
    except (OmegaConfBaseException, yaml.YAMLError, LookupError, ValueError, OSError) as e:
        raise ConfigError(f"'{argument}' cannot be read: {_first_line(e)}") from None


def _names(key: str) -> list[str]:
    """The names in a key, as OmegaConf reads them: `a` and `b` in `a.b` or `a[b]`."""
    names, tree = [], OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}="]))
    while isinstance(tree, dict):
        ((name, tree),) = tree.items()
        names.append(str(name))
    return names


def _kind_of(kind: Any, names: Sequence[str]) -> Any:
    """The type of the value that these names lead to in a config; None if there is no such key."""
    for name in names:
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            kind = hints.get(name, hints.get(f"{name}_"))  # (a Python keyword, such as `from`)
        else:
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    return kind


def _with_text_keys(tree: Any) -> Any:
    """Turns int keys into texts (`8000: x` into `'8000': x`), as arguments and `to_yaml` do."""
    if not isinstance(tree, dict):
        return tree
    return {str(k) if type(k) is int else k: _with_text_keys(v) for k, v in tree.items()}


def _drop_replaced(cls: type | None, tree: Any, over: Any, depth: int) -> None:
    """Deletes from `tree` the dicts that `over` replaces: those that are values rather than groups,
    and that an argument whose key has `depth` names gives again."""
    groups = {} if cls is None else groups_of(cls)
    for key, value in over.items():
        if not isinstance(value, dict) or not isinstance(tree.get(key), dict):
            continue
        if key not in groups and depth <= 1:
            del tree[key]
        else:
            _drop_replaced(groups.get(key), tree[key], value, depth - 1)


def _first_line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200]
