# SPDX-License-Identifier: Apache-2.0
"""One distillation step as one module: ids in, losses out.

Being a module whose forward holds teacher, student and loss, it can be wrapped by DDP or FSDP like any model.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.gates.gate import eviction_off, gate_parameters, record_alpha, set_relaxation
from modelopt_dms.kernels.reference import shift_decisions
from modelopt_dms.modeling.convert import dms_modules
from modelopt_dms.modeling.divergence import kl_divergence
from modelopt_dms.modeling.lm_head import input_device, last_hidden, output_head
from modelopt_dms.training.lora import adapters_off, is_adapter
from modelopt_dms.training.loss import mean_decision, rate_loss


class Distiller(nn.Module):
    """The student (a converted model) and its teacher: the same weights with eviction off, or a frozen copy.

    In training mode only the converted attention modules (and layers that recompute their activations) are in training
    mode: decisions are soft, but dropout stays off, as in the teacher. In eval mode decisions are hard.
    """

    def __init__(self, model: PreTrainedModel, config: RetrofitConfig) -> None:
        """Take a converted model; for train='all', copy it as the teacher."""
        super().__init__()
        self.model = model
        self.copy = copy.deepcopy(model).requires_grad_(False) if config.train == "all" else None
        self.retrofit = config
        self.window: int = model.config.dms_config["window"]
        self.protect_first: int = model.config.dms_config["protect_first"]
        self.shift: int = model.config.dms_config["decision_shift"]
        if hasattr(model, "hf_device_map"):
            # Tells Trainer to leave a model that is spread over devices where it is.
            self.hf_device_map = model.hf_device_map

    def train(self, mode: bool = True) -> "Distiller":
        """Set soft (True) or hard (False) decisions; see the class."""
        super().train(False)
        self.training = mode
        for module in (*dms_modules(self.model).values(), *_recomputed(self.model)):
            module.training = mode
        return self

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        tokens_ahead: Tensor,
        target: float,
        noise_seed: int | None,
        moved: float = 0.0,
    ) -> dict[str, Tensor]:
        """Losses and measures of a batch, all float32 scalars.

        Args:
            input_ids: packed samples [B, T].
            position_ids: positions [B, T] that restart at each document.
            tokens_ahead: [B, T], how many tokens of the document follow; -1 where padded.
            target: wanted share of evicted tokens among those whose eviction takes effect.
            noise_seed: fixes the noise of the soft decisions; None for none.
            moved: what is added to thresholds of soft decisions.

        Returns:
            loss, kl, rate; evicted_soft (training mode), evicted_hard and evicted_by_layer [layers]: shares of the
            tokens counted by `counted`.
        """
        device = input_device(self.model)
        input_ids, position_ids, tokens_ahead = (
            x.to(device) for x in (input_ids, position_ids, tokens_ahead)
        )
        teacher = self.model if self.copy is None else self.copy
        with torch.no_grad(), eviction_off(teacher), adapters_off(teacher):
            wanted = last_hidden(teacher, input_ids, position_ids)
        set_relaxation(self.model, noise_seed, self.retrofit.tau, moved)
        with record_alpha(self.model) as record:
            hidden = last_hidden(self.model, input_ids, position_ids)
        kl = kl_divergence(
            hidden,
            wanted.to(hidden.device),
            (tokens_ahead >= 0).to(hidden.device),
            output_head(self.model),
            output_head(teacher),
            direction=self.retrofit.kl_direction,
            chunk_tokens=self.retrofit.kl_chunk_tokens,
        )
        counted = self.counted(position_ids, tokens_ahead)
        governed = {i: shift_decisions(x, self.shift) for i, x in record.hard.items()}
        hard = torch.stack([mean_decision({i: x}, counted) for i, x in sorted(governed.items())])
        out = {"kl": kl, "evicted_by_layer": hard, "evicted_hard": mean_decision(governed, counted)}
        if self.training:
            soft = mean_decision(
                {i: shift_decisions(x, self.shift) for i, x in record.alphas.items()}, counted
            )
            rate = rate_loss(soft, target).to(kl.device) if counted.any() else torch.zeros_like(kl)
            out |= {
                "loss": kl + self.retrofit.rate_weight * rate,
                "rate": rate,
                "evicted_soft": soft,
            }
        return out

    def counted(self, position_ids: Tensor, tokens_ahead: Tensor) -> Tensor:
        """Which tokens [B, T] the rate of eviction is measured over: those whose eviction takes effect.

        A decision about one of the last window + 1 tokens of a document never changes anything in it. Were those
        tokens counted, gates could meet the target on them at no cost (what stands at the end of documents, such as
        questions, is easy to recognise) and save no memory; NVIDIA's code and the paper average over all tokens.
        """
        return (tokens_ahead > self.window) & (position_ids >= self.protect_first)


def noise_seed(seed: int, rank: int, step: int, micro_step: int) -> int:
    """Seed of the noise of one forward: the same when a run is resumed, different everywhere else."""
    return int(np.random.SeedSequence([seed, rank, step, micro_step]).generate_state(1)[0])


@contextmanager
def learning(model: PreTrainedModel, config: RetrofitConfig) -> Iterator[None]:
    """Inside, what the config names has gradients, no dropout acts, and no activations are kept if so configured.

    Afterwards everything is as before, but for the weights; gates have no noise.

    Raises:
        ValueError: there is nothing to train.
    """
    trained = (
        {id(p) for p in model.parameters()}
        if config.train == "all"
        else {id(p) for _, p in gate_parameters(model)}
        | {id(p) for name, p in model.named_parameters() if is_adapter(name)}
    )
    if not trained:
        raise ValueError(
            "retrofit.train='gates', but the gates have no parameters of their own (dms.gate='neuron'); use train='all'"
        )
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    dropouts = _dropout_rates(model)
    switch_recomputing = config.gradient_checkpointing and not _recomputed(model)
    try:
        for parameter, _ in gradients:
            parameter.requires_grad_(id(parameter) in trained)
        for module, name, _ in dropouts:
            setattr(module, name, 0.0)
        if switch_recomputing:
            _recompute_activations(model)
        yield
    finally:
        if switch_recomputing:
            _keep_activations(model)
        for module, name, rate in dropouts:
            setattr(module, name, rate)
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        set_relaxation(model, None, config.tau)


def _dropout_rates(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Rates that modules pass to functional dropout when in training mode: modules, names of attributes, values."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if "dropout" in name and isinstance(value, float)
    ]


def _recompute_activations(model: PreTrainedModel) -> None:
    options = {"use_reentrant": False}
    # transformers 5.2x renamed it, and warns about the old name.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    # That also made the embedding's output require gradients: only reentrant recomputation needs it, and it costs a
    # backward pass below the first gate.
    model.disable_input_require_grads()


def _keep_activations(model: PreTrainedModel) -> None:
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def _recomputed(model: nn.Module) -> list[nn.Module]:
    """Modules that recompute their activations, which they do in training mode only."""
    return [
        module for module in model.modules() if getattr(module, "gradient_checkpointing", False)
    ]
