"""Weighted one-dimensional k-means of every row of a matrix."""

from .kmeans import KMeans, kmeans_1d

__all__ = ["KMeans", "kmeans_1d"]
