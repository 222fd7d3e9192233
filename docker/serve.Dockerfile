# SPDX-License-Identifier: Apache-2.0
# `modelopt-dms serve` for one model, on a CPU or one GPU. From the root of the repository (not built by the project yet):
#   docker build -f docker/serve.Dockerfile -t modelopt-dms-serve .
#   docker run --gpus all -p 127.0.0.1:8000:8000 -v "$PWD/smollm2-cr4:/model:ro" -e MODELOPT_DMS_API_KEY modelopt-dms-serve
FROM python:3.12-slim

# Triton compiles its launchers with a C compiler when a kernel first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY modelopt_dms modelopt_dms
COPY recipes recipes
COPY examples/embedded_model examples/embedded_model

# An index with CPU builds of torch makes a much smaller image: --build-arg TORCH_INDEX=...
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && pip install --no-cache-dir --constraint constraints.txt ".[serve]"

RUN useradd --create-home --uid 10001 server
USER 10001
WORKDIR /home/server
ENV HF_HUB_OFFLINE=1
EXPOSE 8000
# Waits for the model, too: the port is taken before it is loaded.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Requests that run have 30 seconds to finish after docker stop: give it as long, docker stop --timeout 40.
ENTRYPOINT ["modelopt-dms", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--name", "model"]
