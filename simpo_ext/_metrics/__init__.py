"""Turns the outputs of the ops into the results of the public functions."""
