"""Pure array operations: attention and scans. No Flax, no configuration, no input or output."""
