# SPDX-License-Identifier: Apache-2.0
"""Serving engines that run DMS models."""
