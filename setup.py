"""Installs fastrot and its kernels: `pip install -e .`; dependencies are pinned in requirements.txt."""

from setuptools import find_packages, setup

setup(
    name="fastrot",
    version="0.1.0",
    description="Pretrain ResNets by predicting image rotations, fast and exactly",
    python_requires=">=3.11",
    packages=find_packages(include=["fastrot*"]) + find_packages("kernels"),
    package_data={
        "fastrot.report": ["template.html"],
        "fastrot.selfcheck": ["template.html"],
        "fastrot_kernels": ["*/*.c", "*/*.h", "*/*.cu"],
    },
    package_dir={"fastrot_kernels": "kernels/fastrot_kernels"},
    entry_points={"console_scripts": ["fastrot = fastrot.cli:entry"]},
)
