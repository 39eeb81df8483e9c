"""What a sweep is, as its journal keeps it, and whether a config continues it."""

from typing import Any

from manta import config as configs
from manta.errors import SweepError
from manta.foreign import line
from manta.sweep.journal import REMEDY, Identity
from manta.sweep.settings import FREE, SweepConfig
from manta.sweep.space import parse, shown

HOW = ("max_concurrent", "retry_failed")  # keys of `sweep` that decide nothing
GROWS = ("trials", "repeats", "contenders")


def identity(c: SweepConfig) -> Identity:
    """What decides the trials of a sweep: its space and search, and what all trials share."""
    search = configs.to_dict(c.sweep)
    for key in HOW:
        del search[key]
    space = {d.key: d.spec() for d in c.dimensions}
    search |= {"space": space, "lr": None, "tokens_per_batch": None}
    shared = dict(_leaves(configs.differences(c)))
    kept = {k: v for k, v in shared.items() if not _is_under(k, (*FREE, "sweep", "total_tokens"))}
    return Identity(search, {**kept, "total_tokens": c.total_tokens})


def config_of(c: SweepConfig, had: Identity) -> SweepConfig:
    """The config of a sweep as it was when its journal had this identity, which `c` extends."""
    search = {**had.sweep, **{key: getattr(c.sweep, key) for key in HOW}}
    return configs.from_dict(SweepConfig, {**configs.to_dict(c), "sweep": search})


def extends(c: SweepConfig, had: Identity, journal: str) -> bool:
    """Whether a config has more values or trials than the sweep of a journal.

    Raises:
        SweepError: it has other ones, and the message says which and how to go on; or the journal
            is damaged.
    """
    now = identity(c)
    if now == had:
        return False
    if had.sweep.keys() != now.sweep.keys() or not isinstance(had.sweep["space"], dict):
        raise SweepError(f"{journal}: what the sweep varies is damaged in it; {REMEDY}")
    found = _differences(now.shared, had.shared)
    found += _space_differences(had.sweep["space"], now.sweep["space"])
    old, new = ({k: v for k, v in i.sweep.items() if k != "space"} for i in (had, now))
    if old["repeats"] == 1:  # so far nobody had repeats, and it said nothing who would
        del old["repeat"], new["repeat"]
    for key in GROWS:
        if _has_grown(old[key], new[key]):
            del old[key], new[key]
    found += _differences(_named(new), _named(old))
    found = found or _cannot_grow(had, now)
    if found:
        raise SweepError(
            f"{journal} is of another sweep: {'; '.join(found)}. To extend that sweep, keep all of "
            "its values and add to them; to try something else, give another name="
        )
    return True


def _cannot_grow(had: Identity, now: Identity) -> list[str]:
    """Why a sweep cannot have more than it had."""
    new, scheduler = now.sweep, now.sweep["scheduler"]
    if new["replay"] or scheduler == "pbt":
        what = "replay" if new["replay"] else f"scheduler={scheduler}"
        return [f"a sweep with {what} cannot get more values"]
    is_ranked = scheduler == "asha" and new["repeat"] == "all"
    if is_ranked and new["repeats"] != had.sweep["repeats"]:
        return ["scheduler=asha ranks by the mean of all seeds, and cannot get more of them"]
    return []


def _has_grown(before: Any, after: Any) -> bool:
    return type(before) is type(after) is int and before <= after


def _named(search: dict[str, Any]) -> dict[str, Any]:
    return {f"sweep.{key}": value for key, value in search.items()}


def _space_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        if key not in new:
            found.append(f"it also varies {line(key)}={_short(old[key])}")
        elif key not in old:
            found.append(f"it does not vary {key}")
        else:
            found += [f"{key}: {text}" for text in _lost(key, old[key], new[key])]
    return found


def _lost(key: str, old: Any, new: Any) -> list[str]:
    """What a key could be and now cannot."""
    try:
        return parse(key, new).lacks(parse(key, old))
    except ValueError:
        return [f"it was {_short(old)}, which is damaged"]


def _differences(now: dict[str, Any], had: dict[str, Any]) -> list[str]:
    found = []
    for key in dict.fromkeys([*had, *now]):
        before, after = had.get(key), now.get(key)
        if before != after:
            texts = [_short(v) if v is not None else "the default" for v in (before, after)]
            more = "; more is possible" if key.removeprefix("sweep.") in GROWS else ""
            found.append(f"{line(key)} was {texts[0]}, and now is {texts[1]}{more}")
    return found


def _short(value: Any) -> str:
    return line(shown(value))


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _is_under(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)
