# SPDX-License-Identifier: Apache-2.0
"""Gates fitted in closed form to what future queries attend to, and the curve from thresholds to quality."""
