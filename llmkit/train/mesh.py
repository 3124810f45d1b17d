"""Which processes learn from the same examples, and which from others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import distributed


@dataclass(frozen=True)
class Mesh:
    """A process of a training, by its number, among so many.

    Those that are next to each other, `tensor` of them, share the products of the same examples.
    """

    number: int = 0
    count: int = 1
    tensor: int = 1

    @classmethod
    def of_all(cls, tensor: int = 1) -> Mesh:
        """This process among all that PyTorch knows of."""
        if not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size(), tensor)

    @property
    def share(self) -> int:
        """Which share of a batch this process learns from."""
        return self.number // self.tensor

    @property
    def shares(self) -> int:
        """How many shares there are."""
        return self.count // self.tensor

    @property
    def part(self) -> int:
        """Which part of its share's products this process computes."""
        return self.number % self.tensor

    @property
    def speaker(self) -> int:
        """The number of the first process of those that learn from the same examples."""
        return self.number - self.part

    @property
    def counts(self) -> bool:
        """True in the process that speaks for all that learn from the same examples."""
        return self.part == 0
