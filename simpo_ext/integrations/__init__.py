"""One module for each supported trainer. ``import simpo_ext`` imports none of them."""
