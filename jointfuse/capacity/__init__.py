"""What a training needs before it is started: memory, bytes on the wire, time, and the pool of the contrastive loss.

Nothing is trained and no weights are read: the model is built on torch's meta device, where tensors have shapes alone.
"""
