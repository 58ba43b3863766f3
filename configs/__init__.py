"""Experiments: one file a task or a published table, each a `get_config(recipe)`."""
