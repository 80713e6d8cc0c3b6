"""Sampling, held-out metrics, closed loop, and the report."""
