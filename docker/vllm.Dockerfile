# SPDX-License-Identifier: Apache-2.0
# vLLM's own image with the plug-in that serves DMS models. From the root of the repository (not built by the project yet, and the
# plug-in has not run on a GPU: docs/vllm.md says what to run first):
#   docker build -f docker/vllm.Dockerfile -t modelopt-dms-vllm .
#   docker run --gpus all --ipc=host -p 127.0.0.1:8000:8000 -v "$PWD/model:/model:ro" modelopt-dms-vllm /model
FROM vllm/vllm-openai:v0.33.0

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY modelopt_dms modelopt_dms
COPY recipes recipes
COPY examples/embedded_model examples/embedded_model

# What vLLM was built against stays, an older transformers than modelopt_dms has elsewhere: the plug-in needs nothing else.
RUN python3 -m pip install --no-cache-dir --no-deps .

WORKDIR /vllm-workspace
EXPOSE 8000
# The plug-in is found through its entry point; prefix caching would need evicted tokens.
ENTRYPOINT ["vllm", "serve"]
CMD ["/model", "--no-enable-prefix-caching"]
