"""Configs: frozen dataclasses, filled from a YAML file and `key=value` arguments.

A config class is in the room of the code that it configures. Larger configs contain it:

    @config
    class OptimizerConfig:
        lr: PositiveFloat = 1e-3
        '''Peak learning rate.'''

`load` reads YAML and arguments (arguments.py), converts and checks types (pydantic), then asks
every config for problems that span keys (`problems()`), and reports all problems at once.
"""

import copy
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, dataclass_transform

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from manta import arguments
from manta.arguments import groups_of
from manta.errors import ConfigError
from manta.security import SECRET_IN_ADDRESS, has_secret
from manta.terminal import line, named

C = TypeVar("C")

NO_TEXT = "not a text in UTF-8; write it in UTF-8"


@dataclass_transform(frozen_default=True)
def config(cls: type[C]) -> type[C]:
    """Makes `cls` a frozen, checked config whose field docstrings become its help."""
    options = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True, strict=False
    )
    return pydantic_dataclass(frozen=True, config=options)(cls)  # type: ignore[return-value]


def _no_bool(value: Any) -> Any:
    """Refuses booleans: Python counts `true` as 1, but `steps=true` was meant differently."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Natural = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=1 << 63)]  # torch's limit
Port = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=65535)]
PositiveFloat = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1)]
PositiveFraction = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=1)]
OpenFraction = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, lt=1)]
# With errors=replace, each byte can become three, and shards count the bytes of a text in 32 bits.
DocumentBytes = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=1 << 30)]
# 256 bytes and the end-of-text token are the least that can spell every text.
VocabSize = Annotated[int, BeforeValidator(_no_bool), Field(ge=257, le=1 << 20)]


MOST_NAME_BYTES = 200  # of a file system's 255, as Manta adds to names: .NAME.lock, NAME-best
MOST_NAMES_BYTES = 800  # of several joined by '/'


def name_of_dataset(value: str) -> str:
    """Returns the value. Raises ValueError unless it can be the name of a folder in the home."""
    if not re.fullmatch(r"[\w-][\w.-]*", value):
        raise ValueError("letters, digits, '.', '_' and '-' are valid, and no '.' at the start")
    if len(value.encode(errors="surrogatepass")) > MOST_NAME_BYTES:
        raise ValueError(f"longer than {MOST_NAME_BYTES} bytes: shorten it")
    return value


def name_of_run(value: str) -> str:
    """Returns the value. Raises ValueError unless it is one name of a folder, or several joined by
    '/'."""
    try:
        for part in value.split("/"):
            name_of_dataset(part)
    except ValueError as e:
        raise ValueError(f"{e}, in each of the parts joined by '/'") from None
    if len(value.encode()) > MOST_NAMES_BYTES:
        raise ValueError(f"longer than {MOST_NAMES_BYTES} bytes: shorten it")
    return value


# Names for what a job makes. Keys that refer to something that exists take paths too.
DatasetName = Annotated[str, AfterValidator(name_of_dataset)]
RunName = Annotated[str, AfterValidator(name_of_run)]


def load(cls: type[C], given: Sequence[str] = (), say: Callable[[str], None] = lambda _: None) -> C:
    """Makes a `cls` from `[config.yaml ...] [key=value ...]`; later ones override earlier ones.
    `arguments.read` describes how each one is read, and which keys `say` gets a line about.

    Raises:
        ConfigError: there are problems; the message has each on its own line.
    """
    return from_dict(cls, arguments.read(cls, given, say))


def from_dict(cls: type[C], tree: Mapping[str, Any]) -> C:
    """Makes a `cls` from a plain tree, and fills in the defaults that follow from its keys.

    These defaults come from two places: a class may have `presets`, one of which its key `preset`
    names, and a class method `beneath(tree)`, which returns defaults that follow from other keys.

    Raises:
        ConfigError: there are problems; the message has each on its own line.
    """
    made, problems = _checked(cls, tree)
    if made is not None and not problems:
        problems = find_problems(made)
    if problems:
        head = "" if len(problems) == 1 else f"{len(problems):,} problems in the config:\n  "
        raise ConfigError(head + named(problems, between="\n  "))
    assert made is not None
    return made


def problems_of_types(cls: type, tree: Mapping[str, Any]) -> list[str]:
    """What is wrong with single values of a plain tree for a `cls`: unknown keys, wrong types. What
    is wrong with several together is not looked at."""
    return _checked(cls, tree)[1]


def _checked(cls: type[C], tree: Mapping[str, Any]) -> tuple[C | None, list[str]]:
    """The `cls` that a plain tree makes, and the problems of its single values."""
    problems = [f"{key}: {SECRET_IN_ADDRESS}" for key, text in _texts(tree) if has_secret(text)]
    problems = problems or [
        f"{key}={line(text)}: {NO_TEXT}" for key, text in _texts(tree) if not _is_text(text)
    ]
    if problems:  # stop here: another message might quote the secret
        return None, problems
    expanded = _expand(cls, dict(tree), "", problems)
    try:
        return TypeAdapter(cls).validate_python(expanded), problems
    except ValidationError as e:
        # A key that may have one of several types gives an error for each of them.
        said: dict[str, list[str]] = {}
        for error in e.errors():
            what, _, why = _describe(cls, dict(error)).partition(": ")
            said.setdefault(what, []).append(why)
        problems += [f"{what}: {' or '.join(whys)}" for what, whys in said.items()]
        return None, problems


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The texts in a tree, each with its key. A name in a dict is a text of the dict's own key."""
    if isinstance(tree, str):
        yield key, tree
    parts: Any = tree.items() if isinstance(tree, Mapping) else ()
    if isinstance(tree, list | tuple):
        parts = enumerate(tree)
    for name, value in parts:
        if isinstance(name, str) and (has_secret(name) or not _is_text(name)):
            yield key or "a key", name
        else:
            yield from _texts(value, f"{key}.{name}".lstrip("."))


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: no byte of an argument was anything else."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_problems(made: Any, prefix: str = "") -> list[str]:
    """The `problems()` of a config and of the configs in it; keys have their full path."""
    found = [prefix + text for text in getattr(made, "problems", list)()]
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if dataclasses.is_dataclass(value):
            found += find_problems(value, f"{prefix}{field.name}.")
    return found


def to_dict(made: Any) -> dict[str, Any]:
    """Converts a config to plain values (tuples to lists), which `from_dict` reads back equal."""
    return TypeAdapter(type(made)).dump_python(made, mode="json")


def to_yaml(made: Any) -> str:
    """Writes a config, or a plain tree, as YAML that `load` reads."""
    return arguments.to_yaml(to_dict(made) if dataclasses.is_dataclass(made) else made)


def differences(made: Any) -> dict[str, Any]:
    """The values of a config that differ from its defaults, as a tree; `from_dict` makes an equal
    config from it."""

    def differing(cls: type, tree: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
        groups = groups_of(cls)
        found: dict[str, Any] = {}
        for key, value in tree.items():
            if key in groups:
                value = differing(groups[key], value, default[key])
                if value:
                    found[key] = value
            elif value != default.get(key):
                found[key] = value
        return found

    cls, tree = type(made), to_dict(made)
    named = _presets_of(cls, tree)
    default = to_dict(TypeAdapter(cls).validate_python(_expand(cls, copy.deepcopy(named), "", [])))
    return merged(differing(cls, named, to_dict(cls())), differing(cls, tree, default))


def _presets_of(cls: type, tree: dict[str, Any]) -> dict[str, Any]:
    """The part of a tree from which defaults follow: the keys that a class lists in `sources`."""
    found = {key: tree[key] for key in getattr(cls, "sources", ())}
    for key, group in groups_of(cls).items():
        found[key] = _presets_of(group, tree[key])
    return found


def merged(a: Any, b: Any) -> Any:
    """Merges `b` over `a`: key by key if both are dicts, else returns `b`."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return b
    return a | {key: merged(a[key], value) if key in a else value for key, value in b.items()}


def help_text(cls: type) -> str:
    """Every key with its type, default and meaning, one paragraph each."""
    lines = []
    for key, kind, default, description in _fields(cls, ""):
        lines.append(f"  {key}: {kind} = {default}")
        lines += [f"      {line.strip()}" for line in description.splitlines() if line.strip()]
    return "\n".join(lines)


def _fields(cls: type, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    described = cls.__pydantic_fields__  # type: ignore[attr-defined]
    for name, hint in typing.get_type_hints(cls).items():
        if name not in described:
            continue
        default = described[name].get_default(call_default_factory=True)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _fields(hint, f"{prefix}{name}.")
        else:
            yield (
                prefix + name.rstrip("_"),
                _type_name(hint),
                _plain(default),
                _description(cls, name),
            )


def _description(cls: type, name: str) -> str:
    """A key's docstring, also from base classes: pydantic reads only those in the class itself."""
    for base in cls.__mro__:
        field = vars(base).get("__pydantic_fields__", {}).get(name)
        if field is not None and field.description:
            return field.description
    return ""


def _plain(value: Any) -> str:
    value = TypeAdapter(Any).dump_python(value, mode="json")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_type_name(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) in (tuple, list):
        return "[" + ", ".join(_type_name(a) for a in typing.get_args(hint) if a is not ...) + "]"
    if typing.get_origin(hint) is dict:
        key, value = map(_type_name, typing.get_args(hint))
        return f"{{{key}: {value}}}"
    return {type(None): "null"}.get(hint, getattr(hint, "__name__", str(hint)))


def _expand(cls: type, tree: dict[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    """Fills in the defaults that follow from the keys of `tree`, here and in every group."""
    # A key that is a Python keyword, such as `from`, is a field with a trailing underscore.
    own = {field.name for field in dataclasses.fields(cls)}
    tree = {key if key in own or f"{key}_" not in own else f"{key}_": tree[key] for key in tree}
    presets: Mapping[str, dict[str, Any]] = getattr(cls, "presets", {})
    name, below = tree.get("preset"), {}
    if isinstance(name, str) and name in presets:
        below = presets[name]
    elif name is not None and presets:
        problems.append(f"{prefix}preset={name}: unknown preset{_nearest(str(name), presets)}")
    if hasattr(cls, "beneath"):
        below = merged(below, cls.beneath(tree))
    tree = merged(below, tree)
    for key, group in groups_of(cls).items():
        if isinstance(tree.get(key), dict):
            tree[key] = _expand(group, tree[key], f"{prefix}{key}.", problems)
    return tree


# Words for what pydantic calls by the names of Python's types.
PLAIN = {
    "tuple_type": "should be a list, as [1, 2]",
    "dataclass_type": "should be a group of keys: give them one by one, as group.key=value",
}


def _describe(cls: type, error: dict[str, Any]) -> str:
    path = [str(part).rstrip("_") for part in error["loc"]]
    if error["type"] == "unexpected_keyword_argument":
        owner = cls
        for part in path[:-1]:
            owner = typing.get_type_hints(owner)[part]
        own = [f.name for f in dataclasses.fields(owner)]
        prefix = "".join(f"{part}." for part in path[:-1])
        same = [key for key, *_ in _fields(cls, "") if key.rpartition(".")[2] == path[-1]]
        near = f"; did you mean {' or '.join(same)}?" if same else _nearest(path[-1], own, prefix)
        return f"{'.'.join(path)}: unknown key{near or _elsewhere(cls, path[-1])}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    message = PLAIN.get(error["type"], message)
    known = {key: kind for key, kind, *_ in _fields(cls, "")}
    if path[-1] == "[key]":
        return f"{'.'.join(path[:-2])}: its key {error['input']} {message}"
    # For a union, pydantic appends the branch that it tried, but a person needs the key alone. What
    # follows a dict stays: these are the dict's own keys.
    while len(path) > 1 and ".".join(path) not in known and not _has_dict(known, path):
        path.pop()
    return f"{'.'.join(path)}={error['input']!r}: {message}"


def _has_dict(kinds: Mapping[str, str], path: Sequence[str]) -> bool:
    """Whether a path leads into the value of a key that is a dict."""
    return any(kinds.get(".".join(path[:n]), "").startswith("{") for n in range(1, len(path)))


def _nearest(name: str, valid: Any, prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return "" if prefix or len(valid) > 12 else f"; valid: {', '.join(valid)}"


def _elsewhere(cls: type, name: str) -> str:
    """Suggests the key of that name, or a similar one, in another group: optimizer.lr for `lr`."""
    leaves = {key.rpartition(".")[2]: key for key, *_ in _fields(cls, "")}
    near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.6)
    return f"; did you mean {leaves[near[0]]}?" if near else "; see --help for all keys"
