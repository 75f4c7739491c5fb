"""Retrieval metrics from embeddings, over whole catalogues. The ops are in :mod:`torchfast.metrics.retrieval.ops`."""

from torchfast.metrics.retrieval import ops

__all__ = ["ops"]
