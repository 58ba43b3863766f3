"""Sequence mixers, models, tasks and the one functional train loop."""
