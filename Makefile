# make run   the six notebooks in order, on the phantom or on RSNA_RAW=<folder>; TASK=<name> takes another task
# make test  everything that CI runs
# make bench side by side with the peers, on this machine; BENCH=--quick only tries it out
PYTHON ?= python3
TASK   ?= hemorrhage
VENV   := .venv
BIN    := $(VENV)/bin
OUT    := runs/$(TASK)
NOTEBOOKS := $(sort $(wildcard nbs/0*.ipynb))

.PHONY: run test bench install export clean
.DEFAULT_GOAL := run

$(VENV)/.installed: settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

install: $(VENV)/.installed

run: $(VENV)/.installed
	@mkdir -p $(OUT)
	@set -e; for nb in $(NOTEBOOKS); do name=$$(basename $$nb .ipynb); echo "== $$name"; \
	  PYTHONWARNINGS=ignore::FutureWarning,ignore::DeprecationWarning RSNA_TASK=$(TASK) $(BIN)/papermill --cwd nbs --kernel python3 --progress-bar --log-level WARNING $$nb $(OUT)/$$name.ipynb; done
	@$(BIN)/jupyter nbconvert --log-level WARN --to html $(OUT)/0*.ipynb
	@RSNA_TASK=$(TASK) $(BIN)/python -c "from rsna_helpers.core import start; from rsna_helpers.inference import print_summary; print_summary(start(verbose=False))"
	@echo "notebooks: $$(ls -d $(OUT)/0*.html | tr '\n' ' ')"

test: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tests/run.sh

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py $(BENCH)

export: $(VENV)/.installed
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

clean:
	rm -rf data/phantom data/phantom-test models/phantom models/phantom-test runs
