"""Measures of sampled stories."""
