# SPDX-License-Identifier: Apache-2.0
# vLLM's own image with the plug-in that serves DMS models. From the root of the repository (not built by the project yet):
#   docker build -f docker/vllm.Dockerfile -t modelopt-dms-vllm .
#   docker run --gpus all --ipc=host -p 127.0.0.1:8000:8000 -v "$PWD/model:/model:ro" modelopt-dms-vllm /model
FROM vllm/vllm-openai:v0.33.0

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY modelopt_dms modelopt_dms
COPY recipes recipes
COPY examples/embedded_model examples/embedded_model

# What vLLM was built against stays: pip fails here where modelopt_dms needs another version, and does not replace it.
RUN python3 -m pip list --format=freeze | grep -E "^(torch|torchvision|triton|vllm|transformers)==" > /tmp/kept.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/kept.txt . \
    && rm /tmp/kept.txt

WORKDIR /vllm-workspace
EXPOSE 8000
# The plug-in is found through its entry point; prefix caching would need evicted tokens.
ENTRYPOINT ["vllm", "serve"]
CMD ["/model", "--no-enable-prefix-caching"]
