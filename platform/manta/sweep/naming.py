"""Settings in words, as findings, tables and pictures call them."""

from typing import Any

from manta.sweep.space import LR, Settings, shown


def called(key: str) -> str:
    """A key in words: lr for optimizer.lr, any other one in full."""
    return "lr" if key == LR else key


def number(value: Any) -> str:
    """A value in words: 4,096; 0.002; [1, 2]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return shown(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def many(count: int, what: str) -> str:
    """A number of things in words: 1 trial; 2 trials."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def words(settings: Settings) -> str:
    """Settings in words: lr 0.002, tokens_per_batch 4,096. Those with None have no value in them:
    lr."""
    parts = [called(k) + (f" {number(v)}" if v is not None else "") for k, v in settings.items()]
    return ", ".join(parts)


def among(a: Settings, b: Settings) -> tuple[str, str, str]:
    """Two settings in words, and what they share: lr 0.002; 0.001; at tokens_per_batch 4,096. If
    several keys differ, both have all that differ."""
    keys = [k for k in a if a.get(k) != b.get(k)]
    same = {k: v for k, v in a.items() if k not in keys}
    at = f" at {words(same)}" if same else ""
    first = words({k: a[k] for k in keys})
    if len(keys) == 1:
        return first, number(b.get(keys[0])), at
    return f"({first})", f"({words({k: b.get(k) for k in keys})})", at


def versus(a: Settings, b: Settings) -> str:
    """Two settings in a few words: lr 0.002 against 0.001 at tokens_per_batch 4,096."""
    first, second, at = among(a, b)
    return f"{first} against {second}{at}"
