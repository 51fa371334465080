# make demo    set everything up and answer a question about an image by SWIRES
# make test    set everything up and run the tests      make lint    ruff, mypy, hadolint
# make test-full   the tests with whole grids of cases, where make test runs a part that covers every value
# make bench   the search benchmark                     make info    what was built
# make small-world  train the bundled models and the verifier again, calibrate them, and repeat the comparison
# make ablation     what each stage of an answer is worth, on the small world
# make test-avx2    the tests as on a CPU without AVX-512      make test-baseline  without AVX2 too
# make gpu-bundle   what a machine with a GPU and no network needs besides the tree (docs/gpu.md)
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers>=5.17,<6
GPU_PYTHON ?= python3.12
GPU_VENV ?= .venv-gpu
GPU_WHEELS ?= pydantic==2.14.4 pydantic-core==2.50.5 annotated-types typing-inspection expecttest \
	liger-kernel==0.8.5 cut-cross-entropy==25.1.1
CUDA_HOME ?= /usr/local/cuda
PYTEST = $(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal
GPU_EXTENSION = llava_cot_kernels/_C.cpython-312-x86_64-linux-gnu.so

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

demo: $(VENV)/.ready
	$(VENV)/bin/llava-cot demo

test: $(VENV)/.ready
	$(PYTEST)

test-full: $(VENV)/.ready
	$(PYTEST) --full

# What the CPU has beyond this is hidden from torch and its libraries, from numpy, and from the kernels.
test-avx2: export ATEN_CPU_CAPABILITY = avx2
test-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-avx2: export MKL_ENABLE_INSTRUCTIONS = AVX2
test-avx2: export OPENBLAS_CORETYPE = Haswell
test-avx2: export NPY_DISABLE_CPU_FEATURES = X86_V4 AVX512_ICL AVX512_SPR
test-baseline: export ATEN_CPU_CAPABILITY = default
test-baseline: export ONEDNN_MAX_CPU_ISA = SSE41
test-baseline: export MKL_ENABLE_INSTRUCTIONS = SSE4_2
test-baseline: export OPENBLAS_CORETYPE = Nehalem
test-baseline: export NPY_DISABLE_CPU_FEATURES = X86_V3 X86_V4 AVX512_ICL AVX512_SPR
# torch.compile asks the CPU itself, and then includes headers that ATEN_CPU_CAPABILITY has emptied.
test-baseline: PYTEST_OPTIONS = --ignore tests/engine/test_compiled_layers.py
test-avx2 test-baseline: test-%: $(VENV)/.ready
	$(PYTEST) --isa $* $(PYTEST_OPTIONS)

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint Dockerfile

bench: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/bench_search.py --questions 3 --peers cached published

# Everything that is bundled of the small world, from nothing, and its tables: about two and a half hours on two cores.
small-world: $(VENV)/.ready
	$(VENV)/bin/python -m llava_cot.data.world build/world --seeds 0:104000 --processes 2
	$(VENV)/bin/python -m tools.small_world.untrained build/untrained
	$(VENV)/bin/llava-cot train configs/tiny.yaml
	rm -f llava_cot/tiny/swires_calibration.json
	cp build/tiny/model/* llava_cot/tiny
	$(VENV)/bin/python -m tools.small_world.verifier build/verifier --rollouts build/rollouts.jsonl \
		--steps 2500 --stop 1200
	$(VENV)/bin/python -m tools.small_world.verifier llava_cot/tiny/verifier --rollouts build/rollouts.jsonl \
		--init build/verifier --steps 1400 --lr 1.2e-3 --word-weight 5 --seed 1
	$(VENV)/bin/python -m tools.small_world.calibration llava_cot/tiny
	$(VENV)/bin/python -m tools.small_world.search_data build/search --processes 2
	$(VENV)/bin/python -m tools.small_world.search_data build/search_dev --first-seed 710000 --questions 256
	$(VENV)/bin/llava-cot train-reward configs/tiny_reward.yaml
	$(VENV)/bin/python benchmarks/bench_accuracy.py --out build/accuracy.json
	$(VENV)/bin/python benchmarks/accuracy_report.py build/accuracy.json
	$(VENV)/bin/python -m tools.small_world.untrained_qwen build/untrained_qwen
	$(VENV)/bin/llava-cot train configs/tiny_qwen.yaml
	rm -f llava_cot/tiny_qwen/swires_calibration.json
	cp build/tiny_qwen/model/* llava_cot/tiny_qwen
	$(VENV)/bin/python -m tools.small_world.calibration llava_cot/tiny_qwen
	$(VENV)/bin/python benchmarks/bench_accuracy.py --model tiny-qwen --out build/tiny_qwen_accuracy.json
	$(VENV)/bin/python benchmarks/accuracy_report.py build/tiny_qwen_accuracy.json

# What each stage is worth: fine-tunes with stages left out, from one base. About two hours on two cores.
ablation: $(VENV)/.ready
	$(VENV)/bin/python -m llava_cot.data.world build/ablation_world --seeds 250000:362000 --variant apart --processes 2
	$(VENV)/bin/python -m tools.small_world.untrained build/untrained
	$(VENV)/bin/llava-cot train configs/ablation_base.yaml
	$(VENV)/bin/python -m tools.small_world.ablation build/ablation --base build/ablation_base/model \
		--variants full "without SUMMARY" "without CAPTION" "without REASONING" direct "direct with caption" "shuffled order"
	$(VENV)/bin/python benchmarks/ablation_report.py build/ablation

info: $(VENV)/.ready
	$(VENV)/bin/python -m llava_cot_kernels.info

# For Python 3.12, torch 2.11 with CUDA 13.0, and sm_90a. The wheels are those that such a machine was seen to lack.
gpu-bundle:
	test -d $(GPU_VENV) || $(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet torch==2.11.0 setuptools wheel ninja pybind11
	CUDA_HOME=$(CUDA_HOME) LIBRARY_PATH=$(CUDA_HOME)/lib TORCH_CUDA_ARCH_LIST=9.0a \
		$(GPU_VENV)/bin/python setup.py -q build_ext --inplace > /dev/null
	strip --strip-unneeded $(GPU_EXTENSION)
	rm -rf build/gpu_wheels
	$(GPU_VENV)/bin/python -m pip download --quiet --no-deps --only-binary :all: --dest build/gpu_wheels $(GPU_WHEELS)
	du -ch $$(git ls-files) $(GPU_EXTENSION) build/gpu_wheels | tail -n 1

# The harnesses that the plug-ins are tested against. Of their dozens of dependencies the tests need those of [test].
HARNESSES = ms-vlmeval==0.0.20 lmms-eval==0.7.3

# The extension is built against the torch of the environment, so torch comes first.
$(VENV)/.ready: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TRANSFORMERS)" -e ".[test,tokenizers,servers]"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(HARNESSES) 2> /dev/null
	touch $@

clean:
	rm -rf .venv* build *.egg-info llava_cot_kernels/*.so

.PHONY: demo test test-full test-avx2 test-baseline lint bench info small-world ablation gpu-bundle clean
