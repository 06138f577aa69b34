"""The ways to probe features that fastrot is measured against, and the features they are measured on."""

import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from fastrot.models.taps import SPECIFIED, TAPS


def features(rows: int, dims: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, dims] and int8 [rows, classes] of 1, 0 and -1: ReLU of 300 latent directions of falling strength."""
    rng = np.random.default_rng(seed)
    strength = (1 + np.arange(300)) ** -0.5
    hidden = (rng.standard_normal((rows, 300)) * strength).astype(np.float32)
    mixed = hidden @ rng.standard_normal((300, dims)).astype(np.float32) / np.linalg.norm(strength)
    x = np.maximum(mixed + 0.6 * rng.standard_normal((rows, dims)).astype(np.float32) - 0.3, 0)
    logits = hidden @ rng.standard_normal((300, classes))
    logits = logits / logits.std(0) + 0.7 * rng.standard_normal((rows, classes))
    shares = np.geomspace(0.04, 0.42, classes)  # VOC07's rarest class and its commonest
    y = logits > np.array([np.quantile(column, 1 - share) for column, share in zip(logits.T, shares, strict=True)])
    y = y.astype(np.int8)
    y[(y == 0) & (rng.random(y.shape) < 0.006)] = -1
    return x, y


def linear_svc(cost: float, **more) -> LinearSVC:
    """As the protocol's scripts set it; more may set the seed, or run it to convergence."""
    more = {"max_iter": 2000, "random_state": 0} | more
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0, **more)


def timed_fit(model: LinearSVC, x: np.ndarray, y: np.ndarray) -> tuple[float, bool]:
    """Seconds of a fit, and whether it stopped before it had converged."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConvergenceWarning)
        start = time.perf_counter()
        model.fit(x, y)
        seconds = time.perf_counter() - start
    return seconds, any(issubclass(w.category, ConvergenceWarning) for w in said)


def objective(w: np.ndarray, intercept: float, x: np.ndarray, y: np.ndarray, cost: float) -> float:
    """LIBLINEAR's: ½‖w‖² + ½b² + Σ Cᵢ max(0, 1 - yᵢ fᵢ)², positives at twice the cost."""
    short = np.maximum(0, 1 - y * (x @ w + intercept))
    return float(0.5 * (w @ w + intercept**2) + cost * np.where(y == 1, 2, 1) @ short**2)


def dino(bank, bank_y, queries, query_y, k, classes):
    """The loop of DINO's eval_knn.py: queries in 100 chunks against the whole bank; top-1 in percent."""
    bank, queries = (torch.nn.functional.normalize(torch.from_numpy(a), dim=1) for a in (bank, queries))
    bank_y, query_y = torch.from_numpy(bank_y), torch.from_numpy(query_y)
    right, chunk = 0, max(1, len(queries) // 100)
    for at in range(0, len(queries), chunk):
        cosine, rows = (queries[at : at + chunk] @ bank.T).topk(k)
        near = bank_y[rows]
        one_hot = torch.zeros(near.numel(), classes).scatter_(1, near.view(-1, 1), 1)
        scores = (one_hot.view(len(near), k, classes) * (cosine / 0.07).exp()[..., None]).sum(1)
        right += int((scores.argmax(1) == query_y[at : at + chunk]).sum())
    return 100 * right / len(queries)


def scikit_knn(bank, bank_y, queries, query_y, k):
    """Top-1 in percent by brute force; unit rows' cosine is 1 - d² / 2."""
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (bank, queries)]
    model = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
    return 100 * float((model.fit(unit[0], bank_y).predict(unit[1]) == query_y).mean())


class Pictures(Dataset):
    """The SVM protocol's pictures of some files: PIL and torchvision."""

    def __init__(self, paths: list[Path]):
        self._paths = paths
        normalise = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self._transform = T.Compose([T.Resize(256), T.Resize((224, 224)), T.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self._transform(Image.open(self._paths[row]).convert("RGB"))


def hooked_dump(model: torch.nn.Module, paths: list[Path], out: Path, workers: int) -> None:
    """The usual loop: a DataLoader, hooks on a torchvision ResNet, all rows in memory, np.save of each tap."""
    rows = {tap: [] for tap in TAPS}

    def keep(tap, pool):
        return lambda module, args, output: rows[tap].append(avg_pool2d(output, *pool).flatten(1).numpy())

    places = (model.relu, model.layer1, model.layer2, model.layer3, model.layer4)
    hooks = [place.register_forward_hook(keep(*how)) for place, *how in zip(places, TAPS, SPECIFIED, strict=True)]
    try:
        with torch.no_grad():
            for images in DataLoader(Pictures(paths), batch_size=64, num_workers=workers):
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    out.mkdir(parents=True, exist_ok=True)
    for tap, parts in rows.items():
        np.save(out / f"{tap}.npy", np.concatenate(parts))
