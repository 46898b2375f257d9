"""A channel carries calls and answers unchanged, lets nobody else in, and loses none of its callers."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.answer import Answer
from deployments.channels import server as server_module
from deployments.channels.client import Channel, ChannelLost
from deployments.channels.frames import ARRAY_BYTES, GREETING, JSON_BYTES, TOKEN_BYTES, Address
from deployments.channels.pool import Channels
from deployments.channels.server import STRANGERS, ChannelServer
from deployments.pool import open_channels
from pipeline.dispatcher import Scores
from pipeline.errors import Busy, Expired, PoolFailed

HOST = "127.0.0.1"
IMAGES_NHWC = np.arange(2 * 3 * 5 * 3, dtype=np.uint8).reshape(2, 3, 5, 3)


class Replica:
    """Answers with the first pixel of each image, once it is let; notes what it was asked, and who left."""

    opened: ClassVar[list[ChannelServer]] = []

    def __init__(self, name: str = "a", *, answer: Busy | Expired | Exception | None = None, free: bool = True) -> None:
        self.name, self.answer = name, answer
        self.asked: list[tuple[Any, ...]] = []
        self.left = 0
        self.free = asyncio.Event()
        if free:
            self.free.set()
        self.server = ChannelServer(self.score)

    async def score(self, images_NHWC: np.ndarray, top_k: int, within_s: Sequence[float], details: bool) -> Any:
        self.asked.append((images_NHWC, top_k, within_s, details))
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        if isinstance(self.answer, Busy | Expired):
            return self.answer
        if self.answer:
            raise self.answer
        return Answer(scores_of(images_NHWC, details), self.name, "float32")

    async def open(self) -> Address:
        self.opened.append(self.server)
        return await self.server.open(self.name, HOST)


def scores_of(images_NHWC: np.ndarray, details: bool) -> Scores:
    top_NK = images_NHWC[:, 0, 0, :1].astype(np.int32)
    scores_NK = np.full((len(images_NHWC), 1), np.float32(1 / 3))
    if not details:
        return Scores(top_NK, scores_NK)
    return Scores(top_NK, scores_NK, np.full((len(images_NHWC), 7), np.float32(-2.5)), np.eye(2, dtype=np.float32))


@asynccontextmanager
async def channel_to(replica: Replica) -> AsyncIterator[Channel]:
    channel = await Channel.open(await replica.open())
    try:
        yield channel
    finally:
        await channel.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            Replica.opened.clear()
            await test
            for server in Replica.opened:
                await server.close()

    asyncio.run(bounded())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("details", [False, True])
def test_images_and_scores_arrive_as_they_are(details: bool) -> None:
    async def test() -> None:
        replica = Replica()
        async with channel_to(replica) as channel:
            answer = await channel.call(IMAGES_NHWC, 5, [1.25, 2.5], details)

        ((images_NHWC, *told),) = replica.asked
        assert told == [5, [1.25, 2.5], details]
        np.testing.assert_array_equal(images_NHWC, IMAGES_NHWC)
        assert images_NHWC.dtype == np.uint8
        assert (answer.replica, answer.scores_as) == ("a", "float32")
        expected = scores_of(IMAGES_NHWC, details)
        for name, array in vars(expected).items():
            found = getattr(answer.scores, name)
            assert (found is None) == (array is None)
            if array is not None:
                np.testing.assert_array_equal(found, array)
                assert found.dtype == array.dtype

    run(test())


def test_an_array_with_gaps_is_sent_without_them() -> None:
    async def test() -> None:
        replica = Replica()
        async with channel_to(replica) as channel:
            await channel.call(IMAGES_NHWC[:, ::2, ::2], 1, [1.0], False)
        np.testing.assert_array_equal(replica.asked[0][0], IMAGES_NHWC[:, ::2, ::2])

    run(test())


def test_calls_at_once_get_each_its_own_answer_in_whatever_order() -> None:
    async def test() -> None:
        replica = Replica(free=False)
        async with channel_to(replica) as channel:
            many = [np.full((1, 1, 1, 3), number, np.uint8) for number in range(200)]
            calls = [asyncio.create_task(channel.call(one, 1, [9.0], False)) for one in many]
            await until(lambda: len(replica.asked) == 200)
            assert channel.under_way == 200
            replica.free.set()
            answers = await asyncio.gather(*calls)
            assert channel.under_way == 0
        assert [answer.scores.top_NK.item() for answer in answers] == list(range(200))

    run(test())


def test_a_large_call_arrives_whole() -> None:
    async def test() -> None:
        images_NHWC = np.random.default_rng(1).integers(0, 256, (16, 640, 640, 3), np.uint8)  # 19 MB
        replica = Replica()
        async with channel_to(replica) as channel:
            await asyncio.gather(*(channel.call(images_NHWC, 1, [9.0], False) for _ in range(3)))
        for asked, *_ in replica.asked:
            np.testing.assert_array_equal(asked, images_NHWC)

    run(test())


def test_a_full_lane_and_a_deadline_are_answers() -> None:
    async def test() -> None:
        async with channel_to(Replica(answer=Busy("the lane is full", 7.5))) as channel:
            with pytest.raises(Busy, match="the lane is full") as busy:
                await channel.call(IMAGES_NHWC, 1, [1.0], False)
            assert busy.value.retry_after_s == 7.5
        async with channel_to(Replica(answer=Expired("too late"))) as channel:
            with pytest.raises(Expired, match="too late"):
                await channel.call(IMAGES_NHWC, 1, [1.0], False)

    run(test())


def test_a_step_that_fails_is_one_call_s_and_tells_strangers_nothing_of_the_replica() -> None:
    async def test() -> None:
        replica = Replica(answer=RuntimeError("CUDA error at 0xdeadbeef"))
        async with channel_to(replica) as channel:
            with pytest.raises(PoolFailed, match="its replica says why") as failed:
                await channel.call(IMAGES_NHWC, 1, [1.0], False)
            assert "CUDA" not in str(failed.value)
            replica.answer = None
            await channel.call(IMAGES_NHWC, 1, [1.0], False)

    run(test())


def test_a_caller_that_leaves_takes_its_call_along_and_no_other() -> None:
    async def test() -> None:
        replica = Replica(free=False)
        async with channel_to(replica) as channel:
            first, second = (asyncio.create_task(channel.call(IMAGES_NHWC, 1, [9.0], False)) for _ in range(2))
            await until(lambda: len(replica.asked) == 2)
            first.cancel()
            await until(lambda: replica.left == 1)
            replica.free.set()
            await second
            await asyncio.wait([first])
            assert (first.cancelled(), replica.left, channel.under_way) == (True, 1, 0)

    run(test())


def test_calls_of_a_client_that_is_gone_are_scored_no_more() -> None:
    async def test() -> None:
        replica = Replica(free=False)
        async with channel_to(replica) as channel:
            call = asyncio.create_task(channel.call(IMAGES_NHWC, 1, [9.0], False))
            await until(lambda: len(replica.asked) == 1)
        with pytest.raises(ChannelLost):
            await call
        await until(lambda: replica.left == 1)

    run(test())


def test_a_replica_that_goes_answers_what_it_was_asked_and_takes_no_more() -> None:
    async def test() -> None:
        replica = Replica(free=False)
        address = await replica.open()
        channel, idle = await Channel.open(address), await Channel.open(address)
        call = asyncio.create_task(channel.call(IMAGES_NHWC, 1, [9.0], False))
        await until(lambda: len(replica.asked) == 1)

        closing = asyncio.create_task(replica.server.close())
        await until(lambda: not channel.usable)
        with pytest.raises(ChannelLost, match="replica a goes"):
            await channel.call(IMAGES_NHWC, 1, [9.0], False)
        with pytest.raises(ChannelLost, match="cannot connect"):
            await Channel.open(address)
        assert not closing.done()
        replica.free.set()

        assert (await call).scores.top_NK.tolist() == [[0], [45]]
        await closing
        assert (len(replica.asked), idle.usable) == (1, False)

    run(test())


def test_a_call_sent_as_the_replica_says_that_it_goes_is_answered() -> None:
    async def test() -> None:
        replica = Replica()
        channel = await Channel.open(await replica.open())
        await channel.call(IMAGES_NHWC, 1, [9.0], False)
        closing = asyncio.create_task(replica.server.close())
        await asyncio.sleep(0)  # it has said so, and the client has not read it
        assert channel.usable
        await channel.call(IMAGES_NHWC, 1, [9.0], False)
        await closing

    run(test())


def test_callers_are_told_where_the_connection_breaks() -> None:
    async def test() -> None:
        replica = Replica(free=False)
        channel = await Channel.open(await replica.open())
        calls = [asyncio.create_task(channel.call(IMAGES_NHWC, 1, [9.0], False)) for _ in range(2)]
        await until(lambda: len(replica.asked) == 2)
        for writer in list(replica.server._clients):
            writer.transport.abort()
        for call in calls:
            with pytest.raises(ChannelLost, match="replica a"):
                await call
        with pytest.raises(ChannelLost):
            await channel.call(IMAGES_NHWC, 1, [9.0], False)

    run(test())


@pytest.mark.parametrize(
    ("host", "uses_tls", "there"),
    [(HOST, "0", True), (HOST, "1", False), (HOST, "True", False), ("203.0.113.1", "0", False)],
    ids=["plain", "tls", "tls in words", "not this machine's"],
)
def test_a_replica_listens_where_ray_has_its_node_if_it_may(
    host: str, uses_tls: str, there: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: host)
    monkeypatch.setenv("RAY_USE_TLS", uses_tls)

    async def test() -> None:
        server = ChannelServer(Replica().score)
        address = await open_channels(server, "a")
        assert (address is not None) == there
        if address is not None:
            assert address.host == host
            await server.close()

    run(test())
    assert ("through Serve alone" in caplog.text) == (host != HOST)


async def answered(address: Address, greeting: bytes) -> bytes:
    """What a stranger gets who sends that greeting and a call."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    told = b'[{"call": {"top_k": 1, "within_s": [9], "details": false}}, {"images": ["|u1", [1, 1, 1, 3]]}]'
    writer.write(greeting + struct.pack("!QII", 1, len(told), 3) + told + b"abc")
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_none_is_heard_without_the_token() -> None:
    async def test() -> None:
        replica = Replica()
        address = await replica.open()
        for greeting in (b"", GREETING + bytes(TOKEN_BYTES), b"tandem-channel-0 " + address.token, address.token):
            assert await answered(address, greeting) == b""
        assert replica.asked == []
        assert (await Replica().open()).token != address.token

    run(test())


def test_strangers_that_say_nothing_are_few() -> None:
    async def test() -> None:
        address = await Replica().open()
        strangers = [await asyncio.open_connection(address.host, address.port) for _ in range(STRANGERS + 1)]
        assert await strangers[-1][0].read() == b""
        assert not any(reader.at_eof() for reader, _ in strangers[:-1])
        for _, writer in strangers:
            writer.close()
        for _, writer in strangers:
            await writer.wait_closed()
        channel = await Channel.open(address)
        await channel.call(IMAGES_NHWC, 1, [9.0], False)
        await channel.close()

    run(test())


def test_a_stranger_that_says_nothing_is_soon_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "GREETING_S", 0.1)

    async def test() -> None:
        address = await Replica().open()
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(GREETING)
        assert await reader.read() == b""
        writer.close()

    run(test())


HEADS = [
    struct.pack("!QII", 1, JSON_BYTES + 1, 0),
    struct.pack("!QII", 1, 2, ARRAY_BYTES + 1) + b"[]",
    struct.pack("!QII", 1, 6, 0) + b"[1, 2]",
    struct.pack("!QII", 1, 33, 8) + b'[{"call": {}}, {"a": ["O", [1]]}]' + bytes(8),
    struct.pack("!QII", 1, 37, 0) + b'[{"call": {}}, {"a": ["<f4", [9,9]]}]',
]


@pytest.mark.parametrize("sent", HEADS, ids=["text", "bytes", "json", "objects", "short"])
def test_what_is_no_frame_ends_its_channel_alone(sent: bytes) -> None:
    async def test() -> None:
        replica = Replica()
        address = await replica.open()
        channel = await Channel.open(address)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(GREETING + address.token + sent)
        assert await reader.read() == b""
        writer.close()
        await channel.call(IMAGES_NHWC, 1, [9.0], False)
        await channel.close()

    run(test())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_stop_a_replica(sent: bytes) -> None:
    async def test() -> None:
        replica = Replica()
        address = await replica.open()
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(GREETING + address.token + sent)
        writer.write_eof()
        await reader.read()
        writer.close()
        async with asyncio.timeout(5):
            channel = await Channel.open(address)
            await channel.call(IMAGES_NHWC, 1, [9.0], False)
            await channel.close()

    run(test())


def test_an_answer_that_is_none_ends_the_channel() -> None:
    async def test() -> None:
        ended = asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(len(GREETING) + TOKEN_BYTES)
            writer.write(struct.pack("!QII", 1, 8, 0) + b"[{}, {}]")
            await reader.read()
            writer.close()
            await writer.wait_closed()
            ended.set()

        server = await asyncio.start_server(answer, HOST, 0)
        channel = await Channel.open(Address("a", HOST, server.sockets[0].getsockname()[1], bytes(TOKEN_BYTES)))
        with pytest.raises(ChannelLost, match="no answer"):
            await channel.call(IMAGES_NHWC, 1, [9.0], False)
        assert not channel.usable
        await ended.wait()
        server.close()

    run(test())


class Pool:
    """Tells the addresses of its replicas, as Serve's router does: those first that were not asked the longest time."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = list(replicas)
        self.addresses: list[Address | None] = []
        self.looks = 0

    async def find(self) -> Address | None:
        self.looks += 1
        if not self.addresses:
            raise PoolFailed("no replica")
        self.addresses.append(self.addresses.pop(0))
        return self.addresses[-1]

    async def open(self) -> Channels:
        self.addresses = [await replica.open() for replica in self.replicas]
        return Channels(self.find)


async def lost(channels: Channels) -> None:
    with pytest.raises(ChannelLost):
        await channels.call(IMAGES_NHWC, 1, [9.0], False)


async def called(channels: Channels) -> str:
    return (await channels.call(IMAGES_NHWC, 1, [9.0], False)).replica


async def found(pool: Pool, channels: Channels) -> None:
    """Has the channels find all replicas of the pool."""
    await lost(channels)
    await until(lambda: len(channels._channels) == len(pool.addresses))


def test_the_first_call_is_serve_s_and_then_all_replicas_take_turns() -> None:
    async def test() -> None:
        pool = Pool(*map(Replica, "abc"))
        channels = await pool.open()
        await found(pool, channels)
        names = [await called(channels) for _ in range(9)]
        assert (sorted(names[:3]), names) == (["a", "b", "c"], names[:3] * 3)
        assert pool.looks == len("abc") + 1
        await channels.close()

    run(test())


def test_a_call_goes_where_the_fewest_are_under_way() -> None:
    async def test() -> None:
        busy, idle = Replica("busy", free=False), Replica("idle")
        pool = Pool(busy, idle)
        channels = await pool.open()
        await found(pool, channels)
        calls = [asyncio.create_task(called(channels)) for _ in range(2)]
        await until(lambda: len(busy.asked) == 1)
        assert [await called(channels) for _ in range(5)] == ["idle"] * 5
        busy.free.set()
        assert sorted(await asyncio.gather(*calls)) == ["busy", "idle"]
        await channels.close()

    run(test())


def test_new_replicas_are_found_while_calls_come_and_not_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.channels.pool.LOOK_EVERY_S", 0.05)

    async def test() -> None:
        pool = Pool(Replica("a"))
        channels = await pool.open()
        await found(pool, channels)
        await asyncio.sleep(0.2)
        assert pool.looks == 2, "a look would wake a pool that sleeps"
        pool.addresses[:0] = [await Replica(name).open() for name in "bcd"]
        names: set[str] = set()
        while names != {"a", "b", "c", "d"}:
            names.add(await called(channels))
            await asyncio.sleep(0.01)
        await channels.close()

    run(test())


def test_a_replica_that_is_lost_is_left_out_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.channels.pool.LOOK_EVERY_S", 0.05)

    async def test() -> None:
        first, second = Replica("a"), Replica("b")
        pool = Pool(first, second)
        channels = await pool.open()
        await found(pool, channels)
        for writer in list(first.server._clients):
            writer.transport.abort()
        await until(lambda: not channels._channels["a"].usable)
        assert await called(channels) == "b"
        while await called(channels) != "a":
            await asyncio.sleep(0.01)
        await channels.close()

    run(test())


@pytest.mark.parametrize("told", [None, Address("a", HOST, 1, b"")], ids=["no channel", "no way"])
def test_without_channels_calls_go_on_through_serve(told: Address | None, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        pool = Pool()
        channels = await pool.open()
        await lost(channels)  # no replica at all
        pool.addresses = [told]
        channels._look_s = 0.0
        await lost(channels)
        await until(lambda: channels._looking is not None and channels._looking.done())
        await lost(channels)
        await channels.close()

    run(test())
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (0 if told is None else 1)
    assert all("replica a is called through Serve, at a higher cost: cannot connect" in one for one in warnings)
