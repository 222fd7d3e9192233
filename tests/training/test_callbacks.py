# SPDX-License-Identifier: Apache-2.0
"""Who watches a retrofit: callbacks of the caller, and Trainer's integrations by name."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import assert_same, make_config, make_data, make_model, plain_model, run
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import modelopt_dms as dms
from modelopt_dms.config.recipe import Recipe
from modelopt_dms.config.reporting import NEEDS
from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.training.callbacks import StoppedError
from modelopt_dms.training.checkpoint import checkpoints


class Watcher(TrainerCallback):
    """Keeps what it is told, and may stop the run in an event after a step."""

    def __init__(self, event=None, step=0):
        self.logs, self.event, self.step = [], event, step

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({"step": state.global_step, **logs})
        self._stop("on_log", state, control)

    def on_step_begin(self, args, state, control, **kwargs):
        self._stop("on_step_begin", state, control)

    def on_step_end(self, args, state, control, **kwargs):
        self._stop("on_step_end", state, control)

    def _stop(self, event, state, control):
        if event == self.event and state.global_step == self.step:
            control.should_training_stop = True


@pytest.fixture(scope="module")
def whole():
    """A run that nobody stops."""
    return run()


def test_a_callback_is_told_every_row_of_the_log_and_trainers_own_figures():
    watcher = Watcher()
    _, result = run(callbacks=[watcher])
    *rows, last = watcher.logs
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    for row, ours in zip(rows, result.rows, strict=True):
        assert {name: row[name] for name in ours} == ours
        assert row["grad_norm"] > 0
    assert {"loss", "kl", "target_cr", "compression_ratio", "learning_rate"} <= rows[0].keys()
    assert "train_runtime" in last


@pytest.mark.parametrize(
    ("event", "step", "kept"),
    [("on_step_end", 5, 5), ("on_log", 4, 4), ("on_step_begin", 4, 5), ("on_step_end", 3, 3)],
)
def test_a_run_that_a_callback_stops_is_saved_and_goes_on(event, step, kept, whole, tmp_path):
    with pytest.raises(StoppedError, match=f"at step {kept} of 7; the same call") as stopped:
        run(output_dir=tmp_path, callbacks=[Watcher(event, step)])
    assert stopped.value.step == kept
    assert checkpoints(tmp_path)[-1].name == f"checkpoint-{kept}"
    watcher = Watcher()
    assert_same(whole, run(output_dir=tmp_path, callbacks=[watcher]))
    assert watcher.logs[0]["step"] > step


def test_a_stop_in_the_last_step_is_the_end(whole):
    assert_same(whole, run(callbacks=[Watcher("on_step_end", 7)]))


def test_a_stop_without_an_output_directory_says_that_nothing_is_kept():
    with pytest.raises(StoppedError, match="at step 2 of 7; without an output_dir nothing"):
        run(callbacks=[Watcher("on_step_end", 2)])


def test_a_callback_may_ask_for_a_row_and_a_checkpoint(whole, tmp_path):
    class Eager(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = control.should_save = state.global_step == 5

    model, result = run(output_dir=tmp_path, callbacks=[Eager])
    assert [row["step"] for row in result.rows] == [5]
    # The last step is kept whatever a callback says.
    assert [x.name for x in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-7"]
    assert result.kl == whole[1].kl


def test_tensorboard_has_the_rows_once_also_after_a_run_was_killed(tmp_path):
    class Killed(BaseException):
        """Stands for a signal."""

    class Killer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

    config = make_config(report_to="tensorboard")
    with pytest.raises(Killed):
        run(config=config, output_dir=tmp_path, callbacks=[Killer()])
    _, result = run(config=config, output_dir=tmp_path)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    for name in ("kl", "loss", "compression_ratio", "target_cr", "learning_rate"):
        found = events.Scalars(f"train/{name}")
        assert [x.step for x in found] == [row["step"] for row in result.rows]
        assert [x.value for x in found] == pytest.approx([row[name] for row in result.rows])


def test_a_run_may_go_on_and_report_elsewhere(whole, tmp_path):
    with pytest.raises(StoppedError):
        run(output_dir=tmp_path, callbacks=[Watcher("on_step_end", 5)])
    assert not (tmp_path / "logs").exists()
    assert_same(whole, run(config=make_config(report_to=["tensorboard"]), output_dir=tmp_path))
    assert (tmp_path / "logs").is_dir()


def test_report_to_is_written_as_trainer_takes_it():
    assert RetrofitConfig().report_to == RetrofitConfig(report_to="none").report_to == []
    assert RetrofitConfig(report_to=None).report_to == []
    assert RetrofitConfig(report_to="wandb").report_to == ["wandb"]
    assert RetrofitConfig(report_to=["mlflow", "wandb"]).report_to == ["mlflow", "wandb"]
    with pytest.raises(ValueError, match="'wandb'"):
        RetrofitConfig(report_to="wandbb")


def test_every_integration_of_transformers_is_known_with_what_it_needs():
    # Kubeflow's is there where a variable of its own says so, whatever report_to is.
    assert {*INTEGRATION_TO_CALLBACK} - {"kubeflow"} == {*NEEDS}


def test_what_cannot_be_told_is_refused_before_anything_changes(tmp_path, monkeypatch):
    model = make_model()
    before = model.state_dict()["model.layers.0.self_attn.dms_gate.threshold"].clone()
    monkeypatch.setattr("modelopt_dms.config.reporting.find_spec", lambda name: None)
    for options, named in (
        ({"callbacks": [print]}, r"callbacks\[0\]=<built-in function print>: expected a"),
        ({"config": make_config(report_to="wandb")}, "needs wandb, not .*: pip install wandb"),
        (
            {"config": make_config(report_to="dagshub")},
            "needs dagshub and mlflow, .*: pip install dagshub mlflow",
        ),
    ):
        with pytest.raises(ValueError, match=named):
            run(model, output_dir=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    assert before.equal(model.state_dict()["model.layers.0.self_attn.dms_gate.threshold"])


def test_tensorboard_needs_a_place_for_its_files(tmp_path, monkeypatch):
    config = make_config(report_to="tensorboard")
    with pytest.raises(ValueError, match="give an output_dir, or set TENSORBOARD_LOGGING_DIR"):
        run(config=config)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    run(config=config)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [x.step for x in events.Scalars("train/kl")] == [2, 4, 6, 7]


def test_compress_hands_callbacks_to_its_retrofit(tmp_path):
    section = make_config().model_dump() | {"report_to": "tensorboard"}
    settings = {"window": 3, "scale": 100.0, "offset": 2.0, "target_cr": 2.0}
    recipe = Recipe(dms=settings, retrofit=section)
    options = {"data": make_data(), "output_dir": tmp_path / "out", "progress": False}

    def compressed(**more):
        return dms.compress(plain_model(), recipe, **options, **more)

    with pytest.raises(StoppedError, match="step 5 of 7"):
        compressed(callbacks=[Watcher("on_step_end", 5)])
    assert not (tmp_path / "out" / "config.json").exists()
    watcher = Watcher()
    compressed(callbacks=[watcher])
    assert [row["step"] for row in watcher.logs[:-1]] == [6, 7]
    assert (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out" / "retrofit").glob("checkpoint-*"))
    assert list((tmp_path / "out" / "retrofit" / "logs").iterdir())
    calibrated = Recipe(dms=settings, calibrate={})
    with pytest.raises(ValueError, match="the recipe has none"):
        dms.compress(plain_model(), calibrated, data=make_data(), callbacks=[Watcher])
