"""`import fastrot` as its users have it: the loader in a loop of their own, and what stands around it."""

import gc
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastrot
from conftest import ROOT, write_folder
from fastrot.data.storage import READERS
from workers import library, ranks

ROWS, SIDE = 12, 20


@pytest.fixture(scope="module")
def manifest(images):
    return fastrot.open(images)


def loader(manifest, images=5, **options):
    return fastrot.Loader(manifest, images, SIDE, seed=7, **options)


def take(one, steps):
    """So many steps, over the ends of epochs."""
    taken = []
    while len(taken) < steps:
        for batch in one:
            taken.append(batch)
            if len(taken) == steps:
                break
    return taken


def same(a, b):
    arrays = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("pixels", "labels", "flips", "turns"))
    return arrays and a.rows.tolist() == b.rows.tolist() and (a.step, a.epoch) == (b.step, b.epoch)


def system_threads():
    """Those of the decoder, which are no Python threads, too."""
    return len(os.listdir("/proc/self/task"))


def test_a_plain_loop_learns_colours(tmp_path):
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (tmp_path / name).mkdir()
        for at in range(8):
            Image.new("RGB", (40, 40), colour).save(tmp_path / name / f"{at}.jpg")

    manifest = fastrot.open(tmp_path)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with fastrot.Loader(manifest, images=4, crop=32, seed=0) as loader:
        while loader.epoch < 5:
            for batch in loader:
                loss = torch.nn.functional.cross_entropy(model(batch.normalised()), batch.labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        right = sum(int((model(b.normalised()).argmax(1) == b.labels).sum()) for b in loader.held_out())
    assert right == len(manifest) == 16


def test_every_row_comes_once_an_epoch_and_lengths_add_up(manifest):
    """12 rows in steps of 5: epochs of 3, 2, 2, 2 and 3 steps, since a step may straddle two."""
    with loader(manifest) as one:
        rows, lengths = [], []
        while one.epoch < 5:
            announced, steps = len(one), 0
            for batch in one:
                assert batch.epoch == batch.step * 5 / ROWS and one.position == 5 * (batch.step + 1)
                rows += batch.rows.tolist()
                steps += 1
            assert announced == steps
            lengths.append(steps)
    assert lengths == [3, 2, 3, 2, 2] and sum(lengths) == 5 * ROWS / 5
    assert Counter(rows) == dict.fromkeys(range(ROWS), 5)
    assert [sorted(rows[at : at + ROWS]) for at in range(0, 60, ROWS)] == [list(range(ROWS))] * 5


def test_batches_are_the_trainers(manifest):
    """The same rows, windows and turns as the plan, whose golden values are in the stream's tests."""
    from fastrot.data.order import FullOrder
    from fastrot.data.plan import Plan

    plan = Plan(7, manifest.height, manifest.width, FullOrder(ROWS, 7), "one")
    with loader(manifest, views="one", flip=1.0) as turned, loader(manifest, flip=1.0) as upright:
        for batch, plain in zip(take(turned, 4), take(upright, 4), strict=True):
            want = plan.at(5 * batch.step, 5 * batch.step + 5)
            np.testing.assert_array_equal(batch.rows, want.rows)
            np.testing.assert_array_equal(batch.turns, want.turns)
            np.testing.assert_array_equal(batch.labels, manifest.label[want.rows])
            assert torch.equal(batch.pixels, plain.pixels) and not plain.turns.any()
            mean, std = (torch.tensor(v)[:, None, None] * 255 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
            seen = (plain.pixels.flip(2).permute(0, 3, 1, 2).float() - mean) / std
            assert torch.allclose(plain.normalised(), seen, atol=1e-5)
            views = [torch.rot90(image, int(k), (1, 2)) for image, k in zip(seen, batch.turns[:, 0], strict=True)]
            assert torch.allclose(batch.normalised(), torch.stack(views), atol=1e-5)


def test_a_state_from_mid_epoch_goes_on_in_new_processes_at_another_number_of_ranks(images, manifest, tmp_path):
    with loader(manifest, views="one") as whole, loader(manifest, views="one") as one:
        want = take(whole, 7)[4:]
        take(one, 4)  # 20 images: in the second epoch
        state = one.state_dict()
    assert state["position"] == 20
    (tmp_path / "state.json").write_text(json.dumps(state))
    ranks.as_ranks(3, library.go_on, str(images), str(tmp_path / "state.json"), 5, 3, str(tmp_path))
    for batch in want:
        parts = [np.load(tmp_path / f"{rank}-{batch.step}.npz") for rank in range(3)]
        assert [len(part["rows"]) for part in parts] == [1, 2, 2]
        for name in ("pixels", "labels", "rows", "flips", "turns"):
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), getattr(batch, name))


def test_the_state_is_what_the_consumer_has_taken(manifest):
    """However much is read ahead; and a batch in hand is taken."""
    with loader(manifest) as one:
        steps = iter(one)
        assert one.state_dict()["position"] == 0
        next(steps)
        assert one.state_dict()["position"] == 5
        again = loader(manifest)
        again.load_state_dict(one.state_dict())
        assert same(next(steps), take(again, 1)[0])


def test_after_a_break_a_new_loop_goes_on(manifest):
    with loader(manifest) as whole, loader(manifest) as one:
        want = take(whole, 3)
        assert all(same(want[at], next(iter(one))) for at in range(3))


def test_loading_goes_back_and_refuses_another_stream(manifest):
    with loader(manifest) as one:
        first, *_ = take(one, 4)
        one.load_state_dict({"position": 0})
        assert same(first, take(one, 1)[0])
        for wrong in ({"seed": 8}, {"content": "another"}, {"position": -1}, {"position": "3"}):
            with pytest.raises(fastrot.UserError, match="the loader's state has"):
                one.load_state_dict(one.state_dict() | wrong)
        assert one.position == 5


def test_two_loaders_in_one_process_do_not_meet(manifest):
    with loader(manifest) as a, loader(manifest, views="all") as b, loader(manifest) as c:
        alone = take(c, 4)
        for one, other, want in zip(take(a, 4), take(b, 4), alone, strict=True):
            assert same(one, want) and torch.equal(one.pixels, other.pixels) and other.turns.shape == (5, 4)


def test_held_out_images_come_once_and_in_order_over_ranks(manifest):
    rows = []
    for rank in range(3):
        with loader(manifest, 5, rank=rank, ranks=3) as one:
            for batch in one.held_out():
                rows += batch.rows.tolist()
                assert len(batch) <= 2 and not batch.turns.any() and not batch.flips.any()
    assert rows == list(range(ROWS))


def test_a_bad_image_is_replaced_and_listed(tmp_path):
    manifest = fastrot.open(write_folder(tmp_path / "d", per_class=2))
    os.remove(manifest.path(2))
    listing = tmp_path / "bad.jsonl"
    with loader(manifest, 6, bad_images=listing) as one:
        (batch,) = take(one, 1)
        assert sorted(batch.rows.tolist()) == [0, 1, 3, 3, 4, 5] and one.bad_images == 1
    assert json.loads(listing.read_text())["row"] == 2
    for row in range(6):
        os.path.exists(manifest.path(row)) and os.remove(manifest.path(row))
    with loader(manifest, 6, max_bad=3) as one, pytest.raises(fastrot.Fault, match="max_bad 3"):
        take(one, 1)


def test_a_fault_loses_no_position(manifest, tmp_path):
    """What comes after it begins anew, where it stood."""
    manifest = fastrot.open(write_folder(tmp_path / "d"))
    with loader(manifest) as whole:
        want = take(whole, 1)
    away = [manifest.path(row) + b".away" for row in range(ROWS)]
    for row, path in enumerate(away):
        os.rename(manifest.path(row), path)
    with loader(manifest, max_bad=2) as one:
        with pytest.raises(fastrot.Fault):
            take(one, 1)
        for row, path in enumerate(away):
            os.rename(path, manifest.path(row))
        assert one.position == 0 and same(take(one, 1)[0], want[0])


@pytest.mark.parametrize("closed", [True, False], ids=["with", "dropped"])
def test_an_exception_of_the_consumer_leaves_no_thread(manifest, closed):
    take(loader(manifest), 1)
    gc.collect()
    before, system = set(threading.enumerate()), system_threads()

    def consume(one):
        for _ in one:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        if closed:
            with loader(manifest) as one:
                consume(one)
        else:
            consume(loader(manifest))
    gc.collect()
    assert [t for t in threading.enumerate() if t not in before and t.is_alive()] == []
    assert system_threads() <= system


@pytest.mark.parametrize("begun", [True, False])
def test_a_forked_child_says_so_in_a_line_or_works(manifest, begun):
    with loader(manifest) as one:
        if begun:
            take(one, 1)
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            code = 1
            try:
                said = str(len(take(one, 1)[0]))
                code = 0
            except fastrot.UserError as error:
                said, code = str(error), 2
            finally:
                os.write(writing, said.encode())
                one.close()
                os._exit(code)
        os.close(writing)
        said = os.read(reading, 1000).decode()
        os.close(reading)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert (code, said.partition(";")[0]) == (
            (2, f"this process was forked from process {os.getpid()}, whose threads fill the loader")
            if begun
            else (0, "5")
        )
        assert len(take(one, 2)) == 2  # the parent's goes on


@pytest.mark.slow
def test_two_thousand_batches_leave_memory_threads_and_files_as_they_were(manifest):
    def state():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 2**20, system_threads(), len(os.listdir("/proc/self/fd"))

    threads = system_threads() + 1 + READERS + len(os.sched_getaffinity(0)) + 1  # these start as they are needed
    with fastrot.Loader(manifest, 4, 64) as one:
        steps = (batch.step for _ in count() for batch in one)
        assert next(islice(steps, 499, None)) == 499
        memory, _, files = state()
        assert next(islice(steps, 1999, None)) == 2499
        after = state()
    assert after[1] <= threads and after[2] == files
    assert after[0] < memory + 16  # MiB; the batches were 94


@pytest.mark.slow
def test_a_script_without_a_main_guard_indexes_with_processes(images, tmp_path):
    """multiprocessing would run it again in each worker."""
    script = tmp_path / "train.py"
    script.write_text(
        "import fastrot\nfrom fastrot.data import scan\n"
        f"scan._MANY = 0\nprint('once')\nprint(len(fastrot.open({str(images)!r}, max_pixels=10**8)))\n"
    )
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "FASTROT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=os.environ | paths, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"once\n{ROWS}\n", "")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"crop": 4}, "data.crop is 4"),
        ({"flipp": 1.0}, "unknown key data.flipp; did you mean data.flip?"),
        ({"seed": -1}, "run.seed is -1"),
        ({"images": 0}, "optim.images_per_step is 0"),
        ({"views": "two"}, "rotation.views is 'two'"),
        ({"rank": 3, "ranks": 3}, "rank 3 of 3"),
        ({"images": 2, "ranks": 3}, "rank 0 of 3 with images=2"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "meta"}, "device 'meta'"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"train": "/elsewhere"}, "data.train"),
    ],
)
def test_what_cannot_be_is_one_line(manifest, options, line):
    with pytest.raises(fastrot.UserError) as refused:
        fastrot.Loader(manifest, **options)
    assert line in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_nothing_is_printed_and_no_flag_of_torch_changes(images, tmp_path, capfd, narrow):
    def flags():
        cudnn = torch.backends.cudnn
        return (
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), torch.get_num_threads(),
            cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, cudnn.allow_tf32, torch.get_default_dtype(),
            torch.distributed.is_initialized(), os.environ.get("RANK"),
        )  # fmt: skip

    before = flags()
    out = tmp_path / "run"
    done = fastrot.pretrain(
        None,
        **{"data.train": str(images), "data.crop": 32, "model.arch": "resnet18", "optim.images_per_step": 4}
        | {"engine.kind": "plain", "run.out": str(out), "run.max_steps": 2, "run.tensorboard": False},
    )
    assert done["steps"] == 2 and json.loads((out / "STATUS.json").read_text())["state"] == "done"
    take(loader(fastrot.open(images)), 2)
    assert capfd.readouterr() == ("", "") and flags() == before


def test_what_pretrain_cannot_train_is_one_line():
    with pytest.raises(fastrot.UserError, match="argument: unknown key optim.lrr; did you mean optim.lr?"):
        fastrot.pretrain(None, **{"optim.lrr": 1})
    with pytest.raises(fastrot.UserError, match="is a config of fastrot linear"):
        fastrot.pretrain(ROOT / "configs" / "linear_in1k.yaml")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(fastrot.UserError, match="this process has one"):
            fastrot.pretrain()
    finally:
        torch.distributed.destroy_process_group()


def test_a_backbone_is_read_and_looked_through(tmp_path, manifest, narrow):
    import torchvision
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=2)
    save_file(model.state_dict(), tmp_path / "r18.safetensors")
    backbone = fastrot.load_backbone(tmp_path / "r18.safetensors")
    assert not backbone.training and isinstance(backbone.fc, torch.nn.Identity)
    found = fastrot.extract(backbone, manifest, ["feature5", "avg"], "gap", crop=64)
    assert {name: x.shape for name, x in found.items()} == {"feature5": (ROWS, 64), "avg": (ROWS, 64)}
    with fastrot.Loader(manifest, 4, 64) as one:
        want = torch.cat([backbone(batch.normalised()) for batch in one.held_out()])
    np.testing.assert_allclose(found["avg"], want.numpy(), rtol=1e-4, atol=1e-5)
    for wrong in ({"taps": ["layer4"]}, {"pool": "max"}, {"transform": "train"}):
        with pytest.raises(fastrot.UserError):
            fastrot.extract(backbone, manifest, **wrong)
    with pytest.raises(fastrot.UserError, match="no such file"):
        fastrot.load_backbone(tmp_path / "none.pth")


def test_the_probes_are_the_packages():
    from fastrot.probes import lowshot, neighbours, svm

    assert fastrot.probes.voc_svm is svm.voc_svm
    assert fastrot.probes.low_shot is lowshot.low_shot
    assert fastrot.probes.knn is neighbours.knn


def test_an_import_is_light():
    """No torch, no numpy, no pydantic; well within 50 ms, which is counted in modules, not by a clock."""
    code = (
        "import sys; before = set(sys.modules); import fastrot; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before})); "
        "print(len(set(sys.modules) - before)); "
        "assert {'Loader', 'open', 'probes'} <= set(dir(fastrot)); "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    assert done.returncode == 0, done.stderr
    names, count = done.stdout.splitlines()
    assert int(count) < 60 and "fastrot" in names


def test_every_public_name_is_there_and_described():
    for name in fastrot.__all__:
        assert getattr(fastrot, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'loader'"):
        fastrot.loader  # noqa: B018
