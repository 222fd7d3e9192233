# SPDX-License-Identifier: Apache-2.0
"""README.md of a compressed model, written from what was measured."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from modelopt_dms.config.recipe import Recipe

CARD_FILE = "README.md"
# Not a path: the card says nothing of the machine that it was written on.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
- dms
- kv-cache-compression
- modelopt
---

# A model whose KV cache forgets

{kind} with Dynamic Memory Sparsification (DMS, [arXiv:2506.05345](https://arxiv.org/abs/2506.05345)): each KV head of
{layers} attention layers decides which tokens it evicts from the KV cache.

```python
import modelopt_dms  # pip install modelopt-dms; without it, transformers refuses to load this directory
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIRECTORY_OR_HUB_ID)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY_OR_HUB_ID)
ids = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
print(modelopt_dms.kv_stats(model))
```

`modelopt_dms.load` does the same, and `modelopt_dms.set_compression` moves the ratio along the curve below.

## Measured

{measured}
## How it was made

A token stays readable for at least {window} tokens. The recipe is in `dms_recipe.yaml`, all numbers are in
`dms_summary.json`.{quantized}
"""


def card(model: PreTrainedModel, recipe: Recipe, summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of the card; the summary is that of dms_summary.json, by stage."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    dms_config = getattr(model.config, "dms_config", None)
    curve = getattr(model.config, "dms_curve", None)
    measured = _stages(summary) + ("" if curve is None else _curve(curve))
    return _TEXT.format(
        base=f"base_model: {name}\n" if _HUB_ID.fullmatch(name) else "",
        kind=f"A {model.config.get_text_config(decoder=True).model_type} model",
        layers="its" if dms_config is None else _layers(model),
        measured=measured or "Nothing: neither calibration nor training was part of the recipe.\n",
        window=0 if recipe.dms is None else recipe.dms.window,
        quantized=""
        if recipe.quantize is None
        else " Weights or KV cache are quantized by ModelOpt.",
    )


def _layers(model: PreTrainedModel) -> str:
    from modelopt_dms.modeling.convert import dms_modules

    return str(len(dms_modules(model)))


def _stages(summary: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        f"| {stage} | {x['sequence_length']} | {x['target_cr']:g} | {x['compression_ratio']:.2f} | {x['kl']:.4f} |\n"
        for stage, x in summary.items()
    ]
    head = (
        "On held-out samples; KL divergence is from the same model with its full KV cache, in nats a token.\n\n"
        "| stage | tokens of a sample | compression ratio asked | reached | KL |\n|---|---|---|---|---|\n"
    )
    return head + "".join(rows) + "\n" if rows else ""


def _curve(curve: Mapping[str, Any]) -> str:
    rows = [
        f"| {x['compression_ratio']:.2f} | {x['lowest_cr']:.2f} to {x['highest_cr']:.2f} | {x['kl']:.4f} |\n"
        for x in curve["points"]
    ]
    return (
        f"Other ratios, on held-out samples of {curve['length']} tokens:\n\n"
        "| compression ratio | of single samples | KL |\n|---|---|---|\n" + "".join(rows) + "\n"
    )
