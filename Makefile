# make quickstart   venv, requirements, source model, text, run, export, report
# make test         the whole suite
# make lint         ruff
# make clean        removes the virtual environments, never a run
PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt requirements-torch.txt requirements-dev.txt
JOBS ?= 2
CONFIG ?= experiments/configs/smollm2_135m.py
RUN ?= runs/quickstart
OUT ?= out/quickstart
PY = $(VENV)/bin/python

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.ready
	$(PY) -m experiments.main --workdir=$(RUN) --config=$(CONFIG)
	@[ -e $(OUT)/config.json ] || \
	  $(PY) -m experiments.export --workdir=$(RUN) --out=$(OUT)
	$(PY) -m experiments.report --workdir=$(RUN)
	@echo "model:  $(OUT)  (opens in transformers)"

test: $(VENV)/.ready
	$(PY) -m pytest -n $(JOBS) --dist loadfile

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

$(VENV)/.ready: $(REQUIREMENTS)
	@rm -f $@
	$(PYTHON) -m venv $(VENV) || { echo "error: no venv; install the package \
	  python3-venv, or set PYTHON to another Python >= 3.11"; exit 2; }
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(PY) -m pip install --quiet --disable-pip-version-check \
	  $(foreach file,$(REQUIREMENTS),-r $(file))
	@touch $@
