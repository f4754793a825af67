# `make demo` trains and shows the language model, `make test` runs the tests,
# `make lint` checks the code, `make bench` times it, `make kernels` compiles the GPU
# kernels without a GPU. Each first sets up what it needs in a private .venv, at the
# versions of constraints.txt. PYTHON=python3.12 picks the interpreter; GPU=1 installs
# the CUDA 13 wheels as well.

PYTHON ?= python3
python := .venv/bin/python
comma := ,
cuda := $(if $(GPU),$(comma)cuda13)
# After `make kernels` there is CUDA without cuDNN, which jax need not report each time.
ifndef GPU
export JAX_SKIP_CUDA_CONSTRAINTS_CHECK := 1
endif

demo: .venv/.run$(cuda)
	$(python) -m models demo

# Neighbouring tests share what they compile, so they stay in one process.
test: .venv/.run,test$(cuda)
	$(python) -m pytest -n 2 --dist worksteal

lint: .venv/.run,lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/ty check
	.venv/bin/lint-imports

bench: .venv/.run$(cuda)
	$(python) -m benchmarks$(if $(GPU),.gpu, run)

kernels: .venv/.run,kernels
	$(python) -m benchmarks.compile

# A stamp is named for the extras that it says are installed.
.venv/.%: pyproject.toml constraints.txt | $(python)
	$(python) -m pip install -c constraints.txt -e ".[$*]"
	@touch $@

# pip comes from outside, so that no ensurepip is needed (Debian packages it apart).
$(python):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "attnx needs Python 3.11 or newer: name one with make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv --without-pip .venv \
	  && $(PYTHON) -m pip --python $(python) install --quiet -c constraints.txt pip \
	  || { rm -rf .venv; echo "No .venv: $(PYTHON) needs the venv module and pip" \
	       "(Debian, Ubuntu: apt install python3-venv python3-pip)." >&2; exit 1; }

.PHONY: demo test lint bench kernels
