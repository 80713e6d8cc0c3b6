"""Tests of the data floor, and of the data that ship with the project."""
