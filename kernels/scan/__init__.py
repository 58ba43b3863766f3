"""Recurrences along the sequence axis: `linear_scan`, Mamba's `selective_scan` and Mamba-2's `ssd`, and what each would run."""

from kernels.scan.api import explain, linear_scan
from kernels.scan.selective import explain_selective, selective_scan
from kernels.scan.ssd import explain_ssd, ssd

__all__ = ["explain", "explain_selective", "explain_ssd", "linear_scan", "selective_scan", "ssd"]
