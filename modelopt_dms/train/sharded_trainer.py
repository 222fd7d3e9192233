# SPDX-License-Identifier: Apache-2.0
"""The trainer of a distiller that FSDP2 has sharded: it is in its place already, and checkpoints are shards."""

from pathlib import Path

import torch
from torch import nn

from modelopt_dms.train.shards import load_optimizer, load_weights, save_shards
from modelopt_dms.train.trainer import RetrofitTrainer

SCHEDULER_FILE = "scheduler.pt"


class ShardedTrainer(RetrofitTrainer):
    """Takes what `sharding.shard` made; every process writes and reads its part of a checkpoint."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # It is there, and moving what FSDP2 manages fails.
        pass

    def _save_weights(self, checkpoint: Path) -> None:
        # Only one process comes here; weights are written with the optimizer's state, where all do.
        pass

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_weights(Path(resume_from_checkpoint), self.distiller)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_shards(Path(output_dir), self.distiller, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(Path(checkpoint), self.distiller, self.optimizer.optimizer)
        state = torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True)
        self.lr_scheduler.load_state_dict(state)
        for group, rate in zip(
            self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = rate
