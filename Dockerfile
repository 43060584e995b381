# Image for GPU nodes: one for Ray's head, its workers and the submitter (KubeRay) and for a single machine.
# `devel`, not `runtime`: DeepSpeed compiles its fused optimiser with nvcc at first use, and Triton needs a C compiler.
# CUDA 13.0 is what PyPI's torch 2.13 is built for.
FROM nvidia/cuda:13.0.3-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# wget: KubeRay's health probes call it. python3-dev: headers for what is compiled at run time.
# The archive drops old versions, so a pinned one would stop building; the base image's tag pins the release.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential ca-certificates python3 python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    HF_HOME=/home/ctrsink/.cache/huggingface

# Slow layers first: torch, then the dependencies, which change with pyproject.toml alone, then the code.
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir "torch==2.13.0"

WORKDIR /opt/ctrsink
COPY pyproject.toml ./
# The ranges of pyproject.toml are the pins here: what is installed is this folder, not a package from an index.
# hadolint ignore=DL3013
RUN mkdir ctrsink \
    && touch README.md LICENSE ctrsink/__init__.py \
    && pip install --no-cache-dir ".[train,serve]"

COPY README.md LICENSE ./
COPY ctrsink ./ctrsink
RUN pip install --no-cache-dir --no-deps --force-reinstall . \
    && rm -rf build ./*.egg-info

COPY launchers ./launchers
COPY configs ./configs

# Ubuntu's image already has a user with id 1000, the id that most clusters expect.
RUN userdel --remove ubuntu \
    && useradd --create-home --uid 1000 --shell /bin/bash ctrsink
USER 1000
# Relative paths of a configuration (runs/...) begin here, where the user may write.
WORKDIR /home/ctrsink

CMD ["ctrsink", "--help"]
