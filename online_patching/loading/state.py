"""A loader's state as small JSON: written, read back, and made one of several ranks'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from online_patching.errors import StateMismatchError
from online_patching.loading.batch import DrawSource
from online_patching.loading.ledger import Ledger, Rule

VERSION = 2


def save_state(
    source: DrawSource, next_draw: int, ledger: Ledger, own: Ledger, part: tuple[int, int] | None
) -> dict[str, Any]:
    """The state of a stream before `next_draw`.

    `own` is what only rank `part[0]` of `part[1]` knows; left out where that is nothing.
    """
    state = {
        "version": VERSION,
        "next_draw": next_draw,
        "corpus": source.corpus.digest,
        "sampler": source.digest,
        "sampler_config": source.config,
        **ledger.as_json(next_draw),
        "own": None,
    }
    if part is not None and (own.failed or own.filtered):
        counts = own.as_json(next_draw)
        state["own"] = {"rank": part[0], "world_size": part[1], **counts}
    return state


def load_ledgers(state: dict[str, Any], source: DrawSource, rule: Rule) -> tuple[Ledger, int]:
    """The ledger and the next draw of a saved state.

    StateMismatchError when it was saved by another version, for another stream or under another rule.
    """
    if state.get("version") != VERSION:
        raise StateMismatchError(
            f"the state was saved in version {state.get('version')}, this is version {VERSION}. Resume with "
            "the release that saved it, or start a new run."
        )
    for name, here, saved, now in (
        ("corpus", source.corpus.digest, state["corpus"], source.corpus.digest),
        ("sampler", source.digest, state["sampler_config"], source.config),
    ):
        if state[name] != here:
            raise StateMismatchError(
                f"the saved stream has another {name}: saved {saved}, now {now}. Resume with what it was "
                "begun with, or start a new run."
            )
    ledger = Ledger.from_json(state)
    if state["own"] is not None:
        ledger = ledger.joined(Ledger.from_json(state["own"]))
    saved_rule = ledger.rule
    if None not in (saved_rule.quarantine_after, rule.quarantine_after) and saved_rule != rule:
        raise StateMismatchError(
            f"the saved stream has another rule of quarantine: saved {saved_rule}, now {rule}. Resume with "
            "quarantine_after and window_draws as they were, or with quarantine_after=None."
        )
    watched = ledger.watched if saved_rule.window_draws == rule.window_draws else {}
    return replace(ledger, rule=rule, watched=watched), int(state["next_draw"])


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of those that all ranks saved at the same step, with everybody's failures.

    Needed only where ranks run without `gather`. StateMismatchError when they are not of one step of
    one stream.
    """
    first = {name: value for name, value in states[0].items() if name != "own"}
    for state in states[1:]:
        differing = [name for name in first if state.get(name) != first[name]]
        if differing:
            raise StateMismatchError(
                f"these states are not of one step of one stream: they differ in {', '.join(differing)} "
                f"({states[0].get(differing[0])}, {state.get(differing[0])}). Save every rank's at the same step."
            )
    parts = sorted((s["own"] for s in states if s["own"] is not None), key=lambda own: own["rank"])
    ranks = [own["rank"] for own in parts]
    if len(set(ranks)) < len(ranks):
        raise StateMismatchError(f"these states are of ranks {ranks}: one is there twice.")
    ledger = Ledger.from_json(first)
    for own in parts:
        ledger = ledger.joined(Ledger.from_json(own))
    return {**first, **ledger.as_json(int(first["next_draw"])), "own": None}
