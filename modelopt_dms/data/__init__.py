# SPDX-License-Identifier: Apache-2.0
"""From what a user has to packed samples of token ids."""


class DataError(ValueError):
    """Data that cannot be used; the message says which item and why."""
