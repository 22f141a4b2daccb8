# make serve   serve the built-in model on all GPUs, or on two CPU ranks (ARGS="--port 9000 ..." adds flags)
# make test    lint, types and all tests, with a table of the time they took
#
# Both make .venv first; PYTHON chooses the interpreter, TORCH the torch that is installed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --quiet --disable-pip-version-check
CARD_PY ?= $(if $(wildcard $(PY)),$(PY),$(PYTHON))

.PHONY: serve test format gpu-check model chaos lab lab-sixteen clean

serve: $(VENV)/serve.stamp
	@exec $(VENV)/bin/tpserve serve $$($(PY) -c "from tpserve.host.resources import visible_gpus as n; print('' if n() else '--nproc-per-node 2')") $(ARGS)

test: $(VENV)/test.stamp
	@$(PY) tests/run.py

format: $(VENV)/test.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# On a machine with a card; results as JSON and JUnit XML in $OUT (.tmp without it). Uses .venv when there is one.
gpu-check:
	$(CARD_PY) tests/run.py --gpu

# The built-in model anew, from nothing but the script that generates its text. The result is committed.
model: $(VENV)/test.stamp
	$(PY) -m tpserve.builtin.train

# Killing ranks and agents at random for a long time.
chaos: $(VENV)/test.stamp
	$(PY) -m pytest tests/crash -m long

# Every layout and every failure across the hosts of a lab (docs/clusters.md). Needs root; skipped, with the reason, elsewhere.
lab: $(VENV)/test.stamp
	@command -v ip bridge >/dev/null || apt-get install -y iproute2 || true
	$(PY) -m pytest tests/lab -m "not long" -rs

# Sixteen ranks on two hosts: slow on few cores.
lab-sixteen: $(VENV)/test.stamp
	@command -v ip bridge >/dev/null || apt-get install -y iproute2 || true
	$(PY) -m pytest tests/lab -m long -rs

clean:
	rm -rf $(VENV) .tmp build *.egg-info

$(PY):
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# torch first and alone: what comes later must not choose another one.
$(VENV)/torch.stamp: | $(PY)
	@echo "installing $(TORCH)"
	@begin=$$(date +%s) && $(PIP) install "$(TORCH)" && echo $$(($$(date +%s) - begin)) > $@

# Each stamp holds the seconds its installation took.
$(VENV)/serve.stamp: setup.py $(VENV)/torch.stamp
	@echo "installing tpserve"
	@begin=$$(date +%s) && $(PIP) install --editable . && echo $$(($$(date +%s) - begin)) > $@

$(VENV)/test.stamp: setup.py $(VENV)/torch.stamp
	@echo "installing tpserve and what its tests need"
	@begin=$$(date +%s) && $(PIP) install --editable ".[test]" && echo $$(($$(date +%s) - begin)) > $@
	@cp $@ $(VENV)/serve.stamp
