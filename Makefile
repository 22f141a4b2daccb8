# `make` alone prints what there is. All of it makes .venv first, with launch/make_venv.sh.

ARGS ?=
SUITE ?=
PYTHON ?=
TORCH ?=
MATRIX ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CARD_PY ?= $(if $(wildcard $(PY)),$(PY),$(or $(PYTHON),python3))

.PHONY: help serve check test test-clients test-page format native kernels sanitize gpu-check matrix model card chaos simulation schemas fuzz-structured lab lab-sixteen clean

help:
	@echo "make serve        serve the built-in model on all GPUs, or on two CPU ranks; ARGS=\"--port 9000\" adds flags"
	@echo "make check        lint, types and the unit tests: three minutes"
	@echo "make test         all tests, with a table of the time they took: 25 minutes on two cores"
	@echo "make test-clients openai, anthropic, LiteLLM, lm-eval, schemathesis, Prometheus and others against a server (docs/clients.md)"
	@echo "make test-page    the page at / in headless Chromium; skipped where there is none"
	@echo "make format       put the sources in order"
	@echo "make native       build the library of CPU kernels anew, with the compiler's warnings as errors"
	@echo "make sanitize     the tests of the CPU kernels under the address and undefined behaviour sanitizers"
	@echo "make gpu-check    the tests that need a GPU"
	@echo "make matrix       the bare and the parity tests on other versions of Python and torch: MATRIX=\"3.12=2.14.1 3.13=2.14.1\""
	@echo "make clean        remove .venv and what was built"
	@echo "make model, card, chaos, simulation, schemas, fuzz-structured, lab, lab-sixteen: see CONTRIBUTING.md"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter of .venv, TORCH=torch==2.12.0 the torch that is installed."

serve: $(VENV)/serve.stamp kernels
	@exec $(VENV)/bin/tpserve serve $$($(PY) -c "from tpserve.host.resources import visible_gpus as n; print('' if n() else '--nproc-per-node 2')") $(ARGS)

check: $(VENV)/test.stamp kernels
	@$(PY) tests/run.py lint unit rules

test: $(VENV)/test.stamp kernels
	@$(PY) tests/run.py

# The clients have an environment of their own, in .tmp/clients; OpenTelemetry's SDK, which the server imports, lies in .tmp/otel.
test-clients: $(VENV)/test.stamp kernels
	@test -x .tmp/clients/bin/python || $(PY) -m venv .tmp/clients
	@.tmp/clients/bin/python -m pip --disable-pip-version-check install -q pytest openai anthropic langchain-openai litellm \
		"pydantic-ai-slim[openai]" "lm_eval[api]" schemathesis opentelemetry-proto
	@test -d .tmp/otel || $(PIP) install -q --target .tmp/otel opentelemetry-sdk opentelemetry-exporter-otlp-proto-http
	@$(PY) tests/clients/run.py .tmp/clients/bin/python .tmp/otel

test-page: $(VENV)/test.stamp kernels
	@$(PY) -m pytest tests/browser -q -rs -o addopts="--strict-markers --tb=short"

format: $(VENV)/test.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

native: $(VENV)/torch.stamp
	@$(PY) kernels/build_cpu.py

# After the installation, which builds the library too: only what has changed since, and a line when there is none.
kernels: $(VENV)/torch.stamp
	@$(PY) kernels/build_cpu.py --optional

# libasan comes first in the process, as it must. Python's own leaks are not looked for.
sanitize: $(VENV)/test.stamp
	@$(PY) kernels/build_cpu.py --sanitize .tmp/sanitized.so
	@LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 TPSERVE_CPU_LIBRARY=$(CURDIR)/.tmp/sanitized.so \
		$(PY) -m pytest tests/kernels/test_cpu_*.py

# Results as JSON and JUnit XML in $OUT (.tmp without it). Uses .venv when there is one.
gpu-check:
	$(CARD_PY) tests/run.py --gpu

# An environment for each pair PYTHON=TORCH, in .tmp/matrix.
matrix: $(VENV)/test.stamp
	@$(PY) tests/matrix.py $(MATRIX)

# Simulated cards in several ranks, and every kernel compiled for three generations of cards: minutes a model.
card: $(VENV)/test.stamp
	$(PY) -m pytest tests/card -m long -rs

# The built-in model anew, from nothing but the script that generates its text. The result is committed.
model: $(VENV)/test.stamp
	$(PY) -m tpserve.builtin.train

# Killing, stopping and crashing processes at random for half an hour each, on one host and across the hosts of a lab.
chaos: $(VENV)/test.stamp
	$(PY) -m pytest tests/crash tests/lab/test_chaos_across_hosts.py -m long -rs

# The whole service on a simulated clock under random faults: COUNT schedules (100000) from SEED (0); SIZE=1024 COUNT=100 for many ranks.
simulation: $(VENV)/test.stamp
	$(PY) -m tests.simulation.schedule --seed $(or $(SEED),0) --count $(or $(COUNT),100000) $(if $(SIZE),--size $(SIZE))

# A directory of JSON schemas with valid and invalid instances: no invalid one is in the language of a grammar (docs/serving.md).
schemas: $(VENV)/test.stamp
	@test -n "$(SUITE)" || { echo "SUITE=DIR names the directory, such as tests/draft2020-12 of JSON-Schema-Test-Suite"; exit 2; }
	@$(PY) -m tests.schemas $(SUITE) $(ARGS)

# Random requests with structured output at four layouts, alone and in a crowd: COUNT of them (1000) from SEED (0). Half an hour on two cores.
fuzz-structured: $(VENV)/test.stamp
	$(PY) -m pytest tests/cluster/test_structured_fuzz.py -m long -s

# Every layout and every failure across the hosts of a lab (docs/clusters.md). Needs root; skipped, with the reason, elsewhere.
lab: $(VENV)/test.stamp
	@command -v ip bridge >/dev/null || apt-get install -y iproute2 || true
	$(PY) -m pytest tests/lab -m "not long" -rs

# Sixteen ranks on two hosts: slow on few cores.
lab-sixteen: $(VENV)/test.stamp
	@command -v ip bridge >/dev/null || apt-get install -y iproute2 || true
	$(PY) -m pytest tests/lab -m long -rs --ignore tests/lab/test_chaos_across_hosts.py

clean:
	rm -rf $(VENV) .tmp build *.egg-info kernels/tpserve_kernels/*.so

# Each stamp holds the seconds that its installation took. torch comes first and alone: what follows must not choose another one.
$(VENV)/torch.stamp:
	@begin=$$(date +%s) && PYTHON="$(PYTHON)" TORCH="$(TORCH)" launch/make_venv.sh $(VENV) && echo $$(($$(date +%s) - begin)) > $@

$(VENV)/serve.stamp: setup.py $(VENV)/torch.stamp
	@echo "installing tpserve"
	@begin=$$(date +%s) && $(PIP) install --editable . && echo $$(($$(date +%s) - begin)) > $@

$(VENV)/test.stamp: setup.py $(VENV)/torch.stamp
	@echo "installing tpserve and what its tests need"
	@begin=$$(date +%s) && $(PIP) install --editable ".[test]" && echo $$(($$(date +%s) - begin)) > $@
	@cp $@ $(VENV)/serve.stamp
