"""What every store must do: a class of tests to subclass, for stores of this package and of others.

    class TestMyStore(StoreContract):
        def make_store(self): return MyStore()
        def put(self, name, data): ...     # store an object, return its key
        def remove(self, name): ...        # delete it again

It needs pytest. `secrets` are words that no message may hold.
"""

from __future__ import annotations

import asyncio
import inspect
import pickle
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from operator import methodcaller
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest

from online_patching.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    PatchingError,
    ShortReadError,
    StoreError,
)

T = TypeVar("T")
SIZE = 700_001
"""More than one read of a socket, and odd."""

RANGES = (
    *((0, 1), (0, SIZE), (SIZE - 1, SIZE), (1, 65_537), (262_143, 524_290)),
    *((0, None), (77, None)),
)


def content(seed: int, size_bytes: int = SIZE) -> bytes:
    """Bytes that differ everywhere from those of another seed."""
    return np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8).tobytes()


class StoreContract(ABC):
    """Tests that any store passes. A store may be awaited (AsyncStore) or answer at once (LocalStore)."""

    secrets: ClassVar[tuple[str, ...]] = ()
    lists: ClassVar[bool] = True
    odd_names: ClassVar[tuple[str, ...]] = (
        "deep/er/b c.bin",
        "deep/100%41+#1?x=&y.bin",
        "deep/µm – ü.bin",
    )

    @abstractmethod
    def make_store(self) -> Any:
        """A store that nobody has used; called on the loop that will use it."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> str:
        """Store an object (or replace it) and return its key."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete an object."""

    def folder(self, name: str) -> str:
        """The key of a folder or prefix in which `put` stores names that begin with `name`/."""
        return self.put(f"{name}/unused", b"").removesuffix("/unused")

    # --- the tests -----------------------------------------------------------------------------

    def test_a_version_is_the_size_and_a_token_that_stays_the_same(self) -> None:
        key = self.put("one.bin", content(1))
        size, token = self.use(lambda store: store.version(key))
        assert size == SIZE
        assert isinstance(token, str)
        assert token
        assert self.use(lambda store: store.version(key)) == (size, token)

    def test_a_range_is_exactly_the_bytes_asked_for(self) -> None:
        data = content(1)
        key = self.put("one.bin", data)

        async def check(store: Any) -> None:
            _, token = await answer(store.version(key))
            for start, stop in RANGES:
                assert await answer(store.read(key, start, stop)) == data[start:stop]
                assert await answer(store.read(key, start, stop, token)) == data[start:stop]

        self.use(check)

    def test_an_empty_range_is_no_bytes(self) -> None:
        key = self.put("one.bin", content(1))

        async def check(store: Any) -> None:
            for at in (0, 1, 5000, SIZE):
                assert await answer(store.read(key, at, at)) == b""

        self.use(check)

    def test_an_empty_object_has_a_version_and_no_bytes(self) -> None:
        key = self.put("empty.bin", b"")
        size, token = self.use(lambda store: store.version(key))
        assert size == 0
        assert token
        assert self.use(lambda store: store.read(key, 0, None)) == b""
        assert isinstance(self.failure(lambda store: store.read(key, 0, 1)), ShortReadError)

    def test_a_range_past_the_end_says_how_long_the_object_is(self) -> None:
        key = self.put("one.bin", content(1))
        for start, stop in ((SIZE - 10, SIZE + 1), (SIZE + 5, SIZE + 9)):
            error = self.failure(methodcaller("read", key, start, stop))
            assert isinstance(error, ShortReadError)
            assert (error.start, error.stop) == (start, stop)
            assert error.size_bytes <= SIZE

    def test_an_absent_object_is_told_as_absent(self) -> None:
        key = self.put("gone.bin", b"was here")
        self.remove("gone.bin")
        for ask in (
            lambda store: store.version(key),
            lambda store: store.read(key, 0, 4),
            lambda store: store.read(key, 0, None),
        ):
            assert isinstance(self.failure(ask), ObjectNotFoundError)

    def test_bytes_of_another_version_are_never_returned(self) -> None:
        key = self.put("changing.bin", content(1))
        _, token = self.use(lambda store: store.version(key))
        self.put("changing.bin", content(2))  # of the same size
        assert self.use(lambda store: store.version(key))[1] != token
        for stop in (10, SIZE, None):
            error = self.failure(methodcaller("read", key, 0, stop, token))
            assert isinstance(error, ObjectChangedError)
        assert self.use(lambda store: store.read(key, 0, 10)) == content(2)[:10]

    def test_many_reads_at_once_get_each_its_own_bytes(self) -> None:
        data = [content(seed, 50_000) for seed in range(3)]
        keys = [self.put(f"many-{i}.bin", body) for i, body in enumerate(data)]
        wanted = [(i % 3, 97 * i, 97 * i + 1 + 211 * i) for i in range(60)]

        async def read_all(store: Any) -> list[bytes]:
            reads = (answer(store.read(keys[k], start, stop)) for k, start, stop in wanted)
            return list(await asyncio.gather(*reads))

        assert self.use(read_all) == [data[k][start:stop] for k, start, stop in wanted]

    def test_a_read_that_is_cancelled_leaves_the_store_in_order(self) -> None:
        data = content(1)
        key = self.put("one.bin", data)

        async def cancel_some(store: Any) -> bytes:
            tasks = [asyncio.ensure_future(answer(store.read(key, 0, SIZE))) for _ in range(8)]
            await asyncio.sleep(0.001)
            for task in tasks[::2]:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(body == data for body in done[1::2])
            body: bytes = await answer(store.read(key, 5, 500))
            return body

        assert self.use(cancel_some) == data[5:500]

    def test_a_store_may_be_closed_twice_and_used_again(self) -> None:
        data = content(1)
        key = self.put("one.bin", data)

        async def again(store: Any) -> bytes:
            assert await answer(store.read(key, 0, 9)) == data[:9]
            await answer(store.close())
            await answer(store.close())
            body: bytes = await answer(store.read(key, 9, 99))
            return body

        assert self.use(again) == data[9:99]

    def test_names_that_are_odd_are_names(self) -> None:
        stored = {self.put(name, content(i, 1000)): i for i, name in enumerate(self.odd_names)}

        async def check(store: Any) -> None:
            for key, seed in stored.items():
                assert (await answer(store.version(key)))[0] == 1000
                assert await answer(store.read(key, 1, 999)) == content(seed, 1000)[1:999]

        self.use(check)

    def test_a_listing_is_sorted_and_tells_sizes_and_tokens(self) -> None:
        if not self.lists:
            error = self.failure(lambda store: store.list(self.folder("listed")))
            assert isinstance(error, StoreError)
            return
        names = ["listed/b.bin", "listed/a/z.bin", *(f"listed/{name}" for name in self.odd_names)]
        keys = {self.put(name, content(i, 100 + i)): 100 + i for i, name in enumerate(names)}
        beside = self.put("listed-not/c.bin", b"c")
        folder = self.folder_of(names[0])
        found = self.use(lambda store: store.list(folder))
        assert [item.uri for item in found] == sorted(keys)
        assert {item.uri: item.size_bytes for item in found} == keys
        assert beside not in keys

        async def check(store: Any) -> None:
            for item in found:
                assert await answer(store.version(item.uri)) == (item.size_bytes, item.token)

        self.use(check)

    def test_a_listing_of_one_object_is_that_object(self) -> None:
        if self.lists:
            key = self.put("alone/one.bin", b"one")
            (found,) = self.use(lambda store: store.list(key))
            assert (found.uri, found.size_bytes) == (key, 3)

    def test_a_listing_that_is_empty_or_too_long_is_an_error(self) -> None:
        if self.lists:
            keys = [self.put(f"long/{i}.bin", b"x") for i in range(4)]
            folder = keys[0].removesuffix("/0.bin")
            assert len(self.use(lambda store: store.list(folder, 4))) == 4
            error = self.failure(lambda store: store.list(folder, 3))
            assert isinstance(error, StoreError)
            assert "more than 3" in str(error)
            error = self.failure(lambda store: store.list(f"{folder}-none/at-all"))
            assert isinstance(error, ObjectNotFoundError)

    def test_an_error_says_which_object_and_no_secret_and_may_be_pickled(self) -> None:
        key = self.put("named.bin", b"1234")
        self.remove("named.bin")
        error = self.failure(lambda store: store.read(key, 0, 4))
        assert "named.bin" in str(error)
        assert "\n" not in str(error)
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - it is our own
        assert (type(again), str(again)) == (type(error), str(error))

    # --- how they run --------------------------------------------------------------------------

    def folder_of(self, name: str) -> str:
        """The key of the first folder in a name, without storing anything new."""
        key = self.put(name, content(0, 100))
        return key.removesuffix(name.partition("/")[2]).rstrip("/")

    def use(self, work: Callable[[Any], Any]) -> Any:
        """What `work` gets from a new store, which is closed afterwards."""

        async def run() -> Any:
            store = self.make_store()
            try:
                return await answer(work(store))
            finally:
                await answer(store.close())

        return asyncio.run(run())

    def failure(self, work: Callable[[Any], Any]) -> PatchingError:
        """The error that `work` ends with; it holds none of the secrets."""
        with pytest.raises(PatchingError) as caught:
            self.use(work)
        told = "".join(traceback.format_exception(caught.value)) + repr(caught.value.__dict__)
        for secret in self.secrets:
            assert secret not in told
        return caught.value


async def answer(value: Awaitable[T] | T) -> T:
    """What a store answers, whether at once or later."""
    if inspect.isawaitable(value):
        awaited: T = await value
        return awaited
    return value
