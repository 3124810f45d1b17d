"""How much memory a training takes, by part: its own code runs on the meta device, where tensors have no storage.

So the answer holds for any family of models and any size, and takes a second or two.
"""

from __future__ import annotations

import resource
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from llmkit.model.objective import Batch, Objective, to_device
from llmkit.train.masters import Masters
from llmkit.train.zero import Zero, bucket_numbers

_META = torch.device("meta")


def peak_memory_bytes() -> int:
    """The most memory that was in use at once: of the GPU when there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Memory:
    """Bytes by part.

    `weights` are those that the model computes with; `masters` fp32 copies of them; `activations` the most that a
    micro-batch has at once, from its forward to its last gradient, the output layer's logits included; `kernels` the
    code that a library makes for each shape of a product. `flops` counts the operations of that micro-batch's matrix
    products, `products` their different shapes.
    """

    weights: int
    masters: int
    gradients: int
    optimizer: int
    activations: int
    flops: int
    products: int
    kernels: int = 0
    offloaded: int = 0  # in the machine's memory, not the device's

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.masters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    def spread(self, processes: int, numbers: int, together: int) -> Memory:
        """The same for each of some processes that share `numbers` fp32 parameters and all that belongs to them.

        `together` are the bytes of the parameters that are whole at once; their gradients take as many.
        """
        return replace(
            self,
            weights=4 * numbers // processes + 2 * together,
            masters=0,
            gradients=2 * self.gradients // processes,
            optimizer=self.optimizer // processes,
        )

    def zero(self, how: Zero, *, copied: bool, offloaded: bool) -> Memory:
        """The same for each of the processes of a training by DeepSpeed.

        `copied` says that the model computes with copies of fp32 masters; `offloaded`, that what is shared lies elsewhere.
        """
        share, optimizer = (
            self.gradients // how.count,
            self.optimizer // how.count,
        )  # fp32, a number for each trained one
        bucket = bucket_numbers(self.gradients // 4) * (8 if copied else 4)  # as it is filled, and as it is sent
        summed = share + (self.gradients if how.stage == 1 else 0)
        frozen_copies = self.masters - (self.gradients if copied else 0)
        here = 0 if offloaded else 1
        return replace(
            self,
            masters=frozen_copies + here * share,
            gradients=bucket + summed + here * 2 * share,  # also as DeepSpeed gives them, and as they are taken
            optimizer=here * optimizer,
            offloaded=(1 - here) * (3 * share + optimizer),
        )

    @property
    def parts(self) -> dict[str, int]:
        """What `total` is made of."""
        return {name: value for name, value in asdict(self).items() if name not in ("flops", "products", "offloaded")}


def predict_memory(
    model: Any,
    objective: Objective,
    batch: Batch,
    precision: str,
    device: torch.device,
    frozen_copies: bool,
    build_optimizer: Callable[[Masters], Any],
) -> Memory:
    """The memory of training `model`, on the meta device and with its frozen parameters marked, on one micro-batch.

    Consumes the model: its parameters are cast, as `precision` says. `device` is where it would be trained;
    `frozen_copies` says that fp32 originals of frozen weights are kept there, because bf16 does not hold them exactly.
    """
    masters = Masters(model, precision)
    copies = [weight for name, weight in masters.weights.items() if name in masters.copied]
    optimizer = build_optimizer(masters)
    optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return Memory(
        weights=_bytes(model.parameters()) + _bytes(model.buffers()),
        masters=_bytes(copies) + (_bytes(masters.frozen.values()) if frozen_copies else 0),
        gradients=_bytes([masters.gradients]),
        optimizer=_bytes(value for value in state if isinstance(value, torch.Tensor)),
        **_forward_and_backward(model, objective, batch, device),
    )


def _forward_and_backward(model: Any, objective: Objective, batch: Batch, device: torch.device) -> dict[str, int]:
    """The most bytes that one micro-batch has at once, and its floating-point operations."""
    shapes = to_device(batch, _META)
    shapes |= {name: batch[name] for name in ("cu_seq_lens_q", "lengths") if name in batch}  # whose values are read
    if "cu_seq_lens_q" not in batch:  # a mask is small, and its values would be read
        shapes.pop("attention_mask", None)
    model.train()
    with objective.computing(outline=device.type == "cuda"), _Counter() as counter:
        objective.loss(model, shapes).backward()
    return {"activations": counter.peak, "flops": counter.flops, "products": len(counter.products)}


class _Counter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is entered, for as long as they live, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.flops = 0
        self.products: set[tuple[Any, ...]] = set()
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = set(map(_key, _tensors((args, kwargs or {}))))
        found = function(*args, **(kwargs or {}))
        if (formula := flop_registry.get(getattr(function, "_overloadpacket", None))) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=found)
            self.products.add((function, *(tensor.shape for tensor in _tensors(args))))
        for tensor in _tensors(found):
            if _key(tensor) not in given | self._known:
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Those with storage of their own: the values of a sparse one were counted when they were made."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_sparse]


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
