"""The ops of the compiled library: registration, autograd, and a Python function for each.

Only this package uses ``torch.ops.simpo_ext``. It does not repeat the checks of
:mod:`simpo_ext._inputs`; the kernels guard their own memory accesses.
"""
