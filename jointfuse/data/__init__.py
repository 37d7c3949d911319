"""Corpora, shards, the training order and the front end."""
