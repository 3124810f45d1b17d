"""Which processes learn from the same examples, and which from others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """A process of a training, by its number, among so many.

    Those that are next to each other, `tensor` of them, share the products of the same tokens; `context` such groups, one
    after the other, share the tokens of the same examples.
    """

    number: int = 0
    count: int = 1
    tensor: int = 1
    context: int = 1

    @property
    def part(self) -> int:
        """Which part of the products this process computes."""
        return self.number % self.tensor

    @property
    def others(self) -> int:
        """How many processes compute the same part of the products, over which what is left of a weight is spread."""
        return self.count // self.tensor

    @property
    def place(self) -> int:
        """Which of these this process is."""
        return self.number // self.tensor

    @property
    def piece(self) -> int:
        """Which of those that share examples this process is."""
        return self.place % self.context

    @property
    def shares(self) -> int:
        """Into how many shares a batch is divided."""
        return self.others // self.context

    @property
    def share(self) -> int:
        """Which share of a batch this process learns from."""
        return self.place // self.context

    @property
    def speaker(self) -> int:
        """The number of the first process of those that compute the same tokens."""
        return self.number - self.part

    @property
    def speaks(self) -> bool:
        """True in one of the processes that compute the same tokens."""
        return self.part == 0

    @property
    def counts(self) -> bool:
        """True in one of the processes that learn from the same examples."""
        return self.speaks and self.piece == 0
