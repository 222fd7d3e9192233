# SPDX-License-Identifier: Apache-2.0
"""The error of everything that reads data."""


class DataError(ValueError):
    """Training data that cannot be used; the message says which item and why."""
