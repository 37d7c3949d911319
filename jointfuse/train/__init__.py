"""Training by DeepSpeed: engine, loop, checkpoints. `python -m jointfuse.train` is one rank of it."""
