"""Iterators whose work is begun before it is wanted."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from fastrot.errors import Fault

_ENDS_S = 1.0  # a producer stuck in a read is a daemon; the exit does not wait for it
_LOOKS_S = 0.1  # how often a producer that waits for room looks whether it is still wanted

T = TypeVar("T")


def begun(items: Iterable[T], ahead: int) -> Iterator[T]:
    """The same items, each after `ahead` more were drawn: what drawing one began is under way meanwhile."""
    drawn: deque[T] = deque()
    for item in items:
        drawn.append(item)
        if len(drawn) > ahead:
            yield drawn.popleft()
    yield from drawn


def by_a_thread(
    items: Iterable[T], depth: int, timeout: float, stage: Callable[[], str], prepare: Callable[[], None]
) -> Generator[T, None, None]:
    """The same items, drawn by a thread that runs at most `depth` ahead; what it raises is raised here.

    prepare  called first, in the thread.
    Raises Fault, which names `stage()`, where none comes within `timeout` seconds.
    """
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: "T | _End") -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=_LOOKS_S)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            prepare()
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(_End(None))
        except BaseException as error:  # carried to the consumer, which raises it
            put(_End(error))

    producer = threading.Thread(target=produce, name="loader", daemon=True)
    producer.start()
    try:
        while True:
            try:
                item = ready.get(timeout=timeout)
            except queue.Empty:
                raise Fault(f"no batch for data.timeout {timeout:g} s: the loader was {stage()}") from None
            if not isinstance(item, _End):
                yield item
            elif item.error:
                raise item.error
            else:
                return
    finally:
        stop.set()
        producer.join(timeout=_ENDS_S)


class _End:
    """No more items; error: why, where something was raised."""

    def __init__(self, error: BaseException | None):
        self.error = error
