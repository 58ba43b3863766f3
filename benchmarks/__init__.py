"""Measurements of kernels and train steps; imported by nothing."""
