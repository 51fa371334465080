# make demo    set everything up and answer a question about an image by SWIRES
# make test    set everything up and run the tests      make lint    ruff and mypy
# make bench   the search benchmark                     make info    what was built
# make small-world  train the bundled model and its verifier again, calibrate them, and repeat the comparison
# make ablation     what each stage of an answer is worth, on the small world
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers>=5.17,<6

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

demo: $(VENV)/.ready
	$(VENV)/bin/llava-cot demo

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/bench_search.py --questions 3

# Everything that is bundled of the small world, from nothing, and its tables: about two and a half hours on two cores.
small-world: $(VENV)/.ready
	$(VENV)/bin/python -m llava_cot.data.world build/world --seeds 0:104000 --processes 2
	$(VENV)/bin/python -m llava_cot.small_world.untrained build/untrained
	$(VENV)/bin/llava-cot train configs/tiny.yaml
	rm -f llava_cot/tiny/swires_calibration.json
	cp build/tiny/model/* llava_cot/tiny
	$(VENV)/bin/python -m llava_cot.small_world.verifier build/verifier --rollouts build/rollouts.jsonl \
		--steps 2500 --stop 1200
	$(VENV)/bin/python -m llava_cot.small_world.verifier llava_cot/tiny/verifier --rollouts build/rollouts.jsonl \
		--init build/verifier --steps 1400 --lr 1.2e-3 --word-weight 5 --seed 1
	$(VENV)/bin/python -m llava_cot.small_world.calibration llava_cot/tiny
	$(VENV)/bin/python -m llava_cot.small_world.search_data build/search --processes 2
	$(VENV)/bin/python -m llava_cot.small_world.search_data build/search_dev --first-seed 710000 --questions 256
	$(VENV)/bin/llava-cot train-reward configs/tiny_reward.yaml
	$(VENV)/bin/python benchmarks/bench_accuracy.py --out build/accuracy.json
	$(VENV)/bin/python benchmarks/accuracy_report.py build/accuracy.json

# What each stage is worth: fine-tunes with stages left out, from one base. About two hours on two cores.
ablation: $(VENV)/.ready
	$(VENV)/bin/python -m llava_cot.data.world build/ablation_world --seeds 250000:362000 --variant apart --processes 2
	$(VENV)/bin/python -m llava_cot.small_world.untrained build/untrained
	$(VENV)/bin/llava-cot train configs/ablation_base.yaml
	$(VENV)/bin/python -m llava_cot.small_world.ablation build/ablation --base build/ablation_base/model \
		--variants full "without SUMMARY" "without CAPTION" "without REASONING" direct "direct with caption" "shuffled order"
	$(VENV)/bin/python benchmarks/ablation_report.py build/ablation

info: $(VENV)/.ready
	$(VENV)/bin/python -m llava_cot_kernels.info

# The extension is built against the torch of the environment, so torch comes first.
$(VENV)/.ready: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TRANSFORMERS)" -e ".[test]"
	touch $@

clean:
	rm -rf .venv* build *.egg-info llava_cot_kernels/*.so

.PHONY: demo test lint bench info small-world ablation clean
