"""Experiments on top of the package: the paper's findings at small scale, and recipes for the tiny assets."""
