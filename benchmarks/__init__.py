"""Speed, memory and set-up cost of the sparse products on a GPU: one command each, see docs/performance.md."""
