"""Steps on a CPU, and what a step costs the host."""
