"""Attention on graphs: the graph itself (`graph`), attention over neighbours without parameters (`neighbors`), the
layers with PyTorch Geometric's meaning (`layer` is what they share; `gat`, `transformer`, `hgt`), and mini-batches
(`sampling`). Users find all of it in `ruvector_numba` itself.
"""
