"""What a step of writing does beside its products, each in one call, compiled where Numba is installed.

`compiled` has the kernels, `calls` gives them the form of functions of tensors, `team` runs one in the
threads that PyTorch computes with, and `loading` says whether there are any.
"""
