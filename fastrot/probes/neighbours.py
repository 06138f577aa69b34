"""Weighted k-nearest-neighbour classification, exact, block by block: bank and queries may exceed memory."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from fastrot.errors import UserError
from fastrot.probes.progress import Track, silent

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
_BANK_ROWS, _QUERY_ROWS = 8192, 4096  # of a block: 128 MiB of similarities


def neighbours(
    bank: NDArray[np.generic],
    queries: NDArray[np.generic],
    k: int,
    device: torch.device | str = "cpu",
    track: Track = silent,
) -> tuple[Tensor, Tensor]:
    """The k bank rows of highest cosine for each query, best first: cosines float32 [m, k], rows int64 [m, k].

    bank, queries  [n, D], [m, D] of a real dtype, memory-mapped or not; each bank row is read once.
    Rows of equal cosine come in any order. An all-zero row has cosine 0 with all others.
    """
    best = torch.full((len(queries), k), -torch.inf), torch.zeros((len(queries), k), dtype=torch.int64)
    for first in track(range(0, len(bank), _BANK_ROWS), -(-len(bank) // _BANK_ROWS), "bank blocks"):
        keys = _unit_rows(bank, first, _BANK_ROWS, device)
        for at in range(0, len(queries), _QUERY_ROWS):
            cosine = _unit_rows(queries, at, _QUERY_ROWS, device) @ keys.T
            cosine, row = cosine.topk(min(k, len(keys)), dim=1)
            here = slice(at, at + _QUERY_ROWS)
            both = [
                torch.cat(pair, 1)
                for pair in zip((a[here] for a in best), (cosine.cpu(), row.cpu() + first), strict=True)
            ]
            top = both[0].topk(k, dim=1)
            best[0][here], best[1][here] = top.values, both[1].gather(1, top.indices)
    return best


def _unit_rows(x: NDArray[np.generic], first: int, count: int, device: torch.device | str) -> Tensor:
    return normalize(torch.from_numpy(np.array(x[first : first + count], np.float32)).to(device), dim=1)


def votes(cosines: Tensor, labels: Tensor, classes: int, temperature: float = TEMPERATURE) -> Tensor:
    """Sum over neighbours of exp(cosine / temperature) for each class, float64 [m, classes].

    cosines [m, k]; labels int64 [m, k] of the neighbours.
    """
    scores = torch.zeros(len(cosines), classes, dtype=torch.float64)
    return scores.scatter_add_(1, labels, (cosines.double() / temperature).exp())


def ranks(
    bank_x: NDArray[np.generic],
    bank_y: NDArray[np.integer],
    query_x: NDArray[np.generic],
    query_y: NDArray[np.integer],
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
    track: Track = silent,
) -> NDArray[np.int64]:
    """Place of each query's own class among the classes by votes, from 0, int64 [len(ks), m].

    As in `knn`; a class without a vote comes last.
    """
    bank_y, query_y = np.array(bank_y, np.int64), np.array(query_y, np.int64)
    for name, y in (("bank", bank_y), ("queries", query_y)):
        if not len(y) or y.min() < 0:
            raise UserError(
                f"k-NN: {int((y < 0).sum()):,} of {len(y):,} rows of the {name} have no label; leave them out"
            )
    if max(ks) > len(bank_y):
        raise UserError(f"k-NN: k = {max(ks)} needs as many rows, the bank has {len(bank_y):,}; give a smaller k")
    classes = int(max(bank_y.max(), query_y.max())) + 1
    cosines, rows = neighbours(bank_x, query_x, max(ks), device, track)
    labels = torch.from_numpy(bank_y)[rows]
    out = np.empty((len(ks), len(query_y)), np.int64)
    for at in range(0, len(query_y), _QUERY_ROWS):
        here = slice(at, at + _QUERY_ROWS)
        truth = torch.from_numpy(query_y[here])[:, None]
        for i, k in enumerate(ks):
            scores = votes(cosines[here, :k], labels[here, :k], classes, temperature)
            own = scores.gather(1, truth)
            before = (scores > own) | ((scores == own) & (torch.arange(classes) < truth))
            out[i, here] = torch.where(own[:, 0] > 0, before.sum(1), classes).numpy()
    return out


def knn(
    bank_x: NDArray[np.generic],
    bank_y: NDArray[np.integer],
    query_x: NDArray[np.generic],
    query_y: NDArray[np.integer],
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
    track: Track = silent,
) -> dict[int, tuple[float, float]]:
    """{k: (top-1, top-5)} in percent; the votes of DINO's evaluation.

    bank_x, query_x  [n, D], [m, D], memory-mapped or not. bank_y, query_y  int [n], [m], from 0.
    A class without a vote is never predicted; of equal votes the lower class comes first.
    Raises UserError where a label is missing (-1) or the bank has fewer than max(ks) rows.
    Source  DINO's eval_knn.py; MMSelfSup 0.11, tools/benchmarks/classification/knn_imagenet.
    """
    found = ranks(bank_x, bank_y, query_x, query_y, ks, temperature, device, track)
    return {k: (100 * float((one < 1).mean()), 100 * float((one < 5).mean())) for k, one in zip(ks, found, strict=True)}
