"""Measurements; never installed with the package."""
