"""The invariants, each as a function that yields a sentence for every place where a history breaks it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from calotype_server.generations.ids import tag_of
from support.history.facts import (
    CRASHED,
    REPLACEABLE,
    SUCCEEDED,
    Crashed,
    Dropped,
    Fact,
    Forgot,
    Left,
    Listed,
    Logged,
    Opened,
    Refused,
    Saw,
    SawEnd,
    Settled,
    Stopped,
    Stored,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.history.history import History

__all__ = ["CHECKS", "MAX_ATTEMPTS", "Violation", "violations"]

MAX_ATTEMPTS = 2
"""Times that the engine gets a job whose process ends each time."""

_ENDS = {"succeeded", "failed", "cancelled"}
_CANCELS = {"CANCELLED", "ABANDONED"}

F = TypeVar("F", bound=Fact)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise: the name of the invariant, and one sentence that says where."""

    invariant: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.sentence}"


class _View:
    """The facts of a history by kind, with their places in it."""

    def __init__(self, history: History) -> None:
        self.deterministic = history.deterministic
        self.facts = list(enumerate(history.facts))
        self.forgotten = {fact.replica for _, fact in self.of(Forgot)}

    def of(self, kind: type[F]) -> Iterator[tuple[int, F]]:
        """Yields the facts of a kind with their places."""
        return ((place, fact) for place, fact in self.facts if isinstance(fact, kind))

    def lost(self, generation: str) -> bool:
        """Whether the generation's server kept nothing and is gone."""
        return tag_of(generation) in self.forgotten

    def readers(self) -> Iterator[tuple[Opened, list[Fact]]]:
        """Yields each reader's opening with all that it saw."""
        seen: dict[int, list[Fact]] = defaultdict(list)
        for _, fact in self.facts:
            if isinstance(fact, Saw | SawEnd | Refused | Left):
                seen[fact.reader].append(fact)
        return ((opened, seen[opened.reader]) for _, opened in self.of(Opened))

    def ends(self) -> dict[str, list[tuple[int, Fact, str, str]]]:
        """Returns each end that was shown, by generation: place, fact, outcome and digest of the image."""
        ends: dict[str, list[tuple[int, Fact, str, str]]] = defaultdict(list)
        for place, fact in self.facts:
            match fact:
                case SawEnd():
                    ends[fact.generation].append((place, fact, fact.outcome, fact.image))
                case Stored(outcome=str()):
                    ends[fact.generation].append((place, fact, fact.outcome, fact.image))
                case Logged(event="generation ended"):
                    ends[fact.generation].append((place, fact, fact.outcome, ""))
        return ends


def _ends_once(view: _View) -> Iterator[str]:
    """An accepted generation ends, and a reader that stays receives exactly one end, last."""
    ended = set(view.ends()) | {fact.generation for _, fact in view.of(Listed) if fact.phase in _ENDS}
    accepted = {fact.generation for _, fact in view.of(Saw)} | {fact.generation for _, fact in view.of(Stored)}
    for generation in sorted(accepted - ended):
        if not view.lost(generation):
            yield f"{generation} was accepted and never ended"
    for opened, facts in view.readers():
        ends = [index for index, fact in enumerate(facts) if isinstance(fact, SawEnd)]
        if len(ends) > 1:
            yield f"reader {opened.reader} received {len(ends)} ends"
        if ends and any(isinstance(fact, Saw) for fact in facts[ends[0] :]):
            yield f"reader {opened.reader} received a message after the end"


def _ends_are_final(view: _View) -> Iterator[str]:
    """An end is the same for every reader, in the store and in the log, before and after restarts."""
    for generation, ends in view.ends().items():
        durable = [each for each in ends if getattr(each[1], "persisted", True)]
        # After a restart, the server runs a generation again that its own stop ended.
        final = [(outcome, image) for _, _, outcome, image in durable if outcome != "DRAINING"]
        outcomes = {outcome for outcome, _ in final}
        if len(outcomes) > 1:
            yield f"{generation} ended as {' and as '.join(sorted(outcomes))}"
        if len({image for _, image in final if image}) > 1:
            yield f"{generation} has several images"


def _listings_agree(view: _View) -> Iterator[str]:
    """A generation that ended is never listed as running again, and its phase fits its end."""
    ends = view.ends()
    for place, fact in view.of(Listed):
        earlier = {
            outcome
            for when, shown, outcome, _ in ends.get(fact.generation, ())
            if when < place and outcome != "DRAINING" and getattr(shown, "persisted", True)
        }
        for outcome in earlier:
            phase = "succeeded" if outcome == SUCCEEDED else "cancelled" if outcome in _CANCELS else "failed"
            if fact.phase != phase:
                yield f"{fact.generation} is listed as {fact.phase} after it ended as {outcome}"


def _request_ids_start_once(view: _View) -> Iterator[str]:
    """A request id starts another generation only if the first one was dropped, or had no reader, server or disk."""
    started = defaultdict(list)
    for opened, facts in view.readers():
        for fact in facts:
            if isinstance(fact, Saw) and opened.request_id:
                started[tag_of(fact.generation), opened.caller, opened.request_id].append(fact.generation)
    for _, row in view.of(Stored):
        if row.request_id:
            started[tag_of(row.generation), row.caller, row.request_id].append(row.generation)
    ends = view.ends()
    dropped = {fact.generation for _, fact in view.of(Dropped)}
    for (_, _, request_id), generations in started.items():
        counted = [
            generation
            for generation in dict.fromkeys(generations)
            if generation not in dropped
            and not {outcome for _, _, outcome, _ in ends.get(generation, ())} & REPLACEABLE
        ]
        if len(counted) > 1 and not view.lost(counted[0]):
            yield f"request id {request_id} started {', '.join(counted)}"


def _images_repeat(view: _View) -> Iterator[str]:
    """The same recipe gives the same bytes."""
    images = defaultdict(set)
    for opened, facts in view.readers():
        for fact in facts:
            if isinstance(fact, SawEnd) and fact.image and not fact.early and opened.recipe:
                images[opened.recipe].add(fact.image)
    for recipe, found in images.items():
        if len(found) > 1 and view.deterministic:
            yield f"recipe {recipe} gave {len(found)} different images"


def _readers_move_forward(view: _View) -> Iterator[str]:
    """Sequence numbers rise and steps do not fall for any reader."""
    for opened, facts in view.readers():
        for before, after in itertools.pairwise([fact for fact in facts if isinstance(fact, Saw)]):
            if after.sequence <= before.sequence:
                yield f"reader {opened.reader} went from sequence {before.sequence} to {after.sequence}"
            if after.step < before.step:
                yield f"reader {opened.reader} went from step {before.step} to {after.step}"


def _nothing_hangs(view: _View) -> Iterator[str]:
    """Every reader is done at the end, and SIGTERM ends the server."""
    for opened, facts in view.readers():
        if not any(isinstance(fact, SawEnd | Refused | Left) for fact in facts):
            yield f"reader {opened.reader} is still waiting"
    for _, fact in view.of(Stopped):
        if fact.code is None:
            yield "the server ignored SIGTERM"


def _slots_return(view: _View) -> Iterator[str]:
    """Without callers, no slot and no place in the queue is occupied."""
    for _, fact in view.of(Settled):
        if fact.active or fact.waiting:
            yield f"{fact.active} slots and {fact.waiting} places in the queue are occupied without a caller"


def _failures_are_explained(view: _View) -> Iterator[str]:
    """Every end without an image has a reason and a line in the log."""
    logged = defaultdict(set)
    crashes = [place for place, _ in view.of(Crashed)]
    has_log = any(True for _ in view.of(Logged))
    for _, line in view.of(Logged):
        logged[line.generation].add(line.outcome)
    for generation, ends in view.ends().items():
        for outcome in {outcome for _, _, outcome, _ in ends}:
            if not outcome:
                yield f"{generation} ended without a reason"
                continue
            if outcome == SUCCEEDED or not has_log or outcome in logged[generation]:
                continue
            first = min(place for place, _, shown, _ in ends if shown == outcome)
            # A process that is killed right after it stored an end does not log it.
            if not any(crash < first for crash in crashes):
                yield f"{generation} ended as {outcome}, which the log does not say"


def _attempts_are_bounded(view: _View) -> Iterator[str]:
    """A job that ends its process gets a bounded number of attempts, then a typed end."""
    for _, row in view.of(Stored):
        if row.attempts > MAX_ATTEMPTS:
            yield f"{row.generation} had {row.attempts} attempts"
    ends = view.ends()
    for generation, places in _attempts(view).items():
        outcomes = {outcome for _, _, outcome, _ in ends.get(generation, ())}
        if len(places) > MAX_ATTEMPTS and outcomes != {CRASHED}:
            yield f"{generation} was on the engine at {len(places)} crashes"


def _attempts(view: _View) -> dict[str, list[int]]:
    """Returns the crashes of the process, by generation that the engine was working on."""
    on_engine: set[str] = set()
    crashes = defaultdict(list)
    for place, fact in view.facts:
        match fact:
            case Saw(phase="encoding_prompt" | "denoising" | "decoding"):
                on_engine.add(fact.generation)
            case SawEnd():
                on_engine.discard(fact.generation)
            case Crashed():
                for generation in on_engine:
                    crashes[generation].append(place)
                on_engine = set()
    return crashes


CHECKS: dict[str, Callable[[_View], Iterator[str]]] = {
    "ends once": _ends_once,
    "ends are final": _ends_are_final,
    "listings agree": _listings_agree,
    "request ids start once": _request_ids_start_once,
    "images repeat": _images_repeat,
    "readers move forward": _readers_move_forward,
    "nothing hangs": _nothing_hangs,
    "slots return": _slots_return,
    "failures are explained": _failures_are_explained,
    "attempts are bounded": _attempts_are_bounded,
}
"""All invariants by name."""


def violations(history: History) -> list[Violation]:
    """Returns every broken promise of a finished run."""
    view = _View(history)
    return [Violation(name, sentence) for name, check in CHECKS.items() for sentence in check(view)]
