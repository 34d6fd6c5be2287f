"""What writing and reading do on a CPU beside products with weights, compiled where Numba is installed.

`compiled` has the kernels of a step of writing, `attending`, `turning` and `looking` those of reading, and
`compiling` what all are made of. `calls` gives those of a step the form of functions of tensors, which can be
recorded; `direct` and `blocks` have those that are called as they are. `team` runs one in the threads that
PyTorch computes with, and `loading` says whether there are any.
"""
