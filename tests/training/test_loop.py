# SPDX-License-Identifier: Apache-2.0
"""A whole retrofit: it reaches its target, survives being killed, and refuses what it cannot go on from."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from paths import HELPERS
from safetensors.torch import load_file
from training_runs import LENGTH, assert_same, make_config, make_data, make_model, run, weights
from transformers import LlamaConfig, LlamaForCausalLM

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.data import DataError
from modelopt_dms.gates.gate import gate_parameters
from modelopt_dms.kvcache.hf_cache import kv_stats
from modelopt_dms.training.checkpoint import ResumeError, checkpoints
from modelopt_dms.training.loop import RetrofitResult, prepare
from modelopt_dms.training.trainer import RetrofitTrainer


@pytest.fixture(scope="module")
def whole():
    """A run of the default config that nothing interrupts."""
    return run()


class Killed(BaseException):
    """Stands for a signal."""


@pytest.fixture
def kill_after(monkeypatch):
    """A function that makes training stop dead after some micro-steps, once."""

    def arm(micro_steps):
        original, count = RetrofitTrainer.compute_loss, [0]

        def compute_loss(self, *args, **kwargs):
            count[0] += 1
            if count[0] == micro_steps + 1:
                raise Killed
            return original(self, *args, **kwargs)

        monkeypatch.setattr(RetrofitTrainer, "compute_loss", compute_loss)

    return arm


def test_gates_learn_to_reach_the_physical_ratio_at_the_threshold():
    model, result = run(config=make_config(steps=40, learning_rate=3e-3, ramp_fraction=0.5))
    assert result.compression_ratio >= 1.9
    assert result.evicted_soft == pytest.approx(result.evicted_hard, abs=0.1)
    assert result.kl >= 0
    assert result.rows[-1]["target_cr"] == 2.0
    assert result.rows[-1]["target_fraction"] == pytest.approx(0.5 * LENGTH / (LENGTH - 4))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_reported_ratio_is_the_one_of_the_physical_cache():
    model = make_model()
    config = make_config(steps=15, learning_rate=3e-3)
    prepared = prepare(model, config, DMSConfig(**model.config.dms_config), data=make_data())
    _, result = run(model, config, data=prepared)
    with torch.no_grad():
        model.eval()(input_ids=prepared.data.held_out.input_ids.long(), use_cache=True)
    assert result.compression_ratio > 1.05
    assert kv_stats(model).compression_ratio == pytest.approx(result.compression_ratio, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}, {"train": "all"}],
    ids=["plain", "recomputed", "accumulated", "all weights"],
)
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(options, tmp_path, kill_after):
    """Killed in step 6: after the checkpoint at 3 and the row at 4, which must not come twice."""
    config = make_config(**options)
    whole = run(config=config, output_dir=tmp_path / "whole")
    kill_after(5 * config.gradient_accumulation_steps)
    with pytest.raises(Killed):
        run(config=config, output_dir=tmp_path / "parts")
    assert [x.name for x in checkpoints(tmp_path / "parts")] == ["checkpoint-3"]
    resumed = run(config=config, output_dir=tmp_path / "parts")
    assert_same(whole, resumed)
    if config.train == "all":
        pairs = zip(whole[0].parameters(), resumed[0].parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    logs = [(tmp_path / x / "train_log.jsonl").read_text() for x in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [2, 4, 6, 7]


def test_a_checkpoint_holds_only_what_learns(tmp_path):
    model, _ = run(output_dir=tmp_path)
    found = checkpoints(tmp_path)
    assert [x.name for x in found] == ["checkpoint-6", "checkpoint-7"]
    trained = sum(p.numel() for _, p in gate_parameters(model))
    assert (found[-1] / "trained.safetensors").stat().st_size < 4 * trained + 500
    assert not list(found[-1].glob("*model*")) and not list(found[-1].glob("*.bin"))


def test_a_finished_run_is_not_trained_again(whole, tmp_path, kill_after):
    run(output_dir=tmp_path)
    kill_after(0)
    assert_same(whole, run(output_dir=tmp_path))


def test_without_an_output_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run()
    assert list(tmp_path.rglob("*")) == []


def test_nothing_is_printed_and_nobody_is_warned(capfd, recwarn):
    run()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert [str(x.message) for x in recwarn if "transformers" not in str(x.filename)] == []


def test_progress_bar_shows_ratio_divergence_and_evictions(capfd):
    run(progress=True)
    shown = capfd.readouterr().err
    for part in ("retrofit", "7/7", "CR ", "KL ", " soft ", " hard ", "lr "):
        assert part in shown


def test_a_checkpoint_is_whole_or_not_there(whole, tmp_path, monkeypatch):
    """Killed while the second checkpoint is being written: the run goes on from the first."""
    original, count = RetrofitTrainer._save_optimizer_and_scheduler, [0]

    def save(self, output_dir):
        count[0] += 1
        if count[0] == 2:
            raise Killed
        original(self, output_dir)

    monkeypatch.setattr(RetrofitTrainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(Killed):
        run(output_dir=tmp_path)
    assert (tmp_path / ".partial" / "checkpoint-6").is_dir()
    assert [x.name for x in checkpoints(tmp_path)] == ["checkpoint-3"]
    assert_same(whole, run(output_dir=tmp_path))
    assert list((tmp_path / ".partial").iterdir()) == []


def test_every_micro_step_has_noise_of_its_own(monkeypatch):
    used = []

    def record(*key):
        used.append(key)
        return len(used)

    monkeypatch.setattr("modelopt_dms.training.trainer.noise_seed", record)
    run(config=make_config(steps=3, gradient_accumulation_steps=2))
    assert used == [(0, 0, at, micro) for at in range(3) for micro in range(2)]


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_twice_the_batch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(HELPERS), *sys.path]!r}\n"
        "from training_runs import make_config, run, weights\n"
        "from safetensors.torch import save_file\n"
        "import os\n"
        "model, _ = run(config=make_config(noise=False, rate_weight=0.0, batch_size=1))\n"
        f"save_file(weights(model), {str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, str(script)], check=True)
    first, second = (load_file(tmp_path / rank) for rank in "01")
    expected = weights(run(config=make_config(noise=False, rate_weight=0.0))[0])
    for name, weight in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-6)
    assert any(weight.abs().sum() > 0 for weight in expected.values())


@pytest.mark.slow
def test_sigkill_at_any_time_leaves_a_run_that_goes_on(tmp_path):
    script = (
        f"import sys; sys.path[:0] = {[str(HELPERS), *sys.path]!r}\n"
        "from training_runs import make_config, run\n"
        f"run(config=make_config(steps=100, save_steps=1), output_dir={str(tmp_path)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=dict(os.environ))
    while not checkpoints(tmp_path) and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoints(tmp_path)
    config = make_config(steps=100, save_steps=50)
    assert_same(run(config=config), run(config=config, output_dir=tmp_path))


def test_another_run_in_the_same_directory_is_refused(tmp_path):
    run(output_dir=tmp_path)
    before = sorted(str(x) for x in tmp_path.rglob("*"))
    moved = make_model()
    with torch.no_grad():
        moved.lm_head.weight[0, 0] += 1
    for change, named in (
        ({"config": make_config(steps=9)}, r"retrofit.steps \(there 7, now 9\)"),
        (
            {"config": make_config(learning_rate=0.5)},
            r"retrofit.learning_rate \(there 0.001, now 0.5\)",
        ),
        ({"data": make_data()[1:]}, r"data.digest \(there '"),
        ({"model": make_model(window=4)}, r"dms.window \(there 3, now 4\)"),
        ({"model": moved}, r"model.digest \(there '"),
    ):
        with pytest.raises(ResumeError, match=named):
            run(output_dir=tmp_path, **change)
    assert sorted(str(x) for x in tmp_path.rglob("*")) == before


def test_a_run_may_go_on_with_another_checkpoint_interval_or_start_over(whole, tmp_path):
    run(output_dir=tmp_path)
    assert_same(whole, run(config=make_config(save_steps=5), output_dir=tmp_path))
    other = make_config(steps=4)
    _, result = run(config=other, output_dir=tmp_path, resume=False)
    assert result.steps == 4
    assert [x.name for x in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_damaged_checkpoints_are_refused_by_name(tmp_path):
    run(output_dir=tmp_path)
    newest = checkpoints(tmp_path)[-1]
    (newest / "trained.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ResumeError, match=r"checkpoint-7/trained\.safetensors cannot be read"):
        run(output_dir=tmp_path)
    (newest / "trained.safetensors").unlink()
    with pytest.raises(ResumeError, match=r"checkpoint-7/trained\.safetensors is missing; remove"):
        run(output_dir=tmp_path)
    state = checkpoints(tmp_path)[0] / "optimizer.pt"
    shutil.rmtree(newest)
    state.write_bytes(state.read_bytes().replace(b"exp_avg", b"exp_avf"))
    with pytest.raises(ResumeError, match=r"checkpoint-6/optimizer\.pt is broken"):
        run(output_dir=tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ResumeError, match=r"run\.json cannot be read"):
        run(output_dir=tmp_path)


def test_an_unwritable_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResumeError, match="cannot be written"):
        run(output_dir=tmp_path / "file" / "below")


def test_bad_input_is_refused_before_any_work(tmp_path):
    config = LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="has no gates"):
        run(LlamaForCausalLM(config))
    with pytest.raises(ValueError, match=r"target_cr=8 .*window=3.*sequence_length=16"):
        run(make_model(target_cr=8.0), make_config(sequence_length=16), output_dir=tmp_path)
    with pytest.raises(DataError, match="too short"):
        run(data=make_data(1), output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_run_stops_with_one_clear_error():
    model = make_model()
    for _, parameter in gate_parameters(model):
        parameter.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        run(model)


def test_one_seed_one_result_and_another_seed_another(whole):
    assert_same(whole, run())
    _, other = run(config=make_config(seed=1))
    assert other.rows != whole[1].rows


def test_summary_is_json_without_the_log(whole):
    _, result = whole
    assert isinstance(result, RetrofitResult)
    summary = json.loads(json.dumps(result.summary()))
    assert "rows" not in summary
    assert summary["tokens"] == 7 * 2 * LENGTH
    assert len(summary["evicted_by_layer"]) == 2
