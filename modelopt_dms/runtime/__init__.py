# SPDX-License-Identifier: Apache-2.0
"""Exported graphs: the ops they are made of, what their directory says, and the runtime that drives them."""
