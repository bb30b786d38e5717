PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: toy beauty test torture clean

# the whole recipe: `make` on the toy world, 10 to 20 minutes on 2 CPU cores; `make beauty` on Amazon Beauty (data/beauty, see
# README), a good hour
.DEFAULT_GOAL := toy
toy: CONFIG = toy
beauty: CONFIG = small
toy beauty: .venv/ready
	$(RUN) train_ar.py --config $(CONFIG)
	$(RUN) train_cft.py --config $(CONFIG)
	$(RUN) train_opd.py --config $(CONFIG)
	$(RUN) train_rl.py --config $(CONFIG)
	$(RUN) evaluate.py --config $(CONFIG)

# UNTOUCHED: that the graders of docs/exercises.md fail on the code as it is given
test: .venv/ready
	UNTOUCHED=1 $(RUN) -m pytest -q tests

# 24 kills of training runs, then 10,000 damaged files at the loaders: a quarter of an hour
torture: .venv/ready
	rm -rf runs/torture
	$(RUN) tests/torture.py 24 10000 runs/torture

# the environment; made again whenever requirements.txt changes
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs
