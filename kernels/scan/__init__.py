"""Linear recurrences along the sequence axis: `linear_scan` and what it would run (`explain`)."""

from kernels.scan.api import explain, linear_scan

__all__ = ["explain", "linear_scan"]
