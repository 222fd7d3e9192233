# SPDX-License-Identifier: Apache-2.0
"""Where a retrofit may report to: the integrations of transformers' Trainer, and what each needs installed.

Nothing here imports transformers: a package that is missing is named before it.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

Reporter = Literal[
    "all",
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
]
# Module -> package, for every integration.
NEEDS: dict[str, dict[str, str]] = {
    "azure_ml": {"azureml": "azureml-sdk"},
    "clearml": {"clearml": "clearml"},
    "codecarbon": {"codecarbon": "codecarbon"},
    "comet_ml": {"comet_ml": "comet-ml"},
    "dagshub": {"dagshub": "dagshub", "mlflow": "mlflow"},
    "dvclive": {"dvclive": "dvclive"},
    "flyte": {"flytekit": "flytekit"},
    "mlflow": {"mlflow": "mlflow"},
    "neptune": {"neptune": "neptune"},
    "swanlab": {"swanlab": "swanlab"},
    "tensorboard": {"tensorboard": "tensorboard"},
    "trackio": {"trackio": "trackio"},
    "wandb": {"wandb": "wandb"},
}


def as_list(value: Any) -> Any:
    """Trainer's ways to write it ("wandb", "none", null, a list) -> a list; anything else as it is, to be refused."""
    if value in (None, "none", ["none"]):
        return []
    return [value] if isinstance(value, str) else value


def check_installed(report_to: Sequence[str]) -> None:
    """Refuse integrations whose packages are not there; "all" means those that are.

    Raises:
        ValueError: names the integration and what to install.
    """
    for name in report_to:
        missing = [package for module, package in NEEDS.get(name, {}).items() if not _found(module)]
        if missing:
            raise ValueError(
                f"retrofit.report_to={name!r} needs {' and '.join(missing)}, not installed here: "
                f"pip install {' '.join(missing)}"
            )


def _found(module: str) -> bool:
    return find_spec(module) is not None
