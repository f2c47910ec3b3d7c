# make quickstart   venv, requirements, source model, text, run, export, report
# make test         the whole suite
# make test-device  the kernels on the GPU or TPU that jax finds here
# make lint         ruff
# make docs         a page for each module, in out/api
# make kernels-aot  compiles for TPU and Hopper, and needs neither: the kernels,
#                   and training steps, whose memory it tells
# make clean        removes the virtual environments, never a run
PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt requirements-torch.txt requirements-edge.txt \
  requirements-eval.txt requirements-notebook.txt requirements-dev.txt
JOBS ?= 2
CONFIG ?= experiments/configs/smollm2_135m.py
RUN ?= runs/quickstart
OUT ?= out/$(notdir $(RUN))
FORMATS ?= hf,gguf-f16,gguf-q8_0
PY = $(VENV)/bin/python
# The compiler for Hopper comes with a jax that needs it.
PYTHON_CUDA ?= python3.13

.PHONY: quickstart test test-device lint docs kernels-aot clean

# Large pages for large arrays: a step on a CPU spends a tenth of its time on
# page faults without. Of no effect but with glibc.
quickstart test: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
quickstart: $(VENV)/.ready
	$(PY) -m experiments.main --workdir=$(RUN) --config=$(CONFIG)
	@if [ -e $(OUT)/pruning.json ]; then \
	  echo "kept:   $(OUT), which was exported before; delete it for another"; \
	else \
	  $(PY) -m experiments.export --workdir=$(RUN) --out=$(OUT) \
	    --formats=$(FORMATS); \
	fi
	$(PY) -m experiments.report --workdir=$(RUN)
	@echo "model:  $(OUT)  (its README.md says what opens it)"

test: $(VENV)/.ready
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Nothing is named: jax takes the best that it finds.
test-device: export JAX_PLATFORMS =
test-device: $(VENV)/.ready
	@$(PY) -c 'import jax; print("device:", jax.devices()[0].device_kind)'
	$(PY) -m pytest -n 0 -v tests/device_test.py

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

docs: $(VENV)/.ready
	$(PY) -m experiments.api --out=out/api

kernels-aot: .venv-tpu/.ready .venv-cuda/.ready
	.venv-tpu/bin/python -m experiments.aot_tpu
	.venv-tpu/bin/python -m experiments.aot_slice --device=v5e
	.venv-cuda/bin/python -m experiments.aot_hopper
	.venv-cuda/bin/python -m experiments.aot_steps
	.venv-cuda/bin/python -m experiments.aot_slice --device=h100

.venv-tpu/.ready: AOT_PYTHON = $(PYTHON)
.venv-tpu/.ready: AOT_WHEELS = 'jax[tpu]'
.venv-cuda/.ready: AOT_PYTHON = $(PYTHON_CUDA)
.venv-cuda/.ready: AOT_WHEELS = jax==0.12.0.1 jax-cuda13-plugin==0.12.0.1
.venv-tpu/.ready .venv-cuda/.ready:
	$(AOT_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
	  $(AOT_WHEELS) absl-py flax ml-collections optax rich
	@touch $@

clean:
	rm -rf $(VENV) .venv-* .pytest_cache .ruff_cache

$(VENV)/.ready: $(REQUIREMENTS)
	@rm -f $@
	$(PYTHON) -m venv $(VENV) || { echo "error: no venv; install the package" \
	  "python3-venv, or set PYTHON to another Python >= 3.11"; exit 2; }
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(PY) -m pip install --quiet --disable-pip-version-check \
	  $(foreach file,$(REQUIREMENTS),-r $(file))
	@touch $@
