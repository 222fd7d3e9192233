# SPDX-License-Identifier: Apache-2.0
"""What users write: the sections of a recipe, recipes and their schema, shipped files, output directories."""
