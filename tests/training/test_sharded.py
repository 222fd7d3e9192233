# SPDX-License-Identifier: Apache-2.0
"""A retrofit that FSDP2 shards over processes is the retrofit of one, and goes on with another number of them."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from paths import HELPERS, ROOT
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_runs import LENGTH, make_config, make_data, make_model, run, weights
from transformers import LlamaConfig, LlamaForCausalLM

import modelopt_dms as dms
from modelopt_dms.config.recipe import Recipe
from modelopt_dms.training import loop, sharding
from modelopt_dms.training.checkpoint import ResumeError, check_run
from modelopt_dms.training.sharding import ShardingError

SECONDS = 120
# Two samples a step: a micro-step each in one process, a process each in two.
SPLIT = {1: {"gradient_accumulation_steps": 2}, 2: {}}
KINDS = {
    "recomputed, in chunks": {"gradient_checkpointing": True, "kl_chunk_tokens": 10},
    "all weights": {"train": "all"},
}


def config(processes, **options):
    options = {"noise": False, "batch_size": 1, "logging_steps": 1, **SPLIT[processes], **options}
    return make_config(**options)


def plain_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def recipe(processes, **options):
    facts = {"window": 3, "scale": 100.0, "offset": 2.0, "target_cr": 2.0}
    return Recipe(dms=facts, retrofit=config(processes, **options))


def launch(place):
    """Run `worker` of this file in two processes that torchrun starts, on CPUs."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", __file__, str(place)]
    path = os.pathsep.join([str(ROOT), str(HELPERS), *filter(None, sys.path)])
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def worker(place):
    """What every process does; the test looks at what it leaves in `place`."""
    rank = int(os.environ["RANK"])
    shown = watch_sharding()
    options = {"sharding": "fsdp2"}
    leave(place / "plain", rank, *run(config=config(2, **options), output_dir=place / "plain"))
    (place / f"sharded-{rank}.json").write_text(json.dumps(shown))
    for name, kind in KINDS.items():
        leave(place / name, rank, *run(config=config(2, **options, **kind)))
    if rank == 0:
        for copy in ("resumed by 2", "resumed by 1"):
            shutil.copytree(place / "plain", place / copy)
            shutil.rmtree(place / copy / "checkpoint-7")
    torch.distributed.barrier()
    resume(place / "resumed by 2", 2, rank)
    dms.compress(
        plain_model(),
        recipe(2, **options),
        data=make_data(),
        output_dir=place / "saved",
        progress=False,
    )
    torch.distributed.destroy_process_group()
    if rank == 0:
        become_the_only_process()
        resume(place / "resumed by 1", 1, rank)


def become_the_only_process():
    """As if torchrun had started one; a second launch would spend most of its time on imports."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "0"}
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE")


def resume(place, processes, rank):
    leave(place, rank, *run(config=config(processes, sharding="fsdp2"), output_dir=place))


def leave(place, rank, model, result):
    place.mkdir(exist_ok=True)
    state = {name: x.detach().clone() for name, x in model.named_parameters()}
    save_file(state, place / f"model-{rank}.safetensors")
    (place / f"rows-{rank}.json").write_text(json.dumps(result.rows))


def watch_sharding():
    """What `shard` makes of the first model: what FSDP2 manages, what it does not, and whole parameters it holds."""
    shown = {"held": []}
    shard, fully_shard, make_views = loop.shard, sharding.fully_shard, sharding._views
    views = []

    def watched_views(module):
        made = make_views(module)
        views.extend(weakref.ref(x) for x in made.values())
        return made

    def watched_group(module, **kwargs):
        fully_shard(module, **kwargs)
        shown["held"].append(sum(x() is not None for x in views))

    def watched(whole):
        sharded = shard(whole)
        modules = [name for name, x in sharded.named_modules() if isinstance(x, FSDPModule)]
        shown.setdefault("modules", modules)
        left = [name for name, x in sharded.named_parameters() if not isinstance(x, DTensor)]
        shown.setdefault("left out", left)
        shown.setdefault("local", sum(x.to_local().numel() for x in sharded.parameters()))
        shown.setdefault("whole", sum(x.numel() for x in whole.parameters()))
        loop.shard, sharding.fully_shard, sharding._views = shard, fully_shard, make_views
        return sharded

    loop.shard, sharding.fully_shard, sharding._views = watched, watched_group, watched_views
    return shown


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What two processes left, and then one."""
    place = tmp_path_factory.mktemp("sharded")
    launch(place)
    return place


def read(place, rank=0):
    rows = json.loads((place / f"rows-{rank}.json").read_text())
    return load_file(place / f"model-{rank}.safetensors"), rows


def assert_equal(place, model, rows, tolerance=1e-5, ranks=(0, 1)):
    for rank in ranks:
        found, found_rows = read(place, rank)
        for name, expected in model.items():
            torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance)
        for expected, row in zip(rows, found_rows, strict=True):
            # The mean of the micro-steps' ratios is not the ratio of their mean.
            other = row | {"compression_ratio": expected["compression_ratio"]}
            assert other == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_every_parameter_is_sharded_by_fsdp2_each_layer_and_each_gate_a_group(place):
    for rank in (0, 1):
        shown = json.loads((place / f"sharded-{rank}.json").read_text())
        layers = [f"model.model.layers.{i}" for i in range(2)]
        assert shown["left out"] == []
        assert {*shown["modules"]} == {"", *layers, *(f"{x}.self_attn.dms_gate" for x in layers)}
        assert shown["local"] == shown["whole"] // 2


def test_whole_parameters_are_let_go_group_by_group_while_sharding(place):
    """Were they held until the end, all of the model would be on each GPU for a moment."""
    held = json.loads((place / "sharded-0.json").read_text())["held"]
    assert held == sorted(held, reverse=True) and len(set(held)) == 5 and held[-1] == 0


@pytest.mark.parametrize("name", ["plain", *KINDS])
def test_two_sharded_processes_learn_what_one_whole_one_does(name, place):
    model, result = run(config=config(1, **KINDS.get(name, {})))
    assert any(x.abs().sum() > 0 for x in weights(model).values())
    learned = {key: x.detach() for key, x in model.named_parameters()}
    assert_equal(place / name, learned, result.rows)


def test_a_resume_by_as_many_processes_is_bit_for_bit(place):
    assert_equal(place / "resumed by 2", *read(place / "plain"), tolerance=0)


def test_a_checkpoint_of_two_processes_is_resumed_by_one(place):
    assert_equal(place / "resumed by 1", *read(place / "plain"), ranks=(0,))


def test_a_sharded_checkpoint_holds_parts_of_what_learns_and_no_pickled_tensors(place):
    checkpoint = place / "plain" / "checkpoint-7"
    parts = [load_file(x) for x in sorted(checkpoint.glob("shards/weights/*.safetensors"))]
    gates = [name for name, _ in make_model().named_parameters() if "dms_gate" in name]
    assert len(parts) == 2
    for part in parts:
        assert [part[f"model.{name}"].shape[0] for name in gates] == [1, 1]
    assert sum("threshold" in name for part in parts for name in part) == 2
    assert not list(checkpoint.glob("optimizer*"))


def test_the_saved_directory_is_the_one_of_a_single_process(place, tmp_path):
    dms.compress(
        plain_model(), recipe(1), data=make_data(), output_dir=tmp_path / "out", progress=False
    )
    assert {x.name for x in (place / "saved").iterdir()} == {
        x.name for x in (tmp_path / "out").iterdir()
    }
    one, two = dms.load(tmp_path / "out"), dms.load(place / "saved")
    found = dict(two.named_parameters())
    for name, weight in one.named_parameters():
        assert not isinstance(found[name], DTensor)
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    curves = [x.config.dms_curve["points"] for x in (one, two)]
    assert [x["kl"] for x in curves[0]] == pytest.approx([x["kl"] for x in curves[1]], abs=1e-5)
    ids = torch.tensor(make_data(1)[0])[None]
    two.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    assert dms.kv_stats(two).context_tokens >= LENGTH


def test_a_resume_with_other_samples_a_step_is_refused_by_name(place):
    stored = json.loads((place / "plain" / "run.json").read_text())
    key = "batch_size * gradient_accumulation_steps * processes"
    stored["retrofit"][key] = 4
    with pytest.raises(
        ResumeError, match=r"retrofit\.batch_size \* .*processes \(there 2, now 4\)"
    ):
        check_run(place / "plain", stored)


def test_a_missing_or_shortened_shard_is_refused_by_name(place, tmp_path):
    shutil.copytree(place / "plain", tmp_path / "run")
    description = json.loads((tmp_path / "run" / "run.json").read_text())
    shards = sorted((tmp_path / "run" / "checkpoint-7").rglob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    with pytest.raises(ResumeError, match=r"shard-00001.*safetensors is broken; remove"):
        check_run(tmp_path / "run", description)
    shards[0].unlink()
    with pytest.raises(ResumeError, match=r"shard-00001.*safetensors is missing; remove"):
        check_run(tmp_path / "run", description)


def test_sharding_without_a_launcher_is_refused(tmp_path):
    with pytest.raises(ShardingError, match=r"retrofit\.sharding='fsdp2' needs a launcher"):
        run(config=make_config(sharding="fsdp2"), output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_launcher_that_shards_by_itself_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ShardingError, match=r"accelerate's own FSDP is on"):
        run(config=make_config(sharding="fsdp2"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(Path(sys.argv[1]))
