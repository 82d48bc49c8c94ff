"""Numbers that are none, NaN and infinity: found in one pass, without a copy, and told where."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tl_entity.errors import InputError

DAMAGED = "the file is damaged, or the training that made it diverged"
"""What is to be said of weights in a file."""


class NotFiniteError(InputError):
    """Weights, activations or scores are NaN or infinite.

    Attributes:
        point: where in a run this began; None where that is not known yet.
    """

    def __init__(self, message: str, point: str | None = None) -> None:
        super().__init__(message)
        self.point = point


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers of all tensors are finite. A GPU is waited for once, not for each.

    Tensors of the meta device have no numbers that could be anything else.
    """
    there = [tensor.detach() for tensor in tensors if tensor.numel() and tensor.is_floating_point()]
    # A sum is the cheapest pass. It is finite only if all its terms are; that of finite numbers
    # can overflow, so what is not finite by its sum is looked at once more.
    if not there:
        return True
    sums = in_one_place([tensor.sum().double() for tensor in there])
    return is_true(sums.isfinite().all()) or all(map(_is_bounded, there))


def check_finite(name: str, tensor: Tensor, advice: str) -> None:
    """Make sure that every number of a tensor is finite.

    Args:
        name: what the tensor is, and where: the beginning of the sentence.
        tensor: any numbers.
        advice: what to do: its end.

    Raises:
        NotFiniteError: saying how many numbers are not, and where the first of them is.
    """
    if not are_finite([tensor]):
        wrong = ~tensor.detach().isfinite()
        raise NotFiniteError(f"{name} is not finite: {places(tensor, wrong)}; {advice}.")


def in_one_place(numbers: Sequence[Tensor]) -> Tensor:
    """Single numbers of several devices as one vector: on the meta device if one of them is there,
    from which nothing can be taken."""
    place = next((number.device for number in numbers if number.is_meta), numbers[0].device)
    return torch.stack([number.to(place) for number in numbers])


def is_true(found: Tensor) -> bool:
    """What a check of numbers came to; one on the meta device, where there are none, is passed."""
    return found.is_meta or bool(found)


def finite_logits(logits: Tensor) -> Tensor:
    """The same logits.

    Raises:
        NotFiniteError: if they are not finite.
    """
    if not are_finite([logits]):
        raise NotFiniteError(
            "The logits are not finite; numbers are too large for the model's dtype.", "logits"
        )
    return logits


def places(tensor: Tensor, wrong: Tensor) -> str:
    """How many numbers are wrong, and which is the first."""
    index = wrong.nonzero()[0].tolist()
    first = float(tensor.detach()[tuple(index)])
    return f"{int(wrong.sum())} of its {wrong.numel()} numbers, the first {first} at {index}"


def _is_bounded(tensor: Tensor) -> bool:
    # The least and the largest of some numbers are NaN if one of them is.
    return all(is_true(bound.isfinite()) for bound in tensor.aminmax())
