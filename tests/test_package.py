"""The package: what it says it needs is what it imports, what is missing is named, a wheel holds all files."""

import ast
import re
import runpy
import subprocess
import sys
import zipfile

import pytest
import setuptools

import fastrot
from conftest import ROOT
from fastrot.errors import EXTRAS

# packages whose module has another name, or which torch brings on Linux
_PACKAGE_OF = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "mlflow": "mlflow-skinny",
    "nvidia": "nvidia-dali-cuda130",
    "pydantic_core": "pydantic",
    "triton": "torch",
    "yaml": "pyyaml",
}
_CARRIED = {".c", ".h", ".cu", ".html", ".typed"}


@pytest.fixture(scope="module")
def said():
    """What setup.py tells setuptools."""
    told = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **words: told.update(words))
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return told


def names(requirements):
    return {re.split(r"[<>=;\s]", one)[0] for one in requirements}


def imported():
    """{top module: files that import it} of all that the package imports beside itself and the standard library."""
    found = {}
    for path in [*(ROOT / "fastrot").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in modules:
                found.setdefault(module.partition(".")[0], set()).add(path.name)
    own = {"fastrot", "fastrot_kernels", *sys.stdlib_module_names}
    return {module: files for module, files in found.items() if module not in own}


def test_every_import_is_a_dependency_of_the_core_or_of_the_extra_that_is_named(said):
    core, extras = names(said["install_requires"]), {e: names(r) for e, r in said["extras_require"].items()}
    modules = imported()
    assert len(modules) > 10
    for module, files in modules.items():
        package = _PACKAGE_OF.get(module, module)
        if package not in core:
            assert module in EXTRAS and package in extras[EXTRAS[module][1]], (module, files)
    by_others = {"tensorboard", "ffcv", "onnx", "onnxscript"}  # torch imports them, but for the second: ctypes loads it
    assert EXTRAS.keys() - modules.keys() == by_others
    together = ("dali", "deepspeed", "detect", "onnx", "orient", "report")
    assert extras["all"] == set().union(*(extras[name] for name in together))


def test_ranges_hold_what_make_setup_pins(said):
    from packaging.requirements import Requirement

    pinned = dict(
        re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text().replace("ml-dtypes", "ml_dtypes"), re.MULTILINE)
    )  # fmt: skip
    unpinned = ("ffcv", "gs", "mlflow", "s3", "wandb")
    extras = [r for name, some in said["extras_require"].items() if name not in unpinned for r in some]
    for line in (*said["install_requires"], *extras):
        wanted = Requirement(line)
        version = pinned.get(wanted.name) or pinned[wanted.name.lower()]
        assert wanted.specifier.contains(version), (line, version)


def test_the_version_is_in_one_place(said):
    assert said["version"] == fastrot.__version__
    assert f"\nversion: {fastrot.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture
def without(monkeypatch):
    """A function that takes a package away, and what of ours has imported it."""

    def take(module, *importers):
        for name in [one for one in sys.modules if one == module or one.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)
        for one in importers:
            monkeypatch.delitem(sys.modules, one, raising=False)

    return take


def test_deepspeed_missing_is_one_line(fastrot, images, tmp_path, without, narrow):
    without("deepspeed")
    words = [f"data.train={images}", f"run.out={tmp_path / 'run'}", "model.arch=resnet18", "data.crop=32"]
    done = fastrot("train", *words, "optim.images_per_step=4")
    assert done.code == 2 and done.errors == [
        "fastrot: engine.kind deepspeed: DeepSpeed is not installed; pip install 'fastrot[deepspeed]', or set engine.kind=plain"
    ]


def test_tensorboard_missing_is_said_and_the_run_goes_on(fastrot, images, tmp_path, without, narrow):
    without("tensorboard", "torch.utils.tensorboard")
    words = [f"data.train={images}", f"run.out={tmp_path / 'run'}", "model.arch=resnet18", "data.crop=32"]
    done = fastrot("train", *words, "optim.images_per_step=4", "run.max_steps=1", "engine.kind=plain")
    assert done.code == 0 and not (tmp_path / "run" / "tensorboard").exists()
    assert "no TensorBoard events: TensorBoard is not installed; pip install 'fastrot[report]'" in done.err


@pytest.mark.parametrize("decode, module, name", [("dali", "nvidia.dali", "DALI"), ("ffcv", "ffcv", "FFCV")])
def test_a_decoders_package_missing_is_one_line(images, without, monkeypatch, decode, module, name):
    without(module, f"fastrot.data.decode.{decode}")
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with (
        fastrot.Loader(fastrot.open(images), 4, 32, decode=decode) as loader,
        pytest.raises(fastrot.UserError, match=rf"decode {decode}: {name} is not installed; pip .*fastrot\[{decode}\]"),
    ):
        next(iter(loader))


@pytest.mark.parametrize(
    "module, importer, words, name, extra",
    [
        ("scipy", "fastrot.report.significance", ["page", "--checkpoint", "c", "--suite", "s", "--out", "o"], "SciPy", "report"),
        ("pycocotools", "fastrot.data.objects", ["detect", "--random-init", "0"], "pycocotools", "detect"),
        ("cv2", "fastrot.data.whole_masks", ["segment", "--random-init", "0"], "OpenCV", "detect"),
    ],
)  # fmt: skip
def test_a_commands_package_missing_is_one_line(fastrot, without, module, importer, words, name, extra):
    ours = [one for one in sys.modules if one.startswith(("fastrot.report", "fastrot.runs", "fastrot.tasks.detect"))]
    without(module, importer, "fastrot.data.whole_objects", *ours)
    done = fastrot(*words)
    assert (done.code, done.errors) == (
        2, [f"fastrot: {words[0]}: {name} is not installed; pip install 'fastrot[{extra}]'"]
    )  # fmt: skip


def test_torch_missing_is_one_line(fastrot, images, without):
    without("torch", *[one for one in sys.modules if one.startswith("fastrot.orient")])
    done = fastrot("orient", images, "--checkpoint", "runs/a")
    assert (done.code, done.errors) == (
        2, ["fastrot: orient: torch is not installed; pip install fastrot brings it (fastrot orient runs an .onnx file without)"]
    )  # fmt: skip


@pytest.mark.slow
def test_a_wheel_carries_every_file_that_is_not_python(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("fastrot-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = [path.relative_to(ROOT) for room in ("fastrot", "kernels") for path in (ROOT / room).rglob("*")]
    wanted = {str(path).removeprefix("kernels/") for path in ours if path.suffix in _CARRIED | {".py"}}
    assert wanted <= inside and wheel.name == f"fastrot-{fastrot.__version__}-py3-none-any.whl"
    assert {"LICENSE", "NOTICE"} <= {name.rpartition("/")[2] for name in inside}
