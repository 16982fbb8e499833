"""Whole jobs from arguments to files: what recipes and command line run."""
