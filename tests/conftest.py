"""What tests share: small image folders, and running fastrot as a user does."""

import fcntl
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

worker = os.environ.get("PYTEST_XDIST_WORKER")


def _take_a_core(number: int) -> None:
    """Each process of tests has a core of its own, and so have the processes that it starts: threads of two training runs
    on the same cores wait for one another's, and oneDNN's in torch 2.11 overrun the narrow network's buffers."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


if worker:  # before torch counts them
    _take_a_core(int(worker.removeprefix("gw")))


def pytest_configure(config):
    if not worker and not config.getoption("numprocesses", None):  # whoever only hands tests out keeps all of them
        _take_a_core(0)


ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
TRACES = "FASTROT_TEST_TRACES"  # names the folder of workers.traced


_NEED_CUDA = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)  # what is slow has been taken out
def pytest_collection_modifyitems(config, items):
    """Tests that need CUDA are collected where there is CUDA; --collect-only lists them everywhere.

    Those that look at the launched run of two ranks come first, and so in one process: another would wait for it.
    """
    import torch

    items.sort(key=lambda item: "two" not in getattr(item, "fixturenames", ()))
    if torch.cuda.is_available() or config.option.collectonly:
        return
    absent = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=absent)
    config.stash[_NEED_CUDA] = len(absent)
    if hasattr(config, "workeroutput"):  # a process of pytest-xdist's
        config.workeroutput["need_cuda"] = len(absent)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Every process of pytest-xdist's collects all tests: any one's count is the run's."""
    node.config.stash[_NEED_CUDA] = getattr(node, "workeroutput", {}).get("need_cuda", 0)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported lives to the end: the collector need not walk through all of torch again and again."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter, config):
    """What did not run and why, a line each kind."""
    if absent := config.stash.get(_NEED_CUDA, 0):
        terminalreporter.write_line(f"{absent} tests need CUDA and were not collected")
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped"))
    if reasons:
        said = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"{reasons.total()} tests were skipped, of them {said}")


def draw(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth RGB image with texture: gradients and a few soft blobs, so that resizing is well behaved."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
    return Image.fromarray((127 + 90 * np.stack(waves, -1)).clip(0, 255).astype(np.uint8))


def write_folder(root: Path, classes: int = 3, per_class: int = 4, side: int = 48) -> Path:
    """A folder of class folders with JPEGs of varied size."""
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            seed = label * per_class + i
            draw(side + 5 * (seed % 4), side + 7 * (seed % 3), seed).save(folder / f"{i}.jpg", quality=90)
    return root


def write_shards(folder, out) -> None:
    """Two shards of a folder's images in row order, labels beside them."""
    rows = [(label, path) for label, name in enumerate(sorted(folder.iterdir())) for path in sorted(name.iterdir())]
    for number, part in enumerate((rows[:5], rows[5:])):
        with tarfile.open(out / f"shard-{number}.tar", "w") as shard:
            for at, (label, path) in enumerate(part):
                for kind, data in (("jpg", path.read_bytes()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number}{at:03}.{kind}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))


def runnable_decoders(among: Iterable[str] | None = None) -> list[str]:
    """Names of the decoders, by default of all, that can run on this machine's CPU: tests' parameters."""
    import torch

    from fastrot.data.decode import DECODERS, make_decoder
    from fastrot.errors import UserError

    names = []
    for name in among or DECODERS:
        try:
            make_decoder(name, "cpu", torch.device("cpu"), 1, 1, 1)[0].close()
        except UserError as missing:
            print(f"not tested here: {missing}")
        else:
            names.append(name)
    return names


DALI_RESIZES = "dali, which resizes"  # as on a GPU; on a CPU with a compiler turbo does


def cpu_decoder(name: str):
    """A decoder of runnable_decoders(), or DALI_RESIZES, on the CPU: two threads, two batches of 64 in flight."""
    import torch

    from fastrot.data.decode import make_decoder

    if name == DALI_RESIZES:
        from fastrot.data.decode.dali import DaliDecoder

        return DaliDecoder(None, 2, 64, 2)
    return make_decoder(name, "cpu", torch.device("cpu"), 2, 64, 2)[0]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory, made_once):
    """Manifests of tests go to a folder of their own; compiled operators stay in the user's cache."""
    from fastrot import machine

    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(machine.compiled_folder("torch_extensions")))
    os.environ["FASTROT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ[TRACES] = str(made_once("traces", lambda folder: None))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): a folder that `make(folder)` fills once for all of pytest-xdist's processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if worker else root

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def images(made_once) -> Path:
    return made_once("images", write_folder)


@pytest.fixture(scope="module")
def narrow():
    """For a module's tests model.arch=resnet18 is a small network: what is tested is not the network."""
    import torchvision

    from workers.narrow import NarrowResNet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet18", NarrowResNet)
        yield


@pytest.fixture(scope="session")
def traced_once():
    from workers import traced

    with pytest.MonkeyPatch.context() as patch:
        traced.turn_on(Path(os.environ[TRACES]), patch.setattr)
        yield


@pytest.fixture(scope="session")
def shared_data():
    """A function that gives a real data set's folder, or skips with the reason."""

    def find(name: str) -> Path:
        if not (SHARED / name).is_dir():
            pytest.skip(f"real images {name} are not beside this checkout")
        return SHARED / name

    return find


@pytest.fixture
def fastrot(capfd, monkeypatch, traced_once):
    """A function that runs a command in this process, as the console script does."""
    from fastrot import distributed
    from fastrot.cli import main
    from fastrot.errors import Fault

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # each process group wraps it once more

    def call(*words) -> Done:
        capfd.readouterr()
        try:
            code = main([str(w) for w in words])
        except SystemExit as end:  # argparse's own refusals
            code = end.code
        if code == Fault.exit_code:  # it leaves the other ranks, and with them the process
            distributed.end()
        said = capfd.readouterr()
        return Done(code, said.out, said.err)

    return call


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("fastrot: ")]


def after(monkeypatch, steps: int, happens: Callable[[], object]) -> None:
    """Let something happen once a run in this process has done so many steps."""
    from fastrot.runs.log import RunLog

    tick, done = RunLog.tick, []

    def ticked(log):
        tick(log)
        done.append(1)
        if len(done) == steps:
            happens()

    monkeypatch.setattr(RunLog, "tick", ticked)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(launcher: str, ranks: int, *words, script: str = "fastrot/train.py") -> subprocess.Popen:
    """Start `fastrot/train.py`, or another script, under a launcher, in a process group of its own, output kept."""
    launch = {
        "deepspeed": ["deepspeed", "--num_accelerators", str(ranks), "--master_port", free_port()],
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node", str(ranks)],
        "python": [sys.executable],
    }[launcher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [*launch, script, *map(str, words)],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def launched(launcher: str, ranks: int, *words, script: str = "fastrot/train.py") -> tuple[int, str]:
    """Run to the end: (exit code, all output)."""
    process = launch(launcher, ranks, *words, script=script)
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = "timed out\n" + process.communicate()[0]
    return process.returncode, output


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
