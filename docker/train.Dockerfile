# What trains: rows, QLoRA, merging, parity. From the repository's root:
#   docker build -f docker/train.Dockerfile -t tuneship-train .
# Plain Dockerfile words only, so that every builder takes it (docs/decisions/0021-*).

# PyTorch's wheels bring CUDA's libraries; of the base we use Ubuntu and what the NVIDIA runtime looks for.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY docker/build.lock docker/train.lock docker/
RUN python3 -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --require-hashes -r docker/build.lock
RUN /opt/build/bin/uv venv --no-python-downloads --python /usr/bin/python3 /opt/tuneship \
 && /opt/build/bin/uv pip sync --no-cache --require-hashes --compile-bytecode --python /opt/tuneship docker/train.lock
COPY pyproject.toml README.md LICENSE ./
COPY tuneship tuneship
COPY train/tuneship train/tuneship
COPY serve/tuneship serve/tuneship
COPY bench/tuneship bench/tuneship
RUN /opt/build/bin/hatchling build -t wheel -d /dist \
 && /opt/build/bin/uv pip install --no-cache --no-deps --compile-bytecode --python /opt/tuneship /dist/*.whl

FROM ${BASE}
# Triton compiles a small C module for each kernel's launcher: g++ and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3 python3-dev \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 --user-group tuneship \
 && chmod 1777 /home/tuneship
COPY --from=build /opt/tuneship /opt/tuneship
# HOME is the one place that is written to beside the mounted folders. `docker run --user` may name a user who is not in
# /etc/passwd: PyTorch then asks USER.
ENV PATH=/opt/tuneship/bin:$PATH HOME=/home/tuneship USER=tuneship
WORKDIR /home/tuneship
USER 10001:10001
# A container can lose its GPU while it runs (the host reloads systemd): NVML fails from then on.
HEALTHCHECK --interval=60s --timeout=20s --retries=3 \
  CMD ["sh", "-c", "! command -v nvidia-smi || nvidia-smi -L"]
ENTRYPOINT ["tuneship"]
CMD ["--help"]
