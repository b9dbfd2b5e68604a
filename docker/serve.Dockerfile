# What serves: SGLang behind our door. From the repository's root:
#   docker build -f docker/serve.Dockerfile -t tuneship-serve .
# Plain Dockerfile words only, so that every builder takes it (docs/decisions/0021-*).

# SGLang and FlashInfer compile kernels for the card that they find, with nvcc, when they are first asked for: `devel`.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04

FROM ${BASE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY docker/build.lock docker/serve.lock docker/
RUN python3 -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --require-hashes -r docker/build.lock
RUN /opt/build/bin/uv venv --no-python-downloads --python /usr/bin/python3 /opt/tuneship \
 && /opt/build/bin/uv pip sync --no-cache --require-hashes --compile-bytecode --python /opt/tuneship docker/serve.lock
COPY pyproject.toml README.md LICENSE ./
COPY tuneship tuneship
COPY train/tuneship train/tuneship
COPY serve/tuneship serve/tuneship
COPY bench/tuneship bench/tuneship
RUN /opt/build/bin/hatchling build -t wheel -d /dist \
 && /opt/build/bin/uv pip install --no-cache --no-deps --compile-bytecode --python /opt/tuneship /dist/*.whl

FROM ${BASE}
# For those kernels and for Triton's launchers: g++ and Python's headers.
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
EXPOSE 30000
# /ready, not /health: healthy means that requests are answered. The first start compiles for minutes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=6 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:30000/ready', timeout=4)"]
ENTRYPOINT ["tuneship"]
CMD ["--help"]
