"""What a store holds is never sent again, and what it lacks is: marks, journals cut short, replays."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.tracking import Run, RunGoneError, Shipper, TrackingConfig, open_run, unfinished_run
from pathfm.tracking.high_water import HighWater, Point
from pathfm.tracking.journal import METRICS, REPLACED, Journal, metric_values

OFF = TrackingConfig(enabled=False)


def point(key: str, step: int, value: float = 0.0, time_ms: int = 1) -> Point:
    return Point(key, value, time_ms, step)


class FakeStore:
    """Keeps every point it is sent, also a second time: a store that does not drop equal ones.

    `cut` counts requests down: at 0 the points land, and the answer is lost.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.cut = -1
        self.asked = 0
        self.water: HighWater | None = None
        self.known = True
        self.client = self

    def update_run(self, *_: object, **__: object) -> None:
        pass

    def find_or_create(self, *_: object) -> str:
        self.known = True
        return "run1"

    def marks(self, run_id: str) -> HighWater:
        if not self.known:
            raise RunGoneError(run_id)
        if self.water is None:
            self.asked += 1
            latest: dict[str, Point] = {}
            for p in self.points:
                latest[p.key] = max(latest.get(p.key, p), p, key=lambda q: q.step)
            self.water = HighWater(latest.values())
        return self.water

    def forget(self) -> None:
        self.water = None

    def send_metrics(self, run_id: str, rows: list[dict[str, Any]]) -> int:
        rows = rows[:3]  # many small requests
        marks = self.marks(run_id)
        new = marks.missing(
            [
                Point(k, v, r["time_ms"], r["step"])
                for r in rows
                for k, v in metric_values(r).items()
            ]
        )
        self.points += new
        self.cut -= 1
        if self.cut == 0:
            raise TimeoutError("landed, and nobody heard")
        marks.reached(new)
        return len(rows)

    def send_task(self, *_: object) -> None:
        pass


def shipper(journal: Journal, store: FakeStore) -> Shipper:
    made = Shipper(TrackingConfig(), journal)
    made._store = store  # type: ignore[assignment]
    made._known.set()
    return made


def ship(made: Shipper) -> None:
    """One round as the thread does it: an error is followed by asking again."""
    try:
        made.ship()
    except TimeoutError:
        made._checked = False
        assert made._store is not None
        made._store.forget()


def steps(store: FakeStore, key: str = "loss") -> list[int]:
    return [p.step for p in store.points if p.key == key]


@given(
    held=st.dictionaries(st.sampled_from("abc"), st.integers(0, 20)),
    sent=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), max_size=60),
)
def test_what_is_missing_is_above_its_keys_mark_and_comes_once(held, sent):
    sent = sorted(sent, key=lambda pair: pair[1])  # a journal's order
    water = HighWater([point(key, step) for key, step in held.items()])
    new = [(p.key, p.step) for p in water.missing([point(*pair) for pair in sent])]
    wanted = {pair for pair in sent if pair[1] > held.get(pair[0], -1)}  # as a set says it
    assert len(new) == len(set(new))
    assert set(new) == wanted


def test_a_summary_is_sent_unless_shown_already_or_a_series():
    water = HighWater(
        [point("loss", 9, 1.0), point("rankme", 0, 3.5), point("nan", 0, float("nan"))]
    )
    asked = [("loss", 2.0), ("rankme", 3.5), ("nan", float("nan")), ("new", 1.0), ("rankme", 4.0)]
    got = water.missing_summary([point(key, 0, value) for key, value in asked])
    assert [(p.key, p.value) for p in got] == [("new", 1.0), ("rankme", 4.0)]


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_write_that_landed_unheard_is_not_sent_again(tmp_path: Path, cut: int) -> None:
    journal, store = Journal(tmp_path), FakeStore()
    made = shipper(journal, store)
    for step in range(20):
        journal.append_metrics(step, {"loss": 1.0, **({"probe": 2.0} if step % 7 == 0 else {})})
    store.cut = cut
    ship(made)
    ship(made)
    assert steps(store) == list(range(20))
    assert steps(store, "probe") == [0, 7, 14]
    assert store.asked == 1 + (cut <= 7)  # one request on connecting, one after an error; no more


@pytest.mark.parametrize("shipped", [0, 4, 9, 12])
@pytest.mark.parametrize("checkpoint", [0, 3, 8])
def test_steps_done_again_after_a_kill_arrive_once_whatever_their_time(
    tmp_path: Path, shipped: int, checkpoint: int
) -> None:
    store, journal = FakeStore(), Journal(tmp_path)
    for step in range(12):
        journal.append_metrics(step, {"loss": float(step)})
        if step < shipped:
            shipper(journal, store).ship()
    run_id = journal.run_id
    again = Journal(tmp_path, run_id)  # the process was killed: only files are left
    again.truncate(checkpoint)
    later = Journal(tmp_path, run_id)  # and killed again before the first step
    later.truncate(checkpoint)
    for step in range(checkpoint + 1, 15):
        later.append_metrics(step, {"loss": float(step)})
        shipper(later, store).ship()
    assert steps(store) == list(range(15))
    assert [p.value for p in store.points] == [float(s) for s in range(15)]


def test_the_first_value_of_a_step_stays_and_the_difference_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, journal = FakeStore(), Journal(tmp_path)
    for step in range(6):
        journal.append_metrics(step, {"loss": 1.0})
    made = shipper(journal, store)
    made.ship()
    journal.truncate(2)
    for step in range(3, 8):
        journal.append_metrics(step, {"loss": 1.5})
    made.ship()
    assert [(p.step, p.value) for p in store.points] == [
        *((s, 1.0) for s in range(6)),
        *((s, 1.5) for s in (6, 7)),
    ]
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [row["loss"] for row in rows] == [1.0] * 3 + [1.5] * 5
    told = [r.message for r in caplog.records if "done again" in r.message]
    (line,) = told
    assert line.startswith("step 3 was done again and its loss is now 1.5, not 1")
    assert line.endswith("MLflow keeps the first value of a step, metrics.jsonl holds the last")


def test_a_cursor_past_the_end_or_inside_a_line_skips_no_row(tmp_path: Path) -> None:
    store, journal = FakeStore(), Journal(tmp_path)
    for step in range(9):
        journal.append_metrics(step, {"loss": 1.0})
    shipper(journal, store).ship()
    whole = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))  # power cut
    after = Journal(tmp_path, journal.run_id)
    for step in range(4, 12):
        after.append_metrics(step, {"loss": 1.0})
    state = json.loads((tmp_path / "tracking.json").read_text())
    (tmp_path / "tracking.json").write_text(json.dumps(state | {"metrics_bytes": 7}))
    last = Journal(tmp_path, journal.run_id)
    shipper(last, store).ship()
    assert steps(store) == list(range(12))


def test_a_store_that_lost_rows_or_the_run_gets_them_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, journal = FakeStore(), Journal(tmp_path)
    made = shipper(journal, store)
    for step in range(9):
        journal.append_metrics(step, {"loss": 1.0})
    made.ship()
    store.points = store.points[:5]  # an old backup of its database was put back
    store.forget()
    shipper(journal, store).ship()
    assert steps(store) == list(range(9))
    assert "lost rows" in caplog.text
    store.points, store.known = [], False  # and now a database without the run
    store.forget()
    shipper(journal, store).ship()
    assert steps(store) == list(range(9))


def test_a_lost_folder_still_sends_nothing_twice(tmp_path: Path) -> None:
    store = FakeStore()
    first = Journal(tmp_path / "a")
    for step in range(6):
        first.append_metrics(step, {"loss": 1.0})
    shipper(first, store).ship()
    elsewhere = Journal(tmp_path / "b", "run1")  # the checkpoint knew the run, the rest is gone
    for step in range(4, 9):
        elsewhere.append_metrics(step, {"loss": 1.0})
    shipper(elsewhere, store).ship()
    assert steps(store) == list(range(9))


def test_replaced_rows_are_kept_until_they_are_behind_a_checkpoint(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(6):
        journal.append_metrics(step, {"loss": 1.0})
    journal.truncate(3)
    journal.append_metrics(4, {"loss": 2.0})
    journal.truncate(3)
    rows = [json.loads(line) for line in (tmp_path / REPLACED).read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(4, 1.0), (5, 1.0)]


def test_a_run_killed_before_its_first_checkpoint_is_the_same_run_again(tmp_path: Path) -> None:
    journal_of = {"lr": 1, "out": "a"}
    run = open_run(OFF, tmp_path, journal_of)
    run.log(0, loss=1.0)  # and killed: no end
    assert unfinished_run(tmp_path, journal_of) == run.run_id
    assert unfinished_run(tmp_path, journal_of | {"lr": 2}) is None
    assert unfinished_run(tmp_path, journal_of | {"out": "b"}, free=("out",)) == run.run_id
    with open_run(OFF, tmp_path, journal_of, run_id=run.run_id):
        pass
    assert unfinished_run(tmp_path, journal_of) is None  # it ended well
    assert unfinished_run(tmp_path / "nowhere", journal_of) is None


def test_no_loss_no_difference_and_nan_equals_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    run = Run(OFF, Journal(tmp_path))
    run.log(0, loss=float("nan"), patches_per_s=10.0)
    run.log(1, probe=0.5)
    run.truncate(-1)
    run.log(0, loss=float("nan"), patches_per_s=12.0)
    run.log(1, probe=0.6)
    assert not caplog.records
