"""Benchmarks: ours, the peers and the ratio, in one run on this machine. `python -m jointfuse.bench --help`"""
