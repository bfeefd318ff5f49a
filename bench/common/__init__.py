"""What the benchmarks share: timing, tables, records, models, workloads, peers."""
