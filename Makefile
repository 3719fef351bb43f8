# `make demo`, `make test` and `make check` set up .venv by themselves; the second time it is found ready.

SHELL := bash
.SHELLFLAGS := -eo pipefail -c
.DEFAULT_GOAL := test
.PHONY: demo test contracts check venv clean

PYTHONS := python3.11 python3.12 python3
CONSTRAINTS := requirements/constraints.txt
OLDER_FLASHINFER := 0.6.11.post1
SUITABLE := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
# The indexes that pip is set up with are nobody's business in a log.
PIP := .venv/bin/python -m pip --disable-pip-version-check -qq
HIDE_HOSTS := 2>&1 | sed -E "s,https?://[^/ ]+,<index>,g; s,host='[^']*',host=<index>,g"

demo: .venv/ready
	.venv/bin/rollmill demo

test: export OMP_NUM_THREADS := 1
test: .venv/ready contracts
	.venv/bin/pytest -n 2 -q

# What `make test` says of the installed FlashInfer, said of an older one, which has other signatures.
contracts: export OMP_NUM_THREADS := 1
contracts: export PYTHONPATH := .venv/flashinfer-$(OLDER_FLASHINFER)
contracts: .venv/ready .venv/flashinfer-$(OLDER_FLASHINFER)
	.venv/bin/pytest -n 2 -q tests/flashinfer_contracts tests/kernel_models_tests

.venv/flashinfer-$(OLDER_FLASHINFER): .venv/ready
	@$(PIP) install --no-deps --target $@ flashinfer-python==$(OLDER_FLASHINFER) $(HIDE_HOSTS)

check: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/basedpyright
	.venv/bin/pytest -q tests/test_import_order.py

venv: .venv/ready

# torch goes first and pinned: the newest one would pull gigabytes of CUDA libraries. FlashInfer comes without its
# dependencies: reading its signatures, checks and tables on a CPU takes two of them, of which it would pull gigabytes.
.venv/ready: pyproject.toml setup.py $(CONSTRAINTS)
	@echo "setting up .venv (some minutes the first time)"
	@if ! .venv/bin/python -c "$(SUITABLE)" 2>/dev/null; then \
	    found=""; \
	    for python in $(PYTHONS); do \
	        if "$$python" -c "$(SUITABLE)" 2>/dev/null; then found="$$python"; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then echo "rollmill needs Python 3.11 or 3.12 with its venv module" >&2; exit 1; fi; \
	    "$$found" -m venv --clear .venv; \
	fi
	@$(PIP) install --constraint $(CONSTRAINTS) torch setuptools $(HIDE_HOSTS)
	@$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[test,dev,demo,dit]' $(HIDE_HOSTS)
	@$(PIP) install --constraint $(CONSTRAINTS) --no-deps flashinfer-python apache-tvm-ffi nvidia-ml-py $(HIDE_HOSTS)
	@touch $@

clean:
	rm -rf build dist *.egg-info demo-output .pytest_cache .ruff_cache .hypothesis
	find engine moe quant weight_sync tests -name __pycache__ -type d -prune -exec rm -rf {} +
