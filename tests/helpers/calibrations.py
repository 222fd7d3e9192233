# SPDX-License-Identifier: Apache-2.0
"""A tiny calibrated model."""

import numpy as np
import torch
from families import build

import modelopt_dms as dms
from modelopt_dms.gates.gate import gates

LENGTH = 64


WINDOW = 6


CONFIG = {"samples": 24, "sample_length": LENGTH, "batch_size": 4, "held_out": 16, "save_steps": 2}


IDS = torch.arange(48)[None] % 60


def documents(count=40, seed=0, shorter=True):
    """Random tokens, some documents shorter than a sample."""
    rng = np.random.default_rng(seed)
    short = rng.integers(20, LENGTH, count)
    lengths = [LENGTH if i % 3 or not shorter else int(short[i]) for i in range(count)]
    return [rng.integers(2, 60, n).tolist() for n in lengths]


def converted(family="llama", **facts):
    facts = {"window": WINDOW, "scale": 10.0, "target_cr": 3.0, **facts}
    return dms.apply_dms(build(family), facts).eval()


def calibrated(family="llama", config=None, data=None, **facts):
    model = converted(family, **facts)
    data = documents() if data is None else data
    result = dms.calibrate(model, {**CONFIG, **(config or {})}, data=data, progress=False)
    return model, result


def gate_state(model):
    return {
        f"{i}.{k}": x.clone()
        for i, gate in enumerate(gates(model))
        for k, x in gate.state_dict().items()
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key
