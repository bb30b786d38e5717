PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: toy beauty test clean

# the whole toy recipe: about 18 minutes on 2 CPU cores
toy: .venv/ready
	$(RUN) train_ar.py --config toy
	$(RUN) train_cft.py --config toy
	$(RUN) train_opd.py --config toy
	$(RUN) train_rl.py --config toy
	$(RUN) evaluate.py --config toy

# the same on Amazon Beauty (data/beauty, see README): about an hour on 2 CPU cores
beauty: .venv/ready
	$(RUN) train_ar.py --config small
	$(RUN) train_cft.py --config small
	$(RUN) train_opd.py --config small
	$(RUN) train_rl.py --config small
	$(RUN) evaluate.py --config small

test: .venv/ready
	$(RUN) -m pytest -q tests

# the environment; made again whenever requirements.txt changes
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs
