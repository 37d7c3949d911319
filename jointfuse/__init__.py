"""jointfuse: multimodal emotion recognition in conversation, trained by DeepSpeed over WebDataset shards."""

__version__ = "0.1.0"
