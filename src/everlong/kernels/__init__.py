"""What a step of writing does beside its products, and looking at keys, compiled where Numba is installed.

`compiled` and `looking` have the kernels, `compiling` what they are made of; `calls` gives those of a step
the form of functions of tensors, which can be recorded, and `direct` has those that are called as they are.
`team` runs one in the threads that PyTorch computes with, and `loading` says whether there are any.
"""
