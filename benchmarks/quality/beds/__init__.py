"""Test beds for policies: each measures what a budget does to independent units, on one split or the other."""
