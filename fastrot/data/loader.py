"""plan -> bytes -> pixels, batches ahead of the step."""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray

from fastrot.data.ahead import begun, by_a_thread
from fastrot.data.bad_images import BadImages
from fastrot.data.corruptions import Corruptor
from fastrot.data.decode import Decoder
from fastrot.data.decode.batch import Batch
from fastrot.data.images import known
from fastrot.data.manifest import Manifest
from fastrot.data.plan import Plan, Sample, slice_of
from fastrot.data.storage import FileStorage, Reading
from fastrot.errors import BadImage, Fault

DECODES_IN_FLIGHT = 2  # one that decodes, one that waits for it: a decoder's threads never idle
_PLANNED_TOGETHER = 4096  # images, about: numpy's calls cost more than their work on a batch alone
_READ_AHEAD = 4  # batches whose bytes are being read before the decoder wants them
IN_FLIGHT = DECODES_IN_FLIGHT + _READ_AHEAD  # batches on their way to those that are ready

# (rows int64 [n], epochs int64 [n]) -> what a plan shows of them
Remake = Callable[[NDArray[np.int64], NDArray[np.int64]], Sample]


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
        """On `device`, without waiting for what it is doing where memory is pinned."""
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
    corruptor  damages the crops of training, not those of evaluation.
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
        corruptor: Corruptor | None = None,
    ):
        self.manifest, self.plan = manifest, plan
        self._corruptor = corruptor
        self._storage, self._decoder, self._bad = storage, decoder, bad
        self._device, self._depth, self._timeout = device, depth, timeout
        self._stage: Callable[[], str] = lambda: "starting"
        self._flows: WeakSet[Generator[tuple[_Request, torch.Tensor], None, None]] = WeakSet()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def train(
        self,
        steps: range,
        position: int,
        images: int,
        ranks: int,
        rank: int,
        micro_steps: int,
        size_at: Callable[[float], int],
    ) -> Generator[StepBatch, None, None]:
        """This rank's share of steps `steps`, the first of which begins at stream position `position`.

        images   a step, over all ranks; size_at(epoch) -> side of the crops.
        """
        n = len(self.manifest)
        starts = range(position, position + len(steps) * images, images)
        shares = [slice_of(images, ranks, micro_steps, micro_step, rank) for micro_step in range(micro_steps)]
        flow = self._flow(self._planned(starts, shares, size_at), self.plan.of, self._corruptor)
        for step, start in zip(steps, starts, strict=True):
            micro = (
                self._batch(request, pixels, images, last=number == micro_steps)
                for number, (request, pixels) in enumerate(islice(flow, micro_steps), 1)
            )
            yield StepBatch(step, start, start / n, micro)

    def _planned(
        self, starts: range, shares: list[tuple[int, int]], size_at: Callable[[float], int]
    ) -> Iterator[_Request]:
        """A request for each share of each step; steps begin at the stream positions `starts`."""
        of_step = np.concatenate([np.arange(first, last) for first, last in shares])
        ends = np.cumsum([last - first for first, last in shares]).tolist()
        together = max(1, _PLANNED_TOGETHER // len(of_step))
        for at in range(0, len(starts), together):
            some = starts[at : at + together]
            planned = self.plan.at_all((np.array(some)[:, None] + of_step).ravel())
            for nth, start in enumerate(some):
                step = planned.part(nth * len(of_step), (nth + 1) * len(of_step))
                for first, last in zip([0, *ends], ends, strict=False):
                    yield _Request(step.part(first, last), size_at(start / len(self.manifest)))

    def held_out(self, ranks: int, rank: int, images: int, short: int, crop: int) -> Generator[MicroBatch, None, None]:
        """This rank's contiguous share of all rows, in order, at most `images` a batch."""
        first, last = slice_of(len(self.manifest), ranks, 1, 0, rank)
        parts = (np.arange(at, min(at + images, last)) for at in range(first, last, images))
        return self.shown(parts, short, crop)

    def shown(self, parts: Iterable[NDArray[np.int64]], short: int, crop: int) -> Generator[MicroBatch, None, None]:
        """Given rows as evaluation shows them, a batch for each of `parts`, in order."""

        def show(rows: NDArray[np.int64], _epochs: NDArray[np.int64]) -> Sample:
            return self.plan.held_out(rows, short, crop)

        requests = (_Request(self.plan.held_out(rows, short, crop), crop) for rows in parts)
        for request, pixels in self._flow(requests, show):
            yield self._batch(request, pixels, len(self.manifest))

    def augmented(
        self, parts: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]], crop: int
    ) -> Generator[MicroBatch, None, None]:
        """Given (rows, epochs) as training shows them, a batch for each of `parts`, in order."""
        requests = (_Request(self.plan.of(rows, epochs), crop) for rows, epochs in parts)
        for request, pixels in self._flow(requests, self.plan.of, self._corruptor):
            yield self._batch(request, pixels, len(self.manifest))

    @property
    def bad_images(self) -> int:
        """Images that could not be read or decoded, and were replaced; over all ranks and resumes."""
        return self._bad.count

    def close(self) -> None:
        """End the threads, those of what is still iterated first: they use the decoder."""
        for flow in list(self._flows):
            flow.close()
        self._storage.close()
        self._decoder.close()
        if self._corruptor:
            self._corruptor.close()

    def _batch(self, request: _Request, pixels: torch.Tensor, images: int, last: bool = False) -> MicroBatch:
        sample = request.sample
        flips, turns = self._pinned(torch.from_numpy(sample.flips)), self._pinned(torch.from_numpy(sample.turns))
        return MicroBatch(
            pixels,
            flips,
            turns,
            sample,
            self.manifest.label[sample.rows],
            images * turns.shape[1],
            last,
        )

    def _flow(
        self, requests: Iterable[_Request], remake: Remake, corruptor: Corruptor | None = None
    ) -> Generator[tuple[_Request, torch.Tensor], None, None]:
        """Requests with their pixels, in order, by a thread that runs ahead."""
        reading = begun(((request, self._storage.start(request.sample.rows)) for request in requests), _READ_AHEAD)
        decoding = begun((self._submitted(request, started) for request, started in reading), DECODES_IN_FLIGHT - 1)
        decoded = (self._decoded(request, unread) for request, unread in decoding)
        sound = (self._mended(request, pixels, bad, remake) for request, pixels, bad in decoded)
        shown = ((request, self._moved(self._damaged(request.sample, pixels, corruptor))) for request, pixels in sound)
        flow = by_a_thread(shown, self._depth, self._timeout, lambda: self._stage(), self._choose_device)
        self._flows.add(flow)
        return flow

    def _choose_device(self) -> None:
        """A new thread starts on device 0."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _submitted(self, request: _Request, reading: Reading) -> tuple[_Request, dict[int, str]]:
        """The request, whose images the decoder has; and those that could not be read."""
        wanted = f"rows {request.sample.rows[:3].tolist()}... of {self.manifest.source}"
        self._stage = lambda: f"reading {wanted}, at {reading.at}"
        read = reading()
        unread = {at: str(buffer) for at, buffer in enumerate(read) if isinstance(buffer, BadImage)}
        good = [at for at, buffer in enumerate(read) if not isinstance(buffer, BadImage)]
        buffers = [buffer for buffer in read if not isinstance(buffer, BadImage)]
        rows, windows = request.sample.rows[good], request.sample.windows[good]
        self._decoder.submit(self._to_decode(buffers, rows, windows, request.size))
        return request, unread

    def _to_decode(
        self,
        buffers: list[NDArray[np.uint8]],
        rows: NDArray[np.int64],
        windows: NDArray[np.int32] | NDArray[np.float64],
        size: int,
    ) -> Batch:
        orientations = self.manifest.orientation[rows]
        if not orientations.all():  # a manifest of an older format
            orientations = np.array([known(int(o), b) for o, b in zip(orientations, buffers, strict=True)], np.uint8)
        return Batch(buffers, orientations, windows, size, self.manifest.coding[rows])

    def _decoded(self, request: _Request, unread: dict[int, str]) -> tuple[_Request, torch.Tensor, dict[int, str]]:
        """The request, pixels uint8 [n, size, size, 3], and the positions whose pixels are undefined, with the reason."""
        wanted = f"rows {request.sample.rows[:3].tolist()}... of {self.manifest.source}"
        self._stage = lambda: f"decoding {wanted}"
        decoded, failed = self._decoder.result()
        if not unread:
            return request, decoded, failed
        good = [at for at in range(len(request.sample)) if at not in unread]
        pixels = decoded.new_empty(len(request.sample), *decoded.shape[1:])
        pixels[good] = decoded
        return request, pixels, unread | {good[at]: reason for at, reason in failed.items()}

    def _mended(
        self, request: _Request, pixels: torch.Tensor, bad: dict[int, str], remake: Remake
    ) -> tuple[_Request, torch.Tensor]:
        """Bad images replaced."""
        for at, reason in sorted(bad.items()):
            request = self._replaced(request, at, reason, pixels, remake)
        return request, pixels

    def _damaged(self, sample: Sample, pixels: torch.Tensor, corruptor: Corruptor | None) -> torch.Tensor:
        if corruptor is None:
            return pixels
        with torch.cuda.stream(self._copies):  # where a GPU decoded: its default stream is busy with training
            return torch.from_numpy(corruptor(pixels.cpu().numpy(), sample.rows, sample.epochs))

    def _moved(self, pixels: torch.Tensor) -> torch.Tensor:
        """On the device: a CPU decoder's by a stream of its own, since torch's default one is busy with training."""
        if self._copies is None or pixels.is_cuda:
            return pixels
        with torch.cuda.stream(self._copies):
            moved = self._pinned(pixels).to(self._device, non_blocking=True)
        self._copies.record_event().synchronize()  # of this copy alone: torch's sync debug mode lets it pass
        moved.record_stream(torch.cuda.default_stream(self._device))
        return moved

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where a GPU will copy it, so that no copy waits for the host."""
        return tensor if self._copies is None else tensor.pin_memory()

    def _replaced(self, request: _Request, at: int, reason: str, pixels: torch.Tensor, remake: Remake) -> _Request:
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
                pixels[at] = self._decoder.one(self._to_decode([buffer], other.rows, other.windows, request.size))
            except BadImage as error:
                reason = str(error)
                continue
            return _Request(request.sample.replaced(at, other), request.size)
        raise Fault(f"{self.manifest.source}: no row can be read any more; the last: {reason}")
