"""What a sweep does next: which trial trains how far, decided from the results so far.

Trials of different lengths end in another order on every machine, and after a kill. To decide the
same each time, the plan has lanes of its own, in which a trial takes as long as it has FLOPs. It
takes results in the order in which these lanes would give them, and keeps those that come earlier.
So a journal is the same for a sweep that was killed, wherever, and for one that was not.
"""

import dataclasses
import heapq
import math
from collections import deque
from typing import Any

from manta import config as configs
from manta.errors import SweepError
from manta.sweep import identity
from manta.sweep.journal import REMEDY, Identity, Notes, Record, What
from manta.sweep.schedulers import Group, Segment, replay_of, scheduler
from manta.sweep.search import Search, Tried
from manta.sweep.settings import SweepConfig, Trial
from manta.sweep.space import Settings
from manta.train.settings import PretrainConfig

__all__ = ["Plan", "Result", "Segment", "Standing"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a segment."""

    trial: str
    tokens: int
    """The `until` of the segment."""
    loss: float | None
    """Val loss at the segment's end; None, or no finite number: the trial failed or diverged."""
    why: str | None = None
    """Why the trial failed or diverged, in one line; the same line each time, so without times and
    numbers of processes."""
    diverged: bool = False
    """Whether it would end like this each time, so that there is no use in trying again."""


@dataclasses.dataclass(frozen=True)
class Standing:
    """The place that a trial has come to."""

    trial: Trial
    losses: dict[int, float]
    """Val loss by tokens, at the ends of its segments; without those of a failure."""
    why: str | None
    """Why it failed or diverged; None if it did not."""
    diverged: bool
    """Whether it would fail again."""
    is_complete: bool
    """Whether it was trained to total_tokens."""
    source: str | None = None
    """The run from which it was copied (pbt)."""

    @property
    def tokens(self) -> int:
        """Tokens to which it was trained; 0: its first result is not there yet."""
        return max(self.losses, default=0)

    @property
    def loss(self) -> float:
        """The newest val loss; infinite if it failed, or has none yet."""
        return math.inf if self.why or not self.losses else self.losses[self.tokens]

    @property
    def rank(self) -> tuple[bool, int, float]:
        """What trials are ranked by: failed ones last, else the longest trained first, as losses
        compare at equal tokens only."""
        return (bool(self.why), -self.tokens, self.loss)


class Plan:
    """The plan of a sweep. `ready` has what to train now; `tell` takes what came of it.

    Args:
        c: the sweep. It may have more values than the journal's: then it extends that sweep.
        journal: what was decided before; the plan goes on from there, and adds to it.
        lanes: trials that train at once, in the plan's own order. A journal keeps the number that
            it was begun with. Fewer or more lanes may do the work; the decisions are the same.

    Raises:
        SweepError: the journal is of a sweep that this config does not continue, or is damaged.
    """

    def __init__(self, c: SweepConfig, journal: Notes, lanes: int):
        self.journal = journal
        self._expected = deque(journal.records)
        self._recorded = len(journal.records)
        plans = [r.plan for r in journal.records if r.plan is not None]
        head = journal.records[0] if journal.records else None
        if head is not None and (head.what != "sweep" or not head.lanes or not head.plan):
            raise SweepError(f"{journal.path}, line 1: no beginning of a sweep; {REMEDY}")
        is_more = [identity.extends(c, plan, journal.path) for plan in plans][-1:] == [True]
        self.c = identity.config_of(c, plans[0]) if plans else c
        self.lanes = head.lanes if head and head.lanes else lanes
        self.is_over = False
        self.segments: list[Segment] = []
        """Every segment so far, in the order of their starts."""
        self._search, self._scheduler = Search(self.c), scheduler(self.c)
        self._trials: dict[str, Trial] = {}
        self._results: dict[str, list[Result]] = {}
        self._told: dict[tuple[str, int], Result] = {}
        self._open: dict[tuple[str, int], Segment] = {}  # those that are ready
        self._waiting: deque[Segment] = deque()
        self._running: list[tuple[float, int, Segment]] = []
        self._now = 0.0
        self._write(Record("sweep", plan=identity.identity(self.c), lanes=self.lanes))
        self._advance()
        if is_more:
            self._extend(identity.identity(c))
        # Keys that do not count may be others now.
        self.c = self._search.c = self._scheduler.c = c
        if c.sweep.retry_failed:
            for name in self._failed():
                self._retry(name)

    @property
    def passed_over(self) -> dict[str, str]:
        """The trials that no run can be, by name, each with the reason."""
        return self._search.passed_over

    def ready(self) -> list[Segment]:
        """The segments to train now, in the order in which free lanes should take them; there may
        be more of them than lanes. Empty if the sweep is over."""
        return list(self._open.values())

    def tell(self, result: Result) -> None:
        """Takes the result of a segment that was `ready`; each only once, in any order."""
        loss = result.loss
        if loss is None or not math.isfinite(loss):
            why = result.why or "its loss is not a finite number"
            diverged = result.diverged or loss is not None
            result = dataclasses.replace(result, loss=None, why=why, diverged=diverged)
        key = (result.trial, result.tokens)
        assert key in self._open, f"{key} is not ready"
        self._take(result)
        self._advance()

    def config_of(self, segment: Segment) -> PretrainConfig:
        """The training run of a segment, with the settings that it has from there on, of the
        sweep's whole length."""
        return self.c.config_of(self.trial(segment.trial), dict(segment.settings))

    def trial(self, name: str) -> Trial:
        return self._trials[name]

    def states(self) -> dict[str, str]:
        """What has become of every trial that has begun: failed, complete, or waiting."""
        return {
            s.trial.name: "failed" if s.why else "complete" if s.is_complete else "waiting"
            for s in self.standings()
        }

    def standings(self) -> list[Standing]:
        """Every trial that has begun, the best first."""
        found = []
        sources = {s.trial: s.source for s in self.segments if s.source}
        for name, trial in self._trials.items():
            results = self._results.get(name, [])
            losses = {r.tokens: r.loss for r in results if r.loss is not None}
            failure = next((r for r in results if r.loss is None), None)
            why, diverged = (failure.why, failure.diverged) if failure else (None, False)
            is_complete = self.c.total_tokens in losses
            found.append(Standing(trial, losses, why, diverged, is_complete, sources.get(name)))
        return sorted(found, key=lambda standing: standing.rank)

    def winner(self) -> Standing | None:
        """The best run of the best settings; None if no trial ended well.

        Settings are ranked by the mean over their seeds, so that no lucky seed decides. Where only
        contenders have repeats, the winner is one of them, as others are known less well.
        """
        groups: dict[str, list[Standing]] = {}
        for standing in self.standings():
            groups.setdefault(standing.trial.group, []).append(standing)

        def rank(group: list[Standing]) -> tuple[bool, int, int, float]:
            is_bad, tokens = any(s.why for s in group), min(s.tokens for s in group)
            return is_bad, -tokens, -len(group), math.fsum(s.loss for s in group) / len(group)

        found = min(groups.values(), key=rank, default=[])
        best = min(found, key=lambda standing: standing.rank, default=None)
        return None if best is None or best.why or not best.losses else best

    def replay(self, trial: str) -> dict[int, Settings]:
        """The settings along the way to a trial's end, by the tokens from which they are used: a
        value for `sweep.replay`."""
        return replay_of(self.segments, trial)

    def replay_config(self, trial: str) -> dict[str, Any]:
        """The tree of a config for jobs/sweep.py that trains `replay` as one run."""
        tree = configs.differences(self.c)
        tree |= {"name": f"{self.c.name}-replay", "total_tokens": self.c.total_tokens}
        return tree | {"sweep": {"replay": self.replay(trial)}}

    def _advance(self) -> None:
        """Goes on until a result is missing that is not known yet."""
        while True:
            self._fill()
            if self._running and _key(self._running[0][2]) in self._told:
                self._finish()
                continue
            if not self._running and not self.is_over:
                self.is_over = True
                self._write(Record("end"))
            if not self._expected:
                return
            self._follow(self._expected[0])

    def _follow(self, record: Record) -> None:
        """Takes the journal's next record, which says what nobody can decide: a result, or that the
        sweep was extended."""
        if record.what == "result" and (record.trial, record.tokens) in self._open:
            assert record.trial is not None and record.tokens is not None
            diverged = bool(record.diverged)
            result = Result(record.trial, record.tokens, record.loss, record.why, diverged)
            self._take(result)
        elif record.what == "extend" and record.plan is not None:
            self._extend(record.plan)
        elif record.what == "retry" and record.trial in self._failed():
            self._retry(str(record.trial))
        else:
            self._refuse()

    def _extend(self, plan: Identity) -> None:
        self._write(Record("extend", plan=plan))
        before, self.c = self.c, identity.config_of(self.c, plan)
        self._search.extend(self.c)
        self._scheduler.c = self.c
        self.is_over = False
        if self.c.sweep.repeat == "all":
            for group in self._scheduler.groups.values():
                for number in range(before.sweep.repeats, self.c.sweep.repeats):
                    added = self._known(self.c.trial(group.trials[0].settings, number))
                    group.trials.append(added)
                    self._queue([self._whole(added)])
        self._advance()

    def _failed(self) -> list[str]:
        """The trials that failed and have not diverged."""
        return [s.trial.name for s in self.standings() if s.why and not s.diverged]

    def _retry(self, name: str) -> None:
        """Gives a failed trial to a lane again, from where it was."""
        self._write(Record("retry", trial=name))
        segment = next(s for s in reversed(self.segments) if s.trial == name)
        self._results[name].pop()
        self._scheduler.forget(self._trials[name], segment.until)
        self._queue([segment])
        self.is_over = False
        self._advance()

    def _fill(self) -> None:
        """Gives the plan's free lanes something to do."""
        while len(self._running) < self.lanes:
            if not self._waiting:
                self._queue(self._scheduler.choose(self._fresh, not self._running))
            if not self._waiting and not self._running:
                self._queue(self._contending())
            if not self._waiting:
                return
            self._begin(self._waiting.popleft())

    def _queue(self, segments: list[Segment]) -> None:
        """Has segments wait for lanes of the plan, while real ones may take them already."""
        self._waiting.extend(segments)
        self._open |= {_key(segment): segment for segment in segments}

    def _take(self, result: Result) -> None:
        """Keeps a result until its turn comes."""
        key = (result.trial, result.tokens)
        self._told[key] = result
        del self._open[key]

    def _fresh(self) -> Group | None:
        """The next settings that have not started."""
        trial = self._search.next(self._tried())
        if trial is None:
            return None
        seeds = self.c.sweep.repeats if self.c.sweep.repeat == "all" else 1
        trials = [trial, *(self.c.trial(trial.settings, number) for number in range(1, seeds))]
        return Group([self._known(trial) for trial in trials])

    def _tried(self) -> list[Tried]:
        if self.c.sweep.search != "optuna":
            return []
        groups = self._scheduler.groups.values()
        return [
            Tried(
                g.trials[0].settings,
                {tokens: g.loss(tokens) for tokens in g.losses if g.has(tokens)},
                g.has(self.c.total_tokens),
            )
            for g in groups
        ]

    def _contending(self) -> list[Segment]:
        """The repeats of the best settings, once all else is done, and the way to the end of those
        of them that are paused."""
        c = self.c.sweep
        if c.repeat == "all":
            return []
        found = []
        firsts = {group.trials[0].name for group in self._scheduler.groups.values()}
        best = [s for s in self.standings() if s.trial.name in firsts and not s.why]
        for standing in best[: c.contenders]:
            first = standing.trial
            if not standing.is_complete:
                start, until = standing.tokens, self.c.total_tokens
                found.append(Segment(first.name, start, until, first.settings, first.seed))
            for number in range(1, c.repeats):
                trial = self.c.trial(first.settings, number)
                if trial.name not in self._trials:
                    found.append(self._whole(self._known(trial)))
        return found

    def _whole(self, trial: Trial) -> Segment:
        return Segment(trial.name, 0, self.c.total_tokens, trial.settings, trial.seed)

    def _known(self, trial: Trial) -> Trial:
        return self._trials.setdefault(trial.name, trial)

    def _begin(self, segment: Segment) -> None:
        what: What = "copy" if segment.source else "continue" if segment.start else "start"
        fields = {**dataclasses.asdict(segment), "settings": dict(segment.settings)}
        self._write(Record(what, **fields))
        name, settings = segment.trial, dict(segment.settings)
        self._known(Trial(name, settings, segment.seed, name))
        cost = (segment.until - segment.start) * self.flops_per_token(name)
        entry = (self._now + cost, len(self.segments), segment)
        heapq.heappush(self._running, entry)
        self.segments.append(segment)

    def flops_per_token(self, name: str) -> float:
        """FLOPs of a trial for each token."""
        return self.c.flops_per_token(self._trials[name])

    def _finish(self) -> None:
        """Takes the result that is the next one in the plan's order."""
        self._now, _, segment = heapq.heappop(self._running)
        result = self._told.pop(_key(segment))
        fields = dataclasses.asdict(result)
        self._write(Record("result", **{**fields, "diverged": result.diverged or None}))
        self._results.setdefault(segment.trial, []).append(result)
        trial = self._trials[segment.trial]
        self._scheduler.told(trial, segment.until, math.inf if result.loss is None else result.loss)

    def _write(self, record: Record) -> None:
        """Writes a record, unless the journal has it already; there, it has to be the same."""
        if not self._expected:
            self.journal.append(record)
        elif self._expected.popleft() != record:
            self._refuse(-1)

    def _refuse(self, back: int = 0) -> None:
        line = self._recorded - len(self._expected) + 1 + back
        raise SweepError(
            f"{self.journal.path}, line {line}: this does not follow from the lines before it; "
            f"it was changed, or is of another version of Manta: {REMEDY}"
        )


def _key(segment: Segment) -> tuple[str, int]:
    return segment.trial, segment.until
