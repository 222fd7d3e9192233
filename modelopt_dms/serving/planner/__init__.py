# SPDX-License-Identifier: Apache-2.0
"""How many sequences fit on a GPU, and how fast they decode at best: a model of memory and bandwidth."""
