"""Weighted one-dimensional k-means of every row of a matrix."""

from any4_jax.clustering.kmeans import KMeans, kmeans_1d

__all__ = ["KMeans", "kmeans_1d"]
