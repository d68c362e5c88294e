"""Arithmetic: a handful of fused operations, each with a numpy oracle."""
