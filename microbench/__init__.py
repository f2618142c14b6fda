"""GPU microbenchmarks (none yet), and the results of every kind that are kept."""
