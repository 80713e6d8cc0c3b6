"""What a source raises for one clip or conversation that it cannot use, while the rest goes on."""

from __future__ import annotations


class Unusable(Exception):
    """reason: that is counted;  example: of it, for the user"""

    def __init__(self, reason: str, example: str) -> None:
        super().__init__(reason, example)
        self.reason, self.example = reason, example

    def __str__(self) -> str:
        return f"{self.reason}: {self.example}"
