# SPDX-License-Identifier: Apache-2.0
"""DMS models on vLLM for CUDA, as far as that goes without a GPU.

What vLLM's own code settles on for a double of an H100 (see `vllm_cuda`), what is refused by name, and the tokens that
vLLM gives on a CPU where Triton interprets the kernels.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from families import build_dms
from paths import HELPERS
from vllm_jobs import NGRAM, PYTHON, embedded_model, expected, job, rounding

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON not in os.environ, reason="needs vLLM: make test-vllm"),
]
PIECES = {"cudagraph_mode": "PIECEWISE", "resolved": "PIECEWISE", "mode": "VLLM_COMPILE"}
NONE = {"cudagraph_mode": "NONE", "resolved": "NONE"}
SETTLED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "as it comes": ({}, PIECES),
    "full graphs": ({"compilation_config": {"cudagraph_mode": "FULL"}}, PIECES),
    "graphs of decoding": ({"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}, PIECES),
    "nothing is cut": ({"compilation_config": {"splitting_ops": []}}, PIECES),
    "not compiled": ({"compilation_config": {"mode": 0}}, NONE),
    "eager": ({"enforce_eager": True}, NONE),
    "asynchronous": ({"async_scheduling": True}, PIECES),
    "drafts": ({"speculative_config": NGRAM}, PIECES),
    "fp8": ({"kv_cache_dtype": "fp8"}, PIECES),
    "B200": ({}, PIECES),
}
PLATFORMS = {
    "B200": {"capability": [10, 0], "name": "NVIDIA B200"},
    "NVIDIA A100 has 8.0": {"capability": [8, 0], "name": "NVIDIA A100"},
    "GeForce RTX 5090 has 12.0": {"capability": [12, 0], "name": "NVIDIA GeForce RTX 5090"},
    "not on ROCM": {"kind": "ROCM"},
    "not on TPU": {"kind": "TPU"},
}
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER=1": {"VLLM_USE_V2_MODEL_RUNNER": "1"},
    "VLLM_USE_BREAKABLE_CUDAGRAPH=1": {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"},
}
REFUSED: dict[str, dict[str, Any]] = {
    **{name: {} for name in PLATFORMS if name not in SETTLED},
    **{name: {} for name in ENVIRONMENT},
    "head_dim=20 with 2 query heads": {"hf_overrides": {"head_dim": 20}},
    "head_dim=256 with 2 query heads for each KV head in float32": {
        "hf_overrides": {"head_dim": 256},
        "dtype": "float32",
    },
    "dual batch overlap": {"enable_dbo": True},
    "kv_offloading_size=1.0": {"kv_offloading_size": 1.0},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    place = tmp_path_factory.mktemp("cuda")
    build_dms("llama").save_pretrained(place / "model")
    settings = {name: given for name, (given, _) in SETTLED.items()} | REFUSED
    jobs = [
        {
            "model": str(place / "model"),
            "settings": given,
            "platform": PLATFORMS.get(name, {}),
            "environment": ENVIRONMENT.get(name, {}),
        }
        for name, given in settings.items()
    ]
    (place / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    paths = [str(place / name) for name in ("jobs.json", "results.json")]
    command = [os.environ[PYTHON], str(HELPERS / "vllm_cuda.py"), *paths]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-4000:]
    found = json.loads((place / "results.json").read_text(encoding="utf-8"))
    return dict(zip(settings, found, strict=True))


@pytest.mark.parametrize("name", SETTLED)
def test_graphs_are_cut_at_our_attention_and_nothing_runs_ahead_of_the_scheduler(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    found = results[name]
    assert found.get("error") is None
    assert found["split"] and found["others"]
    assert {x: found[x] for x in SETTLED[name][1]} == SETTLED[name][1]
    assert not found["async"] and not found["v2"]
    assert found["environment"] == "0"
    assert found["connector"] == "DMSConnector"


def test_requests_that_vllm_makes_up_to_warm_up_get_zeros(
    results: dict[str, dict[str, Any]],
) -> None:
    assert results["as it comes"]["warm_up"] == 0.0


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_run_on_a_gpu_is_refused_by_name(
    results: dict[str, dict[str, Any]], message: str
) -> None:
    assert message in results[message]["error"]


INTERPRETED: dict[str, dict[str, Any]] = {
    "chunks": {},
    "drafts": {"speculative_config": NGRAM},
    "fp8": {"kv_cache_dtype": "fp8"},
}
LENGTHS, NEW = [70, 30, 17], 10


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernels_give_the_tokens_of_a_full_recompute(tmp_path: Path, name: str) -> None:
    model = embedded_model(0.83, tmp_path / "model")
    settings = {"max_num_batched_tokens": 64, **INTERPRETED[name]}
    jobs = [job(str(tmp_path / "model"), settings, LENGTHS, NEW) | {"interpreted": True}]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    # vLLM's interpreter has no Triton, so that vLLM itself does not take it.
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "triton").symlink_to(Path(triton.__file__).parent)
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tmp_path / "packages")])
    paths = [str(tmp_path / x) for x in ("jobs.json", "results.json")]
    said = subprocess.run(
        [os.environ[PYTHON], str(HELPERS / "vllm_driver.py"), *paths],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr[-4000:]
    (found,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert found.get("error") is None
    oracle = rounding(model) if name == "fp8" else model
    assert found["tokens"] == expected(oracle, LENGTHS, NEW)
    assert found["free_at_end"] == found["pool"]
