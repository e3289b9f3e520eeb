# burnish for servers and workers.
#
#   docker build -t burnish .                                  # CPU
#   docker build -t burnish:cuda --build-arg DEVICE=cuda .     # NVIDIA cards; torch brings its CUDA libraries
#   docker run --rm -p 127.0.0.1:8000:8000 burnish serve burnish-sql-base --host 0.0.0.0
#
# Models are mounted (/models), never copied in. /cache holds quantized weights and may be lost.
ARG PYTHON_IMAGE=python:3.11.16-slim-bookworm

FROM ${PYTHON_IMAGE} AS builder
ARG DEVICE=cpu
ARG EXTRAS=serve,queue,track
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/burnish
# torch alone first: it is by far the largest, and changes least.
COPY constraints.txt ./
RUN case "$DEVICE" in \
        cpu) index="--extra-index-url https://download.pytorch.org/whl/cpu" ;; \
        cuda) index="" ;; \
        *) echo "DEVICE is $DEVICE; expected cpu or cuda" >&2; exit 1 ;; \
    esac \
    && /opt/burnish/bin/pip install $index -c constraints.txt torch
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY src ./src
# Without its compiled kernels burnish would run all the same, slower; here that is an error.
RUN extras="$EXTRAS"; \
    if [ "$DEVICE" = cuda ]; then extras="$extras,gpu"; fi \
    && /opt/burnish/bin/pip install -c constraints.txt ".[$extras]" \
    && cd / \
    && /opt/burnish/bin/python -c "from burnish.kernels.cpu.library import describe; found = describe(); assert found['compiled'], found"

FROM ${PYTHON_IMAGE}
ARG DEVICE=cpu
# Triton compiles a small C file for every GPU kernel while running.
RUN if [ "$DEVICE" = cuda ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN groupadd --gid 10001 burnish \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin burnish \
    && install --directory --owner=10001 --group=10001 /cache /models
COPY --from=builder /opt/burnish /opt/burnish
COPY ops/worker_alive.py /opt/burnish/worker_alive.py
ENV PATH=/opt/burnish/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    BURNISH_CACHE=/cache/weights \
    BURNISH_RUNS=/cache/runs \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton
USER 10001:10001
WORKDIR /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# For `serve`; workers have a check of their own (compose.yaml).
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["burnish"]
CMD ["--help"]
