# make demo: set up, draw the embedded scenes, train on them.   make test: set up, check, run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

.PHONY: setup demo demo-control test suite test-all fuzz chaos gpu check docs figures lock clean

setup: $(VENV)/.ready

# g++ and ninja compile DeepSpeed's host collectives, cc and libjpeg-turbo's header the turbo decoder
# (once, kept in the cache), libturbojpeg turns JPEGs without loss; apt only where it may. Bytecode once here: else a
# process in a place that may not write it compiles all of torch, 8 s of 11.
$(VENV)/.ready: requirements.txt requirements-ffcv.txt setup.py tools/install_ffcv.sh
	@{ command -v g++ && echo '#include <stdio.h>\n#include <jpeglib.h>' | g++ -E - && ldconfig -p | grep -F libturbojpeg.so.0; } >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ libjpeg-dev libturbojpeg0; } \
	  || echo "setup: g++, jpeglib.h or libturbojpeg is missing; without a GPU DeepSpeed needs g++ (engine.kind=plain does not), data.decode=turbo both; JPEGs are turned without loss by libturbojpeg0"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { [ "$$(id -u)" = 0 ] && apt-get update -qq \
	  && apt-get install -y -qq --no-install-recommends python3-venv && $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.txt
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	tools/install_ffcv.sh $(BIN)/python
	$(BIN)/fastrot warmup
	@touch $@
	@echo 'set up. To go on: source $(VENV)/bin/activate; fastrot --help'

demo: setup
	$(BIN)/fastrot demo-data --out runs/demo-data
	rm -rf runs/demo
	$(BIN)/deepspeed fastrot/train.py --config configs/demo.yaml
	@echo 'The run is in runs/demo. To go on: source $(VENV)/bin/activate; fastrot train --config configs/photos10.yaml data.train=YOUR/FOLDER'

# the control: the same run on shuffled labels; held-out accuracy must stay at chance
demo-control: setup
	$(BIN)/fastrot demo-data --out runs/demo-data
	rm -rf runs/demo-control
	$(BIN)/deepspeed fastrot/train.py --config configs/demo.yaml rotation.shuffle_labels=true run.out=runs/demo-control

# two processes, a core each: most of the time goes into one thread of Python, and two cores are what everybody has.
# Bytecode is written even where the machine says not to: tests start fastrot again and again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

# the checks run beside the tests, whose processes wait for one another now and then
test: setup
	$(MAKE) --no-print-directory -j2 check suite

suite: setup
	$(PYTEST)

test-all: check
	$(PYTEST) -m "slow or not slow"

# every parser of a user's bytes, on RUNS inputs that coverage leads to; PARSER: some of them by name. The C ones need clang and
# its compiler-rt (apt-get install clang libclang-rt-14-dev), the others atheris, which lies beside and is no dependency
ATHERIS := build/fuzz/lib
RUNS ?= 1000000
SECONDS ?= 0
fuzz: setup
	@test -d $(ATHERIS) || $(BIN)/uv pip install -q --python $(BIN)/python --target $(ATHERIS) --only-binary :all: atheris==3.0.0
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(BIN)/python tests/fuzz $(PARSER) --runs $(RUNS) --seconds $(SECONDS)

# two hundred kills, signals and broken disks, half an hour on a busy core; needs the right to mount
chaos: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos --kills 200 --seed 1

# every test and figure of a GPU machine, into results/
gpu: setup
	$(BIN)/fastrot selfcheck --gpu

# do the documents say what bench/results says? tools/figures.py --write makes them
figures: setup
	$(BIN)/python tools/figures.py

# style, layers, types, the documents' links, and lines of code by room against the budget in tools/lines.py
check: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/hadolint docs/Dockerfile
	$(BIN)/mypy
	$(BIN)/python tools/lines.py
	$(BIN)/python tools/figures.py

# build/docs/index.html: a dead link or a missing page fails; asks the network for nothing
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock:
	$(BIN)/uv pip compile -q --generate-hashes --universal --python-version 3.11 --no-header --no-annotate requirements.in -o requirements.txt

clean:
	rm -rf $(VENV) runs build *.egg-info
