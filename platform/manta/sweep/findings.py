"""What a sweep found, in sentences: which settings are better and how sure that is, whether the
best value lies at the edge of those tried, where the best rate lies, and which keys matter."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from manta import statistics
from manta.charts import view
from manta.sweep import compared, extending
from manta.sweep.compared import Difference, Group
from manta.sweep.importance import Importances, importances
from manta.sweep.naming import among, versus, words
from manta.sweep.optimum import FEWEST, Optimum, fit
from manta.sweep.plan import Plan
from manta.sweep.space import LR, Settings
from manta.terminal import named

MOST_NAMED = 4  # settings that get a sentence of their own
MOST_SEEDS = 50  # more of them are no advice


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence, with the figures that it says."""

    kind: str
    """best, difference, seeds, edge, optimum, importance, failed, scheduler."""
    sentence: str
    command: str | None = None
    """What to run to know more."""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tree(self) -> dict[str, Any]:
        """The finding for JSON, in which no figure is infinite."""
        figures = {k: None if _is_no_number(v) else v for k, v in self.figures.items()}
        found = {"kind": self.kind, "sentence": self.sentence, "command": self.command}
        return found | ({"figures": figures} if figures else {})


def findings(plan: Plan) -> list[Finding]:
    """What a sweep found that is over; [] if no trial ended well."""
    ranked = compared.groups(plan)
    winner = plan.winner()
    best = next((g for g in ranked if winner and g.name == winner.trial.group), None)
    if best is None:
        return []
    found = [_best(best)]
    found += _differences(plan, ranked, best)
    found += _edges(plan, ranked, best)
    found += _optima(plan)
    found += _importance(plan)
    return found + _failed(ranked)


def _best(best: Group) -> Finding:
    loss, tokens = best.loss, best.tokens
    name = words(best.settings) or best.name
    text = f"best: {name}, val loss {loss.value:.4f}{_seeds(best, tokens)}"
    figures = {
        "settings": best.settings,
        "tokens": tokens,
        "val_loss": loss.value,
        "standard_error": loss.error,
        "seeds": loss.count,
    }
    return Finding("best", f"{text} after {tokens:,} tokens", None, figures)


def _seeds(group: Group, tokens: int) -> str:
    values = group.losses(tokens)
    if len(values) < 2:
        return " (one seed)"
    return f" ± {statistics.mean(values).error:.4f} ({len(values)} seeds)"


def _differences(plan: Plan, ranked: list[Group], best: Group) -> list[Finding]:
    """The best settings against the others that were trained as far."""
    c, tokens = plan.c, best.tokens
    others = [g for g in ranked if g is not best and not g.why and g.tokens == tokens]
    if c.sweep.scheduler == "pbt":
        text = (
            "pbt copies weights from trial to trial, so its trials are not independent and no test "
            "between them holds; a replay with other seeds shows what the schedule is worth"
        )
        return [Finding("scheduler", text)]
    if not others:
        return _paused(plan, ranked, best)
    is_chosen = c.sweep.repeat == "contenders"
    kept = [g for g in others if not is_chosen or g.fresh(tokens)]
    samples = [g.fresh(tokens) if is_chosen else g.losses(tokens) for g in (best, *kept)]
    if not kept or not samples[0] or max(map(len, samples)) < 2:
        return [_one_seed(plan, others[0], best, is_chosen)]
    differences = compared.against_best(samples, 0)[1:]
    pairs = [(g, d) for g, d in zip(kept, differences, strict=True) if d is not None]
    shown = sorted([p for p in pairs if p[1].is_shown], key=lambda p: p[1].value)
    unclear = sorted([p for p in pairs if not p[1].is_shown], key=lambda p: p[1].value)
    counts = len(samples[0]), dict(zip([g.name for g in kept], map(len, samples[1:]), strict=True))
    most = MOST_NAMED + (len(shown) == MOST_NAMED + 1)
    found = [_shown(best, g, d, (counts[0], counts[1][g.name]), is_chosen) for g, d in shown[:most]]
    if left := shown[most:]:
        p = max(d.p for _, d in left)
        found.append(
            Finding(
                "difference",
                f"it beats {len(left)} others by {left[0][1].value:.3f} or more (p {_p(p)})",
            )
        )
    for g, d in unclear[:MOST_NAMED]:
        is_asked = any(f.command for f in found)  # one command is enough, the first
        found.append(_unclear(None if is_asked else plan, best, g, d))
    if len(unclear) > MOST_NAMED:
        rest = [words(g.settings) for g, _ in unclear[MOST_NAMED:]]
        found.append(Finding("difference", f"nor from {named(rest)}"))
    if len(kept) < len(others):
        count = len(others) - len(kept)
        text = f"{count} other settings have one seed each, and no test says anything of them"
        found.append(Finding("seeds", text))
    return found


def _paused(plan: Plan, ranked: list[Group], best: Group) -> list[Finding]:
    """Nothing to compare the best with."""
    if not any(0 < g.tokens < best.tokens and not g.why for g in ranked):
        return []
    text = "the others were paused with fewer tokens, so none is compared with the best"
    is_new = plan.c.sweep.repeats == 1  # else more seeds would be paused as well
    command = extending.with_seeds(plan.c, extending.SEEDS) if is_new else None
    return [Finding("seeds", text, command)]


def _one_seed(plan: Plan, second: Group, best: Group, is_chosen: bool) -> Finding:
    by = second.loss.value - best.loss.value
    fresh = " besides the one that chose the settings" if is_chosen else ""
    text = (
        f"nothing can be told from one seed{fresh}: the second best lies {by:.4f} behind "
        f"({versus(best.settings, second.settings)}), and how much seeds differ is not known"
    )
    asked = plan.c.sweep.repeats + 1 if is_chosen else extending.SEEDS
    command = extending.with_seeds(plan.c, asked)
    return Finding("seeds", text, command, {"difference": by})


def _shown(
    best: Group, other: Group, d: Difference, counts: tuple[int, int], is_chosen: bool
) -> Finding:
    a, b, at = among(best.settings, other.settings)
    fresh = "fresh " if is_chosen else ""
    if counts[0] == counts[1]:
        seeds = f"{counts[0]} {fresh}seed{'s' if counts[0] > 1 else ''} each"
    else:
        seeds = f"{counts[0]} and {counts[1]} {fresh}seeds"
    text = f"{a} beats {b}{at} by {d.value:.3f} ± {d.error:.3f} ({seeds}, p {_p(d.p)})"
    return Finding("difference", text, None, _figures(other, d))


def _unclear(plan: Plan | None, best: Group, other: Group, d: Difference) -> Finding:
    """Settings that may be as good as the best; with a command if there is a plan."""
    a, b, at = among(best.settings, other.settings)
    text = f"cannot tell {a} from {b}{at} ({d.value:+.4f} ± {d.error:.4f}, p {_p(d.p)}): "
    if d.value < 0:
        text += "the fresh seeds put the other one ahead"
        return Finding("difference", text, None, _figures(other, d))
    if d.more is None or d.more > MOST_SEEDS:
        text += f"more than {MOST_SEEDS} more seeds would; they may as well be equal"
        return Finding("difference", text, None, _figures(other, d))
    text += f"about {d.more} more seed{'s' if d.more > 1 else ''} would"
    command = extending.with_seeds(plan.c, plan.c.sweep.repeats + d.more) if plan else None
    return Finding("difference", text, command, _figures(other, d))


def _figures(other: Group, d: Difference) -> dict[str, Any]:
    return {
        "against": other.settings,
        "difference": d.value,
        "standard_error": d.error,
        "p": d.p,
        "more_seeds": d.more,
    }


def _p(p: float) -> str:
    """A p-value with its sign."""
    if p < 0.001:
        return "< 0.001"
    return f"= {p:.2g}" if p < 0.995 else "= 1"


def _edges(plan: Plan, ranked: list[Group], best: Group) -> list[Finding]:
    """The keys whose best value is the lowest or highest of those tried."""
    found = []
    for d in plan.c.dimensions:
        if d.key == "seed":
            continue
        edge = extending.edge(d, best.settings.get(d.key), [g.settings.get(d.key) for g in ranked])
        if edge is None or (further := extending.beyond(plan.c, d, edge)) is None:
            continue
        name, value = words({d.key: best.settings[d.key]}), best.settings[d.key]
        side = "lowest" if edge.is_low else "highest"
        text = f"the best is at the edge: {name} is the {side} tried; {further.words}"
        figures = {"key": d.key, "value": value, "next": further.next}
        found.append(Finding("edge", text, further.command, figures))
    return found


def optima(plan: Plan) -> list[tuple[Settings, int, Optimum | str]]:
    """The fitted rate for each of the other keys' settings that ended well, the best settings
    first, each with the tokens of its losses: the most at which it can be fitted."""
    keys = {d.key for d in plan.c.dimensions}
    if LR not in keys or plan.c.sweep.scheduler == "pbt" or plan.c.sweep.replay:
        return []
    lines: dict[str, list[Group]] = {}
    for group in compared.groups(plan):
        lines.setdefault(repr(_without_rate(group.settings)), []).append(group)
    found = []
    for line in lines.values():
        levels = sorted({t for g in line for s in g.standings for t in s.losses}, reverse=True)
        made: Optimum | str | None = None
        for tokens in levels:
            made = fit({g.settings[LR]: g.losses(tokens) for g in line if not g.why})
            if isinstance(made, Optimum):
                break
        if made is not None:
            at = tokens if isinstance(made, Optimum) else plan.c.total_tokens
            found.append((_without_rate(line[0].settings), at, made))
    return found


def _without_rate(settings: Settings) -> Settings:
    return {k: v for k, v in settings.items() if k != LR}


def _optima(plan: Plan) -> list[Finding]:
    """The fitted rates, those of the best settings first."""
    every = optima(plan)
    made = [each for each in every if isinstance(each[2], Optimum)]
    if not made and len(every) > MOST_NAMED:
        text = f"no optimal lr can be fitted: each needs {FEWEST} values with the other keys alike"
        return [Finding("optimum", text)]
    shown = every if len(every) <= MOST_NAMED else made
    found = [_optimum(plan, *each) for each in shown[:MOST_NAMED]]
    if (left := len(shown) - MOST_NAMED) > 0:
        found.append(Finding("optimum", f"(and {left} more fitted optima, at other settings)"))
    return found


def _optimum(plan: Plan, fixed: Settings, tokens: int, made: Optimum | str) -> Finding:
    at = f" at {words(fixed)}" if fixed else ""
    if tokens != plan.c.total_tokens:
        at += f" after {tokens:,} tokens"
    if isinstance(made, str):
        return Finding("optimum", f"no optimal lr can be fitted{at}: {made}", None, {"at": fixed})
    text = f"fitted optimum{at}: lr {made.rate:.3g}"
    if math.isnan(made.low):
        text += " (its error is not known: one seed each)"
    elif math.isinf(made.high):
        text += " (its interval has no end: the parabola may as well be flat)"
    else:
        text += f" ({made.low:.3g} to {made.high:.3g} at 95%)"
    text += f", with a loss of {made.loss:.4f}, by a parabola through {len(made.rates)} values"
    figures = {
        "at": fixed, "lr": made.rate, "low": made.low, "high": made.high, "val_loss": made.loss,
        "through": list(made.rates),
    }  # fmt: skip
    return Finding("optimum", text, None, figures)


def widest(plan: Plan) -> int:
    """The tokens at which most trials have a loss; of equal ones, the most. 0: none has."""
    counts: dict[int, int] = {}
    for tokens in (t for s in plan.standings() if not s.why for t in s.losses):
        counts[tokens] = counts.get(tokens, 0) + 1
    return max(counts, key=lambda t: (counts[t], t), default=0)


def shares(plan: Plan) -> Importances | str:
    """The importances of the keys, where most trials have a loss. Losses far above the others count
    as the highest of these: how far they are off says nothing."""
    tokens, standings = widest(plan), [s for s in plan.standings() if not s.why]
    trials = [(s.trial.settings, s.losses[tokens]) for s in standings if tokens in s.losses]
    top = view([loss for _, loss in trials])[1] if trials else math.inf
    return importances([(settings, min(loss, top)) for settings, loss in trials])


def _importance(plan: Plan) -> list[Finding]:
    if len(plan.c.dimensions) < 2 or plan.c.sweep.replay or plan.c.sweep.scheduler == "pbt":
        return []
    made, tokens = shares(plan), widest(plan)
    if isinstance(made, str):
        return [Finding("importance", f"how much each key matters is not known: {made}")]
    ordered = sorted(made.shares.items(), key=lambda item: -item[1])
    parts = [f"{words({key: None})} {share:.0%}" for key, share in ordered]
    rest = max(0.0, 1 - math.fsum(made.shares.values()))
    text = f"of the differences between trials at {tokens:,} tokens, " + ", ".join(parts)
    text += f" (the rest, {rest:.0%}: keys together, and seeds)"
    if made.trials < made.enough:
        text += f"; a rough guide: of {made.trials} trials, where it takes {made.enough}"
    figures = {"shares": made.shares, "trials": made.trials, "enough": made.enough}
    return [Finding("importance", text, None, figures | {"tokens": tokens})]


def _failed(ranked: Sequence[Group]) -> list[Finding]:
    bad = [s for g in ranked for s in g.standings if s.why]
    if not bad:
        return []
    diverged = sum(s.diverged for s in bad)
    text = f"{len(bad)} trial{'s' if len(bad) > 1 else ''} failed"
    if diverged == len(bad):
        text = f"{len(bad)} trial{'s' if len(bad) > 1 else ''} diverged"
    elif diverged:
        text += f", of which {diverged} diverged"
    names = named([f"{words(s.trial.settings)} ({s.why})" for s in bad], MOST_NAMED)
    return [Finding("failed", f"{text}: {names}")]


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
