"""Exact softmax attention on any pattern: `attend`, what it would run (`explain`), and the values that describe a pattern."""

from kernels.attention import biases, masks
from kernels.attention.api import attend, explain
from kernels.attention.dropout import Dropout
from kernels.attention.merge import merge

__all__ = ["Dropout", "attend", "biases", "explain", "masks", "merge"]
