"""Measuring what a compressed model can still do."""
