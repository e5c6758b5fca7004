"""A TCP link to a server on this machine on which every answer takes some time longer."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

CHUNK_BYTES = 1 << 18
MOST_UNDER_WAY = 256
"""Chunks on the link at a time: as much as is sent within the delay at over a GB per second."""


@dataclass(kw_only=True, slots=True)
class SlowLink:
    """A link that is open."""

    url: str
    target: str
    delay_seconds: float
    num_shard_reads: int = 0
    """GET requests for the file of a shard so far."""

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on to the target."""
        address = urlsplit(self.target)
        there = await asyncio.open_connection(address.hostname, address.port)
        try:
            await asyncio.gather(self._requests(reader, there[1]), self._answers(there[0], writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # one side hung up
        finally:
            there[1].close()
            writer.close()

    async def _requests(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(CHUNK_BYTES):
            line = data.partition(b"\r\n")[0]
            self.num_shard_reads += line.startswith(b"GET ") and b"/shards/" in line
            sink.write(data)
            await sink.drain()
        sink.write_eof()

    async def _answers(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        clock = asyncio.get_running_loop().time
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MOST_UNDER_WAY)

        async def deliver() -> None:
            while True:
                due, data = await under_way.get()
                await asyncio.sleep(due - clock())
                if not data:
                    return
                sink.write(data)
                await sink.drain()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(deliver())
            while data := await source.read(CHUNK_BYTES):
                await under_way.put((clock() + self.delay_seconds, data))
            await under_way.put((clock(), b""))


@contextmanager
def slow_link(target: str, *, delay_seconds: float) -> Iterator[SlowLink]:
    """Open a link to the server at the URL `target` until the block ends."""
    link = SlowLink(url="", target=target, delay_seconds=delay_seconds)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(link.connect, "127.0.0.1", 0))
    link.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield link
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
