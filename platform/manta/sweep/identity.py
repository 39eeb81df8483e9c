"""What a sweep is, as its journal keeps it, and whether a config continues it."""

from typing import Any

from manta import config as configs
from manta.errors import SweepError
from manta.sweep.settings import FREE, SweepConfig
from manta.sweep.space import parse, shown

GROWS = ("trials", "repeats", "contenders")


def identity(c: SweepConfig) -> dict[str, Any]:
    """What decides the trials of a sweep: its space and search, and what all trials share."""
    search = configs.to_dict(c.sweep)
    del search["max_concurrent"]
    space = {d.key: d.spec() for d in c.dimensions}
    search |= {"space": space, "lr": None, "tokens_per_batch": None}
    shared = dict(_leaves(configs.differences(c)))
    kept = {k: v for k, v in shared.items() if not _is_under(k, (*FREE, "sweep", "total_tokens"))}
    return {"sweep": search, "shared": {**kept, "total_tokens": c.total_tokens}}


def config_of(c: SweepConfig, plan: dict[str, Any]) -> SweepConfig:
    """The config of a sweep as it was when its journal had this plan."""
    tree = configs.to_dict(c)
    search = {**plan["sweep"], "max_concurrent": c.sweep.max_concurrent}
    return configs.from_dict(SweepConfig, {**tree, "sweep": search})


def check(c: SweepConfig, had: dict[str, Any], journal: str) -> bool:
    """Whether a config has more values than the plan of a journal.

    Raises:
        SweepError: it has other ones; the message says which, and how to go on.
    """
    now = identity(c)
    if now == had:
        return False
    found = _differences(now["shared"], had["shared"])
    old, new = dict(had["sweep"]), dict(now["sweep"])
    spaces = old.pop("space"), new.pop("space")
    found += _space_differences(*spaces)
    for key in GROWS:
        before, after = old.pop(key), new.pop(key)
        if (after or 0) < (before or 0):
            found.append(f"sweep.{key} was {before}, and now is {after}; more is possible")
    found += _differences({f"sweep.{k}": v for k, v in new.items()}, _prefixed(old))
    is_fixed = new["scheduler"] == "pbt" or new["replay"]
    has_seeds = new["scheduler"] == "asha" and new["repeat"] == "all"
    if not found and (is_fixed or (has_seeds and old_repeats(had) != old_repeats(now))):
        what = f"scheduler={new['scheduler']}" if not new["replay"] else "replay"
        found.append(f"a sweep with {what} cannot get more {'seeds' if has_seeds else 'values'}")
    if found:
        raise SweepError(
            f"{journal} is of another sweep: {'; '.join(found)}. To extend that sweep, keep all of "
            "its values and add to them; to try something else, give another name="
        )
    return True


def old_repeats(plan: dict[str, Any]) -> Any:
    return plan["sweep"]["repeats"]


def _prefixed(search: dict[str, Any]) -> dict[str, Any]:
    return {f"sweep.{key}": value for key, value in search.items()}


def _space_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        if key not in new:
            found.append(f"it also varies {key}={shown(old[key])}")
        elif key not in old:
            found.append(f"it does not vary {key}")
        else:
            lost = parse(key, new[key]).lacks(parse(key, old[key]))
            found += [f"{key}: {text}" for text in lost]
    return found


def _differences(now: dict[str, Any], had: dict[str, Any]) -> list[str]:
    found = []
    for key in dict.fromkeys([*had, *now]):
        before, after = had.get(key), now.get(key)
        if before != after:
            texts = [shown(v) if v is not None else "the default" for v in (before, after)]
            found.append(f"{key} was {texts[0]}, and now is {texts[1]}")
    return found


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
