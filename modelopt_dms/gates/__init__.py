# SPDX-License-Identifier: Apache-2.0
"""Who decides what is evicted: gates, where they read, and the thresholds of every compression ratio."""
