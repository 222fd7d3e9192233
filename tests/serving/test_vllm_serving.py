# SPDX-License-Identifier: Apache-2.0
"""DMS models on vLLM: the same tokens as a full recompute in transformers, in fewer blocks.

vLLM has an interpreter of its own (`make test-vllm`): its transformers is not ours. The oracle runs here.
"""

import json
import os
import subprocess
from typing import Any

import pytest
from families import build_dms
from paths import HELPERS
from transformers import PreTrainedModel
from vllm_jobs import NGRAM, PYTHON, embedded_model, expected, job, rounding

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON not in os.environ, reason="needs vLLM: make test-vllm"),
]
NEW = 60
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "mistral": {},
    "phi3": {},  # one projection for queries, keys and values
    "qwen3_moe": {},
    "residual": {"gate": "residual", "decision_shift": 1, "protect_first": 3},
    "layer": {"granularity": "layer"},
}
SMALL = {"max_model_len": 200, "max_num_batched_tokens": 64, "skip_tokenizer_init": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 128},
    "preempted": {
        "max_num_batched_tokens": 128,
        "num_gpu_blocks_override": 9,
        # Let in as long as there is room for the next chunk.
        "scheduler_reserve_full_isl": False,
    },
    "compiled": {"enforce_eager": False},
    "tensor parallel": {"tensor_parallel_size": 2, "max_num_batched_tokens": 128},
    # vLLM makes what ranks hand on while it warms up, which it leaves out for eager models on CPUs.
    "pipeline parallel": {"pipeline_parallel_size": 2, "enforce_eager": False},
    "drafts": {"max_num_batched_tokens": 128, "speculative_config": NGRAM},
    "drafts, preempted": {
        "max_num_batched_tokens": 128,
        "num_gpu_blocks_override": 7,
        "max_model_len": 512,
        "scheduler_reserve_full_isl": False,
        "speculative_config": NGRAM,
    },
    "drafts, tensor parallel": {"tensor_parallel_size": 2, "speculative_config": NGRAM},
}
# Another oracle: keys and values are rounded.
IN_FP8 = {
    "chunks": {"max_num_batched_tokens": 128},
    "drafts": {"max_num_batched_tokens": 128, "speculative_config": NGRAM},
}
CAPPED = {
    "capped": {"additional_config": {"modelopt_dms": {"max_request_blocks": 3}}},
    "outgrows the pool": {
        "num_gpu_blocks_override": 7,
        "max_model_len": 800,
        "max_num_batched_tokens": 64,
    },
    "capped, drafts": {
        "additional_config": {"modelopt_dms": {"max_request_blocks": 3}},
        "speculative_config": NGRAM,
    },
}
REFUSED = {
    "block_size=32": {"block_size": 32},
    "kv_cache_dtype='fp8_e5m2'": {"kv_cache_dtype": "fp8_e5m2"},
    "num_speculative_tokens=64 must be below 64": {
        "speculative_config": {**NGRAM, "num_speculative_tokens": 64}
    },
    "max_request_blocks=0": {"additional_config": {"modelopt_dms": {"max_request_blocks": 0}}},
    "accepted: 'max_request_blocks'": {"additional_config": {"modelopt_dms": {"blocks": 3}}},
    "are always resident": {"additional_config": {"modelopt_dms": {"max_request_blocks": 1}}},
}
LONG = [300, 77, 150, 290, 33, 200]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, str]]:
    place = tmp_path_factory.mktemp("models")
    made = {"embedded": embedded_model(0.83, place / "embedded")}
    made["keeps"] = embedded_model(0.02, place / "keeps")
    for name, fields in FAMILIES.items():
        family = name if name not in ("residual", "layer") else "llama"
        made[name] = build_dms(family, **fields)
        made[name].save_pretrained(place / name)
    return {name: (model, str(place / name)) for name, model in made.items()}


def all_jobs(places: dict[str, str]) -> dict[str, dict[str, Any]]:
    """By name, for models in these directories."""
    jobs: dict[str, dict[str, Any]] = {}
    for name, settings in SETTINGS.items():
        jobs[name] = job(places["embedded"], settings, LONG, NEW)
    for name, settings in IN_FP8.items():
        kind = {**settings, "kv_cache_dtype": "fp8"}
        jobs[f"fp8, {name}"] = job(places["embedded"], kind, LONG, NEW)
    for name, settings in CAPPED.items():
        jobs[name] = job(places["keeps"], settings, [300, 77], 350)
    for name in FAMILIES:
        jobs[name] = job(places[name], SMALL, [90, 40, 17], NEW)
    # Last: an engine that fails to start leaves things behind in its process.
    for name, settings in REFUSED.items():
        jobs[name] = job(places["embedded"], settings, [5], NEW)
    return jobs


@pytest.fixture(scope="module")
def results(
    models: dict[str, tuple[PreTrainedModel, str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What vLLM made of all jobs: its start takes longer than a job."""
    jobs = all_jobs({name: place for name, (_, place) in models.items()})
    place = tmp_path_factory.mktemp("jobs")
    (place / "jobs.json").write_text(json.dumps(list(jobs.values())), encoding="utf-8")
    driver, paths = HELPERS / "vllm_driver.py", (place / "jobs.json", place / "results.json")
    command = [os.environ[PYTHON], str(driver), *map(str, paths)]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-4000:]
    found = json.loads(paths[1].read_text(encoding="utf-8"))
    return dict(zip(jobs, found, strict=True))


@pytest.fixture(scope="module")
def oracle(models: dict[str, tuple[PreTrainedModel, str]]) -> list[list[int]]:
    return expected(models["embedded"][0], LONG, NEW)


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_equal_those_of_a_full_recompute(
    results: dict[str, dict[str, Any]], oracle: list[list[int]], name: str
) -> None:
    assert results[name].get("error") is None
    assert results[name]["tokens"] == oracle
    assert results[name]["forced"] == 0
    assert results[name]["free_at_end"] == results[name]["pool"]


@pytest.mark.parametrize("name", IN_FP8)
def test_tokens_equal_those_of_a_full_recompute_with_keys_and_values_in_fp8(
    models: dict[str, tuple[PreTrainedModel, str]],
    results: dict[str, dict[str, Any]],
    oracle: list[list[int]],
    name: str,
) -> None:
    found = results[f"fp8, {name}"]
    assert found.get("error") is None
    wanted = expected(rounding(models["embedded"][0]), LONG, NEW)
    assert found["tokens"] == wanted != oracle


@pytest.mark.parametrize("name", FAMILIES)
def test_other_architectures_and_gates_give_the_tokens_of_a_full_recompute(
    models: dict[str, tuple[PreTrainedModel, str]], results: dict[str, dict[str, Any]], name: str
) -> None:
    assert results[name].get("error") is None
    assert results[name]["tokens"] == expected(models[name][0], [90, 40, 17], NEW)


@pytest.mark.parametrize("name", [x for x in SETTINGS if "drafts" in x])
def test_drafts_are_accepted_and_rejected(results: dict[str, dict[str, Any]], name: str) -> None:
    assert 0 < results[name]["accepted"] < results[name]["drafted"]


def test_blocks_held_are_less_than_half_of_a_dense_cache(
    results: dict[str, dict[str, Any]],
) -> None:
    assert results["chunked"]["share"] <= 0.45


@pytest.mark.parametrize("name", ["preempted", "drafts, preempted"])
def test_requests_are_preempted_in_a_pool_that_a_dense_cache_does_not_fit(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    found = results[name]
    assert found["preemptions"] > 0
    assert found["dense_blocks"] > found["pool"] >= found["peak_blocks"]


@pytest.mark.parametrize("name", CAPPED)
def test_a_request_that_evicts_less_than_promised_finishes(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    found = results[name]
    assert found.get("error") is None
    assert [len(x) for x in found["tokens"]] == [350, 350]
    assert 0 < found["forced"] <= 2
    # Every step moves a request on: one that starts over for ever would need more.
    assert found["steps"] < 2 * (300 + 77 + 350 + 350)


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_work_is_refused_by_name(
    results: dict[str, dict[str, Any]], message: str
) -> None:
    assert message in results[message]["error"]


def test_vllm_has_the_hooks_that_are_used() -> None:
    command = [os.environ[PYTHON], str(HELPERS / "vllm_surface.py")]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-4000:]
    assert json.loads(said.stdout.splitlines()[-1]) == []
