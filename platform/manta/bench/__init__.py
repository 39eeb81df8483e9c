"""Measurements of Manta itself: ratios within one run, medians, A and B in turn."""
