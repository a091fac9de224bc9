# Two lines to remember: `make demo` and `make test`. Each does all the set-up on a fresh Debian 12 machine, as root.
# ARGS is passed on to what a target runs: make demo ARGS="--json result.json", make test ARGS="-k settle".
#
# What must be done once per machine is in tools/setup.sh; what make is good at (objects from sources) is here.

ARGS ?=
SEEDS ?= 1000
PY := .venv/bin/python
# `check` compiles and reads, `simulate` moves no real packet; the others do, and so ask more of the machine.
LEVEL := $(if $(filter-out check objects simulate,$(MAKECMDGOALS)),$(if $(filter e2e bench-control,$(MAKECMDGOALS)),cluster,machine),tools)
# A cluster counts as given only where it is said with the command, for many an environment has a KUBECONFIG that is not
# meant for tests. Its tests need no root, no compiler and no packets here.
GIVEN := $(if $(filter e2e,$(MAKECMDGOALS)),$(filter command,$(firstword $(origin KUBECONFIG))))
ifneq ($(GIVEN),)
LEVEL := python
endif

SOURCES := $(wildcard lbpod/bpf/*.bpf.c lbpod/lab/bpf/*.bpf.c tests/*/*.bpf.c)
HEADERS := $(wildcard lbpod/bpf/*.h lbpod/lab/bpf/*.h tests/*/*.h)
OBJECTS := $(SOURCES:.c=.o)
BPF_CFLAGS := -target bpf -mcpu=v3 -O2 -g -Wall -Werror -I lbpod/bpf -idirafter /usr/include/$(shell uname -m)-linux-gnu

# The ladder, cheapest first.
LADDER := $(wildcard $(addprefix tests/,tidy unit property scenarios simulation bpf integration))

.DELETE_ON_ERROR:
.PHONY: help demo chaos test check bench bench-control simulate soak e2e kind objects setup lint clean

help: ## this list
	@echo 'make TARGET [ARGS="..."]'
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /  \1\t/p' Makefile | expand -t 16

# Where no packets can be moved (no root, no BPF: status 3), nothing is compiled, and the demo runs in the simulator.
demo: ## real connections while everything changes: Holdfast beside two baselines, about two minutes
	@tools/setup.sh demo; status=$$?; \
	if [ $$status = 0 ]; then $(MAKE) --no-print-directory objects; else [ $$status = 3 ]; fi
	@.venv/bin/holdfast demo $(ARGS)

test: setup lint objects ## check, then every test, cheapest first
	@$(PY) -m pytest $(LADDER) $(ARGS)

check: setup lint objects ## format, lint, types, contracts, BPF warnings, tidy tests: seconds
	@$(PY) -m pytest -q tests/tidy $(ARGS)

chaos: setup objects ## the same while load balancers die and come: ten minutes, a JSON file and a report with plots
	@mkdir -p build
	@.venv/bin/holdfast chaos --json build/chaos.json --html build/chaos.html $(ARGS)

bench: setup objects ## what a packet, a table, a commit cost on this machine
	@$(PY) -m tests.bench $(ARGS)

bench-control: setup objects ## what operator and agents cost, with a real API server: a change, a restart, a thousand VIPs
	@tools/kube.sh api
	@$(PY) -m tests.bench.control $(ARGS)

simulate: setup ## SEEDS=1000: that many clusters on virtual time, where everything comes, goes and dies, on all cores
	@$(PY) -m lbpod.simulator --seeds 1..$(SEEDS) $(ARGS)

soak: setup objects ## the random tests with a hundred times as many cases
	@HOLDFAST_SOAK=1 $(PY) -m pytest -o faulthandler_timeout=0 $(filter %/property %/scenarios %/simulation %/bpf,$(LADDER)) $(ARGS)

ifeq ($(GIVEN),)
e2e: setup objects ## CRD, operator and chart on a real Kubernetes that is built (Go 1.26), or KUBECONFIG=FILE VIP=ADDRESS on yours
	@tools/kube.sh all
	@tools/kube.sh certmanager
	@tools/images.sh build
	@$(PY) -m pytest tests/cluster $(ARGS)
else
# Every wait in there ends by itself, and who is ended from outside takes nothing away: so no limit for a whole test.
e2e: setup
	@$(PY) -m pytest tests/cluster/test_scenes.py --kubeconfig "$$KUBECONFIG" --vip "$$VIP" --client "$$CLIENT" \
		--images "$$IMAGES" --page "$$PAGE" --values "$$VALUES" -o faulthandler_timeout=0 $(ARGS)
endif

kind: ## a kind cluster with the chart on it; needs Docker, kind, kubectl and helm
	@tools/kind.sh

objects: $(OBJECTS) ## the compiled BPF programs, beside their sources

setup: ## packages, .venv, bpffs; the other targets do this by themselves
	@tools/setup.sh $(LEVEL)

lint: setup
	@echo "==> format, lint, types, contracts"
	@failed=0; \
	.venv/bin/ruff format --quiet --check --diff . || failed=1; \
	.venv/bin/ruff check --quiet --output-format concise . || failed=1; \
	.venv/bin/mypy --no-error-summary || failed=1; \
	.venv/bin/lint-imports --no-logo > build/contracts.log || { cat build/contracts.log; failed=1; }; \
	exit $$failed

# Every object depends on every header: a second too much now and then, and never a stale program in the kernel.
$(OBJECTS): %.o: %.c $(HEADERS) Makefile | setup
	@echo "==> $@"
	@$$(tools/find-clang.sh) $(BPF_CFLAGS) -c $< -o $@

clean: ## objects and caches; .venv stays (it is keyed by pyproject.toml)
	@rm -rf $(OBJECTS) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find lbpod operator tests -name __pycache__ -type d -prune -exec rm -rf {} +
