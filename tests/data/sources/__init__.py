"""Tests of the readers of log formats."""
