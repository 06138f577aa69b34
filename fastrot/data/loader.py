"""plan -> bytes -> pixels, batches ahead of the step."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from fastrot.data.bad_images import BadImages
from fastrot.data.decode import Decoder
from fastrot.data.manifest import Manifest
from fastrot.data.plan import Plan, Sample, slice_of
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage, Fault

DECODES_IN_FLIGHT = 2  # one that decodes, one that waits for it: a decoder's threads never idle
_PRODUCER_ENDS_S = 1.0  # a producer stuck in a read is a daemon; the exit does not wait for it
_PLANNED_TOGETHER = 1024  # images, about: numpy's calls cost more than their work on a batch alone
_READ_AHEAD = 4  # batches whose bytes are being read before the decoder wants them


@dataclass(frozen=True)
class MicroBatch:
    """What one rank trains on at once.

    pixels uint8 [n, S, S, 3] upright crops; flips uint8 [n]; turns uint8 [n, V].
    sample the plan's side of it, replaced images included; labels of the manifest, int64 [n] or int8 [n, 20].
    views_of_step  views of the whole step over all ranks: what a sum of losses is divided by.
    last           whether it ends its step; every rank has as many micro-steps.
    """

    pixels: torch.Tensor
    flips: torch.Tensor
    turns: torch.Tensor
    sample: Sample
    labels: NDArray[np.int64] | NDArray[np.int8]
    views_of_step: int
    last: bool = False

    def to(self, device: torch.device) -> "MicroBatch":
        """On `device`, copied beside what it is doing where the pixels are pinned."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("pixels", "flips", "turns")}
        return replace(self, **moved)


@dataclass(frozen=True)
class StepBatch:
    """One step: its stream position and this rank's micro-steps, decoded as they are iterated."""

    step: int
    position: int
    epoch: float
    micro_steps: Iterator[MicroBatch]


@dataclass(frozen=True)
class _Request:
    sample: Sample
    size: int


class Loader:
    """The images of one manifest under one plan, read, decoded and brought to the device.

    depth      batches decoded ahead; timeout: seconds without one after which a Fault is raised.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        storage: FileStorage,
        decoder: Decoder,
        bad: BadImages,
        device: torch.device,
        depth: int,
        timeout: float,
    ):
        self.manifest, self.plan = manifest, plan
        self._storage, self._decoder, self._bad = storage, decoder, bad
        self._device, self._depth, self._timeout = device, depth, timeout
        self._stage = "starting"

    def train(
        self,
        steps: range,
        position: int,
        images: int,
        ranks: int,
        rank: int,
        micro_steps: int,
        size_at: Callable[[float], int],
    ) -> Iterator[StepBatch]:
        """This rank's share of steps `steps`, the first of which begins at stream position `position`.

        images   a step, over all ranks; size_at(epoch) -> side of the crops.
        """
        n = len(self.manifest)
        starts = range(position, position + len(steps) * images, images)

        shares = [slice_of(images, ranks, micro_steps, micro_step, rank) for micro_step in range(micro_steps)]
        of_step = np.concatenate([np.arange(first, last) for first, last in shares])
        ends = np.cumsum([last - first for first, last in shares]).tolist()

        def requests():
            together = max(1, _PLANNED_TOGETHER // len(of_step))
            for at in range(0, len(starts), together):
                some = starts[at : at + together]
                planned = self.plan.at_all((np.array(some)[:, None] + of_step).ravel())
                for nth, start in enumerate(some):
                    step = planned.part(nth * len(of_step), (nth + 1) * len(of_step))
                    for first, last in zip([0, *ends], ends, strict=False):
                        yield _Request(step.part(first, last), size_at(start / n))

        flow = self._flow(requests(), self.plan.of)
        for step, start in zip(steps, starts, strict=True):
            yield StepBatch(
                step,
                start,
                start / n,
                (
                    self._batch(request, pixels, images, last=number == micro_steps)
                    for number, (request, pixels) in enumerate(islice(flow, micro_steps), 1)
                ),
            )

    def held_out(self, ranks: int, rank: int, images: int, short: int, crop: int) -> Iterator[MicroBatch]:
        """This rank's contiguous share of all rows, in order, at most `images` a batch."""
        first, last = slice_of(len(self.manifest), ranks, 1, 0, rank)
        parts = (np.arange(at, min(at + images, last)) for at in range(first, last, images))
        return self.shown(parts, short, crop)

    def shown(self, parts: Iterable[NDArray[np.int64]], short: int, crop: int) -> Iterator[MicroBatch]:
        """Given rows as evaluation shows them, a batch for each of `parts`, in order."""

        def show(rows, _epochs=None):
            return self.plan.held_out(rows, short, crop)

        requests = (_Request(show(rows), crop) for rows in parts)
        for request, pixels in self._flow(requests, show):
            yield self._batch(request, pixels, len(self.manifest))

    def augmented(
        self, parts: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]], crop: int
    ) -> Iterator[MicroBatch]:
        """Given (rows, epochs) as training shows them, a batch for each of `parts`, in order."""
        requests = (_Request(self.plan.of(rows, epochs), crop) for rows, epochs in parts)
        for request, pixels in self._flow(requests, self.plan.of):
            yield self._batch(request, pixels, len(self.manifest))

    @property
    def bad_images(self) -> int:
        """Images that could not be read or decoded, and were replaced; over all ranks and resumes."""
        return self._bad.count

    def close(self) -> None:
        self._storage.close()
        self._decoder.close()

    def _batch(self, request: _Request, pixels: torch.Tensor, images: int, last: bool = False) -> MicroBatch:
        sample = request.sample
        flips, turns = torch.from_numpy(sample.flips), torch.from_numpy(sample.turns)
        return MicroBatch(
            pixels,
            flips,
            turns,
            sample,
            self.manifest.label[sample.rows],
            images * turns.shape[1],
            last,
        )

    def _flow(self, requests: Iterable[_Request], remake: Callable) -> Iterator[tuple[_Request, torch.Tensor]]:
        """Requests with their pixels, in order, produced by a thread that runs ahead."""
        ready: queue.Queue = queue.Queue(self._depth)
        stop = threading.Event()

        def put(item) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                if self._device.type == "cuda":  # a new thread starts on device 0
                    torch.cuda.set_device(self._device)
                for item in self._decoded(requests, remake):
                    put(item)
                    if stop.is_set():
                        return
                put(None)
            except BaseException as error:  # carried to the consumer, which raises it
                put(error)

        producer = threading.Thread(target=produce, name="loader", daemon=True)
        producer.start()
        try:
            while True:
                try:
                    item = ready.get(timeout=self._timeout)
                except queue.Empty:
                    raise Fault(
                        f"no batch for data.timeout {self._timeout:g} s: the loader was {self._stage}"
                    ) from None
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            producer.join(timeout=_PRODUCER_ENDS_S)

    def _decoded(self, requests, remake) -> Iterator[tuple[_Request, torch.Tensor]]:
        ahead: deque[tuple[_Request, Callable]] = deque()
        flying: deque[tuple[_Request, dict[int, str]]] = deque()
        for request in requests:
            ahead.append((request, self._storage.start(request.sample.rows)))
            if len(ahead) > _READ_AHEAD:
                yield from self._submit(*ahead.popleft(), flying, remake)
        while ahead:
            yield from self._submit(*ahead.popleft(), flying, remake)
        while flying:
            yield self._collect(flying, remake)

    def _submit(self, request, finish_reading, flying, remake):
        self._stage = f"reading rows {request.sample.rows[:3].tolist()}... of {self.manifest.source}"
        read = finish_reading()
        unread = {at: str(b) for at, b in enumerate(read) if isinstance(b, BadImage)}
        good = [at for at in range(len(read)) if at not in unread]
        self._decoder.submit([read[at] for at in good], request.sample.windows[good], request.size)
        flying.append((request, unread))
        if len(flying) >= DECODES_IN_FLIGHT:
            yield self._collect(flying, remake)

    def _collect(self, flying, remake):
        request, bad = flying.popleft()
        self._stage = f"decoding rows {request.sample.rows[:3].tolist()}... of {self.manifest.source}"
        decoded, failed = self._decoder.result()
        if not bad and not failed:
            return request, self._staged(decoded)
        n = len(request.sample)
        good = [at for at in range(n) if at not in bad]
        pixels = decoded.new_empty(n, *decoded.shape[1:])
        pixels[good] = decoded
        bad |= {good[at]: reason for at, reason in failed.items()}
        for at, reason in sorted(bad.items()):
            request = self._replaced(request, at, reason, pixels, remake)
        return request, self._staged(pixels)

    def _replaced(self, request: _Request, at: int, reason: str, pixels: torch.Tensor, remake) -> _Request:
        """The request with image `at` replaced by the next sound row in manifest order, with that
        row's own window, flip, turn and label of the epoch; its pixels written into `pixels`."""
        row, epoch = int(request.sample.rows[at]), request.sample.epochs[at : at + 1]
        for _ in range(len(self.manifest)):
            self._bad.add(self.manifest.name(row), row, reason)
            row = (row + 1) % len(self.manifest)
            other = remake(np.array([row]), epoch)
            (buffer,) = self._storage.read(other.rows)
            try:
                if isinstance(buffer, BadImage):
                    raise buffer
                pixels[at] = self._decoder.one(buffer, other.windows, request.size)
            except BadImage as error:
                reason = str(error)
                continue
            return _Request(request.sample.replaced(at, other), request.size)
        raise Fault(f"{self.manifest.source}: no row can be read any more; the last: {reason}")

    def _staged(self, pixels: torch.Tensor) -> torch.Tensor:
        """Host pixels pinned where a GPU will copy them, so that the copy runs beside the step."""
        return pixels.pin_memory() if self._device.type == "cuda" and not pixels.is_cuda else pixels
