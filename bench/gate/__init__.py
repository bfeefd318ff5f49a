"""The compile gate: every kernel compiled for GPUs that need not be there, and its machine code checked."""
