# `make demo` and `make test` need a Python from 3.11 on and nothing else.  The environment lies in .venv.

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11 python,$(if \
	$(shell $(p) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(p))))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= --preset demo
TORCH ?= 2.13.0
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast lint docs lock image-lock licences sbom audit clean

help:
	@echo 'make install    the environment, in .venv; the others make it by themselves'
	@echo 'make demo       the whole line on the embedded pictures, up to an endpoint; Ctrl-C ends it'
	@echo 'make test       all tests'
	@echo 'make test-fast  the tests that need no Ray, MLflow or Prefect'
	@echo 'make lint       what the tests do not see'
	@echo 'make docs       docs/reference from the code'
	@echo 'make lock       new requirements.lock from pyproject.toml'
	@echo 'make image-lock  sha256 of what the image is made of, from requirements.lock'
	@echo 'make licences   that every locked package has a licence it may have; and infra/NOTICE anew'
	@echo 'make sbom       the bill of materials of requirements.lock, CycloneDX, into sbom.cdx.json'
	@echo 'make audit      what is known of vulnerabilities in requirements.lock; wants a network'
	@echo 'make clean      remove the environment and caches; models and data in .diffusion stay'

$(READY): requirements.lock pyproject.toml
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer is needed, and none was found: install one, or say where it is' \
		'with `make PYTHON=/path/to/python3`' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed, and' \
		"$(PYTHON) is $$($(PYTHON) --version 2>&1): say where one is with \`make PYTHON=/path/to/python3\`" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) lacks venv: install it (Debian: apt install" \
		'python3-venv)' >&2; exit 1; }
	@echo 'Making the environment in $(VENV) (once; some minutes where nothing is cached)'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

install: $(READY)

demo: $(READY)
	@$(BIN)/diffusion run $(DEMO)

test: $(READY)
	@$(BIN)/python -m pytest $(TWO)

test-fast: $(READY)
	@$(BIN)/python -m pytest $(TWO) -m 'not slow'

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# Commands, recipe, presets, site and HTTP, as the code has them; a test holds what is committed against it.
docs: $(READY)
	@$(BIN)/python docs/reference/write.py

# Exact versions of a fresh environment, without what belongs to one machine: torch's build (+cpu, +cu126) and the
# CUDA packages that come with it, which pip adds by itself where they are needed.
lock:
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder" && \
	echo 'torch==$(TORCH)' > "$$folder/wanted.txt" && \
	$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		o = p["optional-dependencies"]; print("\n".join(p["dependencies"] + o["text"] + o["test"]))' >> "$$folder/wanted.txt" && \
	"$$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$$folder/wanted.txt" && \
	"$$folder/bin/python" -m pip freeze | sed -E '/^(nvidia-|cuda-|triton==)/d; s/\+(cpu|cu[0-9]+|rocm[0-9.]+)$$//' \
		> requirements.lock.new && mv requirements.lock.new requirements.lock && wc -l requirements.lock

# sha256 of what goes into the image, at the versions of requirements.lock.
image-lock:
	@$(PYTHON) infra/requirements/lock.py

licences: $(READY)
	@$(BIN)/python -m infra.requirements.licences --write

sbom: $(READY)
	@$(BIN)/python -m infra.requirements.bom > sbom.cdx.json.new && mv sbom.cdx.json.new sbom.cdx.json && wc -c sbom.cdx.json

# Exit code 3 where nothing could be asked.
audit:
	@$(PYTHON) infra/requirements/audit.py

clean:
	rm -rf $(VENV) .audit sbom.cdx.json *.egg-info build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
