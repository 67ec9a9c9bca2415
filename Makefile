PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# threads that wait leave the cores to others sooner, and freed memory is kept for the next step (benchmarks.busy)
GENTLE := GOMP_SPINCOUNT=1500 MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000

.PHONY: demo swap diffusion test test-all test-versions kernels lint prose docs dist bench bench-gpu clean

# the main job on real images: trains a classifier of digits in large canvases, about 5 minutes on 2 CPU cores
demo: $(STAMP)
	$(GENTLE) $(BIN)/python examples/image_classification.py $(ARGS)

# routed attention in a real pretrained ViT, quality and speed; a quarter hour on 2 CPU cores
swap: $(STAMP)
	$(GENTLE) $(BIN)/python examples/swap_pretrained_vit.py $(ARGS)

# routed attention in a real diffusion network, quality and speed, routers trained; ten minutes on 2 CPU cores
diffusion: $(STAMP)
	$(GENTLE) $(BIN)/python examples/distill_diffusion.py $(ARGS)

# n processes with a thread each beat one process with n threads, and threads of several processes fight
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)
	$(if $(ARGS),,$(MAKE) kernels)

# and what is left out there for time: more cases of kinds that it shows, see tests/support/marks.py
test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "exhaustive or not exhaustive"
	$(MAKE) kernels

# the Triton kernels on the CPU, by Triton's interpreter: it must be asked for before Triton is imported
kernels: $(STAMP)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels

# all tests on the oldest torch and on the newest, each in an environment of its own; ARGS: --smoke,
# --only 2.11, and what pytest takes, such as tests/ops
test-versions:
	.ci/versions $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# words a sentence in README and docs, against their limits
prose: $(STAMP)
	$(BIN)/python -m tests.support.prose $(ARGS)

# the pages and the API reference as a site, in build/site; a warning is an error
docs: $(STAMP)
	$(BIN)/python docs/gather.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# a wheel made of the source distribution, its metadata checked, imported from an environment of its own
dist: $(STAMP)
	rm -rf dist build/clean
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m venv --without-pip build/clean
	$(BIN)/python -m pip --python build/clean install --quiet --no-deps --no-index dist/*.whl
	cd build/clean && PYTHONPATH=$$($(CURDIR)/$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		bin/python -c 'import colt5_vision as c, colt5_vision.models, colt5_vision.pipelines; c.RoutedAttentionConfig().least_tokens(64); print(c.__version__, c.__file__)'

# beside its peers, speed and memory: ten minutes on two quiet cores, then the layer of Stable Diffusion; ARGS=--quick: a minute
bench: $(STAMP)
	$(GENTLE) $(BIN)/python -m benchmarks.cpu $(ARGS)
	$(GENTLE) $(BIN)/python -m benchmarks.diffusion

$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e ".[train,viz,examples,bench,test,dev,docs]"
	touch $@

# needs a GPU; eight minutes
bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) .venvs runs build *.egg-info
