# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with our step, our log and small atomic checkpoints."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from modelopt_dms.config.compression_ratio import physical_cr, target_evicted_fraction
from modelopt_dms.config.output_dir import writing
from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.data.mixing import Visits
from modelopt_dms.gates.thresholds import curve_of
from modelopt_dms.training.checkpoint import (
    PARTIAL_DIR,
    WEIGHTS_FILE,
    commit,
    load_trained,
    save_trained,
)
from modelopt_dms.training.distill import Distiller, noise_seed
from modelopt_dms.training.progress import Progress, drawn_cr, scheduled_cr

# Scalars of a forward of the distiller that are logged.
MEASURED = ("loss", "kl", "rate", "evicted_soft", "evicted_hard")


class RetrofitTrainer(Trainer):
    """Trainer does the loop, gradient accumulation, clipping, the optimizer and its state, and data parallelism.

    Ours are the loss (a `Distiller`), the order of the data (`Visits`), the log (`Progress`) and the checkpoints.
    """

    control: TrainerControl

    def __init__(
        self,
        distiller: Distiller,
        arguments: TrainingArguments,
        visits: Visits,
        progress: Progress,
        directory: Path | None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.distiller, self.progress, self.directory = distiller, progress, directory
        self._micro_step = 0
        self._saved: int | None = None
        sampled = distiller.retrofit.cr_range is not None
        self._curve = curve_of(distiller.model) if sampled else None
        flow = _Flow(progress, distiller.retrofit, directory is not None, self._scheduled)
        super().__init__(
            distiller,
            arguments,
            train_dataset=visits,
            data_collator=default_data_collator,
            callbacks=[flow, *callbacks],
        )
        # It would print dictionaries.
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one micro-step, with the target and the noise that belong to it.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        step = self.state.global_step
        seed = None
        if self.distiller.retrofit.noise:
            seed = noise_seed(
                self.distiller.retrofit.seed, self.args.process_index, step, self._micro_step
            )
        target = self._scheduled(step)["target_fraction"]
        moved = 0.0 if self._curve is None else self._curve.at_fraction(target).shift
        out = model(**inputs, target=target, noise_seed=seed, moved=moved)
        self._micro_step = (self._micro_step + 1) % self.args.gradient_accumulation_steps
        measured = torch.stack(
            [out[name].detach().to(self.args.device, torch.float32) for name in MEASURED]
        )
        values = dict(
            zip(MEASURED, self.accelerator.reduce(measured, "mean").tolist(), strict=True)
        )
        values["compression_ratio"] = physical_cr(values["evicted_hard"], *self._shape())
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {step} (KL {values['kl']}); lower "
                f"learning_rate={self.args.learning_rate} or check the model's dtype"
            )
        self.progress.add(values)
        return out["loss"].to(self.args.device)

    def _scheduled(self, step: int) -> dict[str, float]:
        """What the recipe asks for at a step: the compression ratio, and the share of tokens to evict for it."""
        config, dms = self.distiller.retrofit, self.distiller.model.config.dms_config
        if config.cr_range is None:
            cr = scheduled_cr(step, config.steps, dms["target_cr"], config.ramp_fraction)
        else:
            lowest, highest = config.cr_range
            cr = drawn_cr(step, lowest, highest, config.seed)
        return {"target_cr": cr, "target_fraction": target_evicted_fraction(cr, *self._shape())}

    def _shape(self) -> tuple[int, int, int]:
        """Length of a sample, delay window, and protected first tokens."""
        distiller = self.distiller
        return distiller.retrofit.sequence_length, distiller.window, distiller.protect_first

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        # `Visits` has the order already.
        return torch.utils.data.SequentialSampler(cast(Visits, self.train_dataset))

    def _get_output_dir(self, trial: Any = None) -> str:
        # Trainer writes checkpoint-<step> in here; `commit` moves it when it is whole.
        return (
            str(self.directory / PARTIAL_DIR)
            if self.directory is not None
            else super()._get_output_dir(trial)
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Give callbacks a row of our log where one is due, with what Trainer itself has to say."""
        if self.control.should_log:
            row = self.progress.log()
            logs |= {name: x for name, x in row.items() if name != "step"}
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        # Whatever callback stops a run, and wherever: it can go on.
        if self.control.should_training_stop and self._saved != self.state.global_step:
            self._save_checkpoint(self.model)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        if self.directory is None:
            return
        self._saved = self.state.global_step
        with writing(self.directory):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            commit(self.directory, self.state.global_step)
        self.accelerator.wait_for_everyone()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        # The base model would be written each time, and the arguments pickled.
        if self.args.should_save and output_dir is not None:
            target = Path(output_dir)
            target.mkdir(parents=True, exist_ok=True)
            self._save_weights(target)
            self.progress.save(target)

    def _save_weights(self, checkpoint: Path) -> None:
        save_trained(self.distiller, checkpoint / WEIGHTS_FILE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_trained(self.distiller, Path(resume_from_checkpoint) / WEIGHTS_FILE)


class _Flow(TrainerCallback):
    """When to log and when to save."""

    def __init__(
        self, progress: Progress, config: RetrofitConfig, save: bool, scheduled: Any
    ) -> None:
        self.progress, self.config, self.save, self.scheduled = progress, config, save, scheduled
        self._learning_rate = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.start(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The one this step was taken with: the scheduler moves on before the step ends.
        self._learning_rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, last = state.global_step, state.global_step == self.config.steps
        scheduled = {**self.scheduled(step - 1), "learning_rate": self._learning_rate}
        self.progress.step(step, scheduled)
        control.should_log = last or step % self.config.logging_steps == 0
        control.should_save = self.save and (last or step % self.config.save_steps == 0)


def training_arguments(
    config: RetrofitConfig, device: torch.device, output_dir: Path
) -> TrainingArguments:
    """The recipe in Trainer's words; what it would print and when it would log and save by itself is switched off.

    Whom it reports to is not there: `reporters` makes those callbacks.
    """
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=min(config.warmup_steps, config.steps // 2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        optim="adamw_torch",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    # Several GPUs in one process would become nn.DataParallel; several processes become DDP.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
