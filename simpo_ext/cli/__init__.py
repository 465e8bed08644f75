"""The commands of ``python -m simpo_ext``."""
