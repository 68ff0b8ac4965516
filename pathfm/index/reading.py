"""Headers in, .index files and journal lines out: many slides at a time, through one set of clients.

A slide that the journal knows is taken over when its bytes are the same: by size and modification time
(local), by a listing of the bucket where the store has listings (a thousand slides a request), else by one
request a slide. So are refusals, where the slide is one object; what a store refused is tried again.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import takewhile
from typing import TypeVar

from online_patching import SlideIndex
from online_patching.errors import PatchingError, SlideError, redact
from online_patching.slide import check_unchanged
from online_patching.stores import Stores, is_remote
from pathfm.cohorts import Cohort, CohortOptions, CohortRow, fingerprint, index_row
from pathfm.index.folder import Folder
from pathfm.index.journal import Journal, Record
from pathfm.index.tables import facts_of, told_by_cohort
from pathfm.index.wanted import Wanted
from pathfm.runtime import one_line, progress, without_secrets

_AHEAD = 16
"""Slides handed to each thread ahead of the slowest."""
_CHECKED_AT_ONCE = 64
_PARTS = "of its parts"
"""In place of the token of a slide whose objects have tokens."""
_WORTH_LISTING = 32
"""Slides of one bucket from which on a listing is cheaper than asking for each."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Reader:
    """Brings the journal and the folder up to date with what is wanted; `reused` counts indexes taken over."""

    def __init__(
        self,
        folder: Folder,
        journal: Journal,
        stores: Stores,
        threads: int,
        options: CohortOptions,
        cohort: Cohort,
    ) -> None:
        self.folder, self.journal, self.stores, self.threads = folder, journal, stores, threads
        self.options, self.salt = options, cohort.salt
        self.reused = 0
        self._listed: dict[str, str] = {}

    def bring_up_to_date(self, wanted: Sequence[Wanted], anew: bool) -> None:
        """Every slide wanted has a true line in the journal afterwards."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="index")
        try:
            self._listed = self._listings([slide for slide in wanted if is_remote(slide.row.uri)])
            done = set() if anew else self._still_true(pool, wanted)
            self.reused = sum(bool(self.journal.known[address].slide_id) for address in done)
            rest = (slide for slide in wanted if slide.address not in done)
            refused = 0
            with progress(len(wanted), "slides", "indexing", len(done)) as bar:
                for usable in _in_turn(pool, self._read, rest, self.threads * _AHEAD):
                    refused += not usable
                    bar.advance(refused=str(refused))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def fingerprint_same_sizes(self, addresses: Iterable[str]) -> None:
        """Note fingerprints of slides that have the size of another: no others can show the same image.

        That reads their coarsest level, which 100,000 slides would be dear to be asked for.
        """
        by_size: dict[tuple[int, int], list[str]] = {}
        for address in addresses:
            if self.journal.known[address].slide_id:
                record = self.journal.read(address)
                by_size.setdefault((record["width_px"], record["height_px"]), []).append(address)
        alike = [address for some in by_size.values() if len(some) > 1 for address in some]
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="index")
        try:
            with progress(len(alike), "slides", "comparing slides of one size") as bar:
                for _ in _in_turn(pool, self._fingerprint, alike, self.threads * _AHEAD):
                    bar.advance()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _fingerprint(self, address: str) -> None:
        record = self.journal.read(address)
        if "fingerprint" not in record:
            index = self.folder.load(record["slide_id"])
            self.journal.add(record | {"fingerprint": fingerprint(index, self.stores)})

    # --- what is known already ---

    def _still_true(self, pool: ThreadPoolExecutor, wanted: Sequence[Wanted]) -> set[str]:
        """Addresses of which what the journal says still holds."""
        asked = [slide for slide in wanted if self._may_hold(slide)]
        chunks = [asked[i : i + _CHECKED_AT_ONCE] for i in range(0, len(asked), _CHECKED_AT_ONCE)]

        found = _in_turn(pool, self._unchanged, chunks, self.threads * 2)
        return {address for some in found for address in some}

    def _unchanged(self, slides: list[Wanted]) -> list[str]:
        """Addresses of those whose bytes are the same; remote ones are asked for at the same time."""
        tokens: dict[str, str] = {}
        asked = [s.row.uri for s in slides if is_remote(s.row.uri) and self._must_ask(s)]
        if asked:
            answers = self.stores.loop.run(self._ask(asked))
            tokens = dict(zip(map(redact, asked), answers, strict=True))
        return [slide.address for slide in slides if self._same_bytes(slide, tokens)]

    def _must_ask(self, slide: Wanted) -> bool:
        known = self.journal.known[slide.address]
        at_hand = (self._listed.get(slide.address), token_of_content(slide.row))
        return known.plain and known.token not in at_hand

    async def _ask(self, uris: list[str]) -> list[str]:
        """The token of each remote object now; "" where there is none to be had."""

        async def one(uri: str) -> str:
            try:
                return (await self.stores.remote(uri).version(uri))[1]
            except PatchingError:
                return ""

        return await asyncio.gather(*map(one, uris))

    def _may_hold(self, slide: Wanted) -> bool:
        known = self.journal.known.get(slide.address)
        if known is None or not known.token or known.told != slide.told:
            return False
        if known.salt and self.salt is not None and known.salt != self.salt.mark:
            return False  # what its header says of the patient has another id now
        return not known.slide_id or (known.slide_id == slide.slide_id and self.folder.has(known))

    def _same_bytes(self, slide: Wanted, tokens: Mapping[str, str]) -> bool:
        """Whether a slide is the one that was indexed; `tokens` are those just asked for, by address."""
        known = self.journal.known[slide.address]
        if token_of_content(slide.row) == known.token:
            return True
        try:
            if not known.plain:
                return self._same_parts(self.folder.load(known.slide_id))
            if is_remote(slide.row.uri):
                now = tokens.get(slide.address) or self._listed.get(slide.address)
                return now == known.token
            return self.stores.version(slide.row.uri)[1] == known.token
        except PatchingError:
            return False

    def _same_parts(self, index: SlideIndex) -> bool:
        """Whether a slide of several objects is the one that was indexed."""
        if not index.objects:
            check_unchanged(index, self.stores)
            return True
        keys = [index.object_key(number) for number in range(len(index.objects))]
        try:
            now = {one.uri: one.token for one in self.stores.list(index.uri)}
        except PatchingError:  # http(s) has no listings
            now = {key: self.stores.version(key)[1] for key in keys}
        return all(
            item.token and now.get(key) == item.token
            for key, item in zip(keys, index.objects, strict=True)
        )

    def _listings(self, slides: list[Wanted]) -> dict[str, str]:
        """Tokens of remote slides by address, as far as listings of their buckets tell them."""
        by_bucket: dict[str, list[str]] = {}
        for slide in slides:
            by_bucket.setdefault("/".join(slide.row.uri.split("/", 3)[:3]), []).append(
                slide.row.uri
            )
        found: dict[str, str] = {}
        for bucket, uris in by_bucket.items():
            if len(uris) < _WORTH_LISTING or bucket.startswith("http"):
                continue
            try:
                listed = self.stores.list(_folder_of_all(uris))
                found |= {redact(one.uri): one.token for one in listed}
            except PatchingError:
                continue  # too many others there, or not to be listed: each is asked for
        return found

    # --- what is not ---

    def _read(self, slide: Wanted) -> bool:
        """Index a slide and note it, or why it is refused; whether it is usable."""
        token = self._token_before(slide) or token_of_content(slide.row)
        try:
            index, row = index_row(
                slide.row, slide.told, self.stores, options=self.options, salt=self.salt
            )
        except PatchingError as error:
            # a slide's own fault stays until its bytes change; a store's may be gone tomorrow
            self._refuse(slide, error.code, error, token if isinstance(error, SlideError) else "")
            return False
        except Exception as error:  # one slide of 100,000 must not end the run
            self._refuse(slide, "error", error, "")
            return False
        index = replace(index, slide_id=slide.slide_id)
        size = self.folder.save(index, self.journal)
        found = {k: v for k, v in told_by_cohort(row).items() if not getattr(slide.row, k)}
        self.journal.add(
            {
                "uri": slide.address,
                "told": slide.told,
                "token": index.token or token_of_content(row) or (_PARTS if index.objects else ""),
                "index_bytes": size,
                "plain": not index.objects and index.levels[0].keys is None,
                "found": found,
                **({"salt": self.salt.mark} if found and self.salt is not None else {}),
                **facts_of(index),
            }
        )
        return True

    def _refuse(self, slide: Wanted, code: str, error: Exception, token: str) -> None:
        reason = one_line(error)
        if not isinstance(error, PatchingError):
            reason = f"{type(error).__name__}: {reason}. This is a fault of ours: please report it."
        for name in (getattr(error, "uri", None), slide.address, slide.row.uri):
            reason = reason.removeprefix(f"{name}: ")
        record: Record = {"uri": slide.address, "told": slide.told, "token": token}
        self.journal.add(record | {"code": code, "reason": without_secrets(reason)})

    def _token_before(self, slide: Wanted) -> str:
        """The version of a slide's object before it is read, where that costs no request.

        What a refusal is true of: afterwards, a file that was still being copied may be whole.
        """
        if is_remote(slide.row.uri):
            return self._listed.get(slide.address, "")
        if not os.path.isfile(slide.address):
            return ""
        try:
            return self.stores.version(slide.row.uri)[1]
        except PatchingError:
            return ""


def token_of_content(row: CohortRow) -> str:
    """A token out of what a source promises of a slide's bytes, such as their MD5."""
    return f"content {row.content}" if row.content else ""


def _folder_of_all(uris: Sequence[str]) -> str:
    """The deepest folder that all of these lie in."""
    first, last = (uri.split("/")[:-1] for uri in (min(uris), max(uris)))
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "/".join(part for part, _ in same)


def _in_turn(
    pool: ThreadPoolExecutor,
    work: Callable[[Item], Answer],
    items: Iterable[Item],
    ahead: int,
) -> Iterator[Answer]:
    """`pool.map` with at most `ahead` items on their way: 100,000 slides are not queued at once."""
    waiting: deque[Future[Answer]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def default_threads(uris: Iterable[str]) -> int:
    """8, or 64 where most slides are remote: those wait for their server, several times each."""
    remote = [is_remote(uri) for uri in uris]
    return 64 if 2 * sum(remote) > len(remote) else 8
