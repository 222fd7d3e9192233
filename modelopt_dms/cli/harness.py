# SPDX-License-Identifier: Apache-2.0
"""The command lm-eval: lm-evaluation-harness's own command line in this process, with "dms" in place of "hf"."""

import sys
from importlib.util import find_spec
from typing import Any

import typer

from modelopt_dms.cli.options import out, warn

# Every word behind the command is lm-eval's, --help too.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
# What lm-eval calls the model type that "dms" extends; the first one is its default.
HF_NAMES = ("hf", "hf-auto", "huggingface")


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness, with all of its own options, and say what the KV cache held."""
    if find_spec("lm_eval") is None:
        raise ValueError("lm-evaluation-harness is not installed: pip install lm-eval==0.4.13")
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    # Its parser reads the words there, and may put "run" before them.
    sys.argv = ["lm-eval", *context.args]
    parser = HarnessCLI()
    args = parser.parse_args()
    if args.command != "run":
        parser.execute(args)
        return
    from modelopt_dms.evaluation.lm_eval import models_made

    if _model_type(args) in HF_NAMES:
        args.model = "dms"
    with models_made() as made:
        parser.execute(args)
    lines = [line for model in made for line in model.lines()]
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    if not lines:
        warn("no DMS model was run by transformers (--model hf), so no KV cache was measured")


def _model_type(args: Any) -> str:
    """The model type that lm-eval will choose."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    stored = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
    return args.model or stored.get("model", HF_NAMES[0])
