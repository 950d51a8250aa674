# Trains on NVIDIA GPUs, whose driver and container toolkit are the host's; PyTorch's wheels bring CUDA along.
#
#   docker build --tag mugv_ds .
#   docker run --gpus all --shm-size 16g --stop-timeout 600 --volume /data:/data mugv_ds \
#       python tools/launch.py --hostfile hostfiles/one_node mugv_ds/train.py --config …
#
# /dev/shm: the loader's workers hand batches over in shared memory, and NCCL uses it within a host. Docker gives 64 MB, too
# little; give it 16 GB, or --ipc=host.
#
# BASE is a tag, which moves. For builds that give the same image again name the digest that you have checked:
#   docker build --build-arg BASE=python@sha256:… .
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# A C compiler for what Triton and torch.compile build at run time; make; git for work in the development container.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git make \
    && rm -rf /var/lib/apt/lists/*

ARG USER_ID=1000
RUN useradd --create-home --uid ${USER_ID} trainer
USER trainer
WORKDIR /home/trainer/mugv_ds

# What is installed changes seldom, so it comes before the code.
COPY --chown=trainer constraints.txt constraints-gpu.txt setup.cfg pyproject.toml README.md ./
RUN sed -E '/^(torch|triton)==/d' constraints.txt | cat - constraints-gpu.txt > /tmp/constraints.txt \
    && python -m venv .venv \
    && .venv/bin/python -m pip install --no-cache-dir --constraint /tmp/constraints.txt \
        "torch" "triton" "flash-attn-4"

COPY --chown=trainer . .
RUN .venv/bin/python -m pip install --no-cache-dir --constraint /tmp/constraints.txt --editable ".[evaluation,prepare]" \
    && touch .venv/installed

ENV PATH=/home/trainer/mugv_ds/.venv/bin:$PATH
CMD ["make", "help"]
