"""LoRA adapters in memory, and how they are merged into a base's weights as these stream by.

LoRA (Hu et al. 2021, arXiv 2106.09685), rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732)
and DoRA (Liu et al. 2024, arXiv 2402.09353).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PretrainedConfig

from tl_entity.errors import InputError
from tl_entity.finite import check_finite
from tl_entity.models.adapter_config import matches
from tl_entity.models.checkpoint import EMBEDDING, UNEMBEDDING


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to one matrix: `scale * b @ a`, or its transpose for an embedding.

    Attributes:
        a: [rank, in]; for an embedding [rank, d_vocab].
        b: [out, rank]; for an embedding [d_model, rank].
        scale: alpha over the rank, or over its root.
        magnitude: [out], the length of each row after the merge (DoRA); None for plain LoRA.
        is_embedding: whether the matrix holds a row a token.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    is_embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix that it belongs to."""
        rows, columns = len(self.b), self.a.shape[1]
        return (columns, rows) if self.is_embedding else (rows, columns)

    def merged(self, weight: Tensor) -> Tensor:
        """The changed matrix, in float32 at least; `weight` itself stays as it is."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = (factor.to(weight.device, dtype) for factor in (self.a, self.b))
        left, right = (a.T, b.T) if self.is_embedding else (b, a)
        merged = weight.to(dtype, copy=True).addmm_(left, right, alpha=self.scale)
        if self.magnitude is not None:
            lengths = torch.linalg.vector_norm(merged, dim=1)
            merged *= (self.magnitude.to(weight.device, dtype) / lengths)[:, None]
        return merged


@dataclass(frozen=True)
class TokenRows:
    """New rows of an embedding or unembedding, for some tokens (`trainable_token_indices`).

    Attributes:
        tokens: their numbers.
        rows: [token, d_model].
    """

    tokens: tuple[int, ...]
    rows: Tensor

    def put_into(self, weight: Tensor) -> Tensor:
        """The changed matrix; `weight` itself stays as it is."""
        dtype = torch.promote_types(weight.dtype, self.rows.dtype)
        changed = weight.to(dtype, copy=True)
        changed[torch.tensor(self.tokens, device=weight.device)] = self.rows.to(changed)
        return changed


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    peft keeps the base's own weights apart from what takes their place: of two tied embeddings, a
    tensor of the first kind changes both, one of the second only its own.

    Attributes:
        place: its folder, for messages.
        low_rank: by name of the weight it changes, in Hugging Face's names.
        replaced: tensors used in place of the base's (`modules_to_save`).
        base: tensors of the base itself that were saved with it: trained biases, and embeddings
            (`save_embedding_layers`), which have more or fewer rows than the base where the
            vocabulary was resized.
        rows: new rows of embeddings.
        ties: whether a change of one of two tied embeddings is a change of both
            (`ensure_weight_tying`).
        saves: `modules_to_save` of its configuration.
        targets: `target_modules` of its configuration.
        in_all_layers: whether it should be found in every module that `targets` names.
    """

    place: str
    low_rank: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor]
    base: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, TokenRows] = field(default_factory=dict)
    ties: bool = False
    saves: Sequence[str] = ()
    targets: list[str] | str | None = None
    in_all_layers: bool = True

    @property
    def changes(self) -> set[str]:
        """The names of the weights that it changes."""
        return {*self.low_rank, *self.replaced, *self.base, *self.rows}

    def d_vocab(self, of_base: int) -> int:
        """How many tokens the adapted model has, where its base has so many.

        Raises:
            InputError: if two of the adapter's tensors disagree.
        """
        sizes = {
            f"its {kind} {key}": tensor.shape[0]
            for kind, tensors in (
                ("tensor", self.base),
                ("tensor", self.replaced),
                ("LoRA weights for", self.low_rank),
            )
            for key, tensor in tensors.items()
            if key in (EMBEDDING, UNEMBEDDING) and len(tensor.shape) == 2
        }
        if len(set(sizes.values())) > 1:
            (one, first), (other, second) = (
                min(sizes.items(), key=lambda item: item[1]),
                max(sizes.items(), key=lambda item: item[1]),
            )
            raise InputError(
                f"{self.place} is for vocabularies of different sizes: {one} has {first} rows, "
                f"{other} {second}."
            )
        return next(iter(sizes.values()), of_base)

    def changed(self, key: str, *, tied: bool) -> bool:
        """Whether it changes this weight of a base whose embeddings are tied or are not."""
        return any(found is not None for found in self._changes_of(key, tied))

    def parts(self) -> bool:
        """Whether embeddings that are tied in the base are no longer so."""
        changes = [self._changes_of(key, tied=True)[1:] for key in (EMBEDDING, UNEMBEDDING)]
        return any(one is not other for one, other in zip(*changes, strict=True))

    def applied(self, key: str, tensor: Tensor, *, tied: bool) -> Tensor:
        """The tensor of this name with the adapter merged: the same one if it is not concerned.

        Args:
            key: its name.
            tensor: the base's.
            tied: whether embedding and unembedding are one in the base.

        Raises:
            InputError: if the adapter was made for another shape, or for a larger vocabulary of
                which it lacks the rows.
            NotFiniteError: if the merged tensor is NaN or infinite.
        """
        of_base, whole, low_rank, rows = self._changes_of(key, tied)
        for replacement in (of_base, whole):
            if replacement is not None:
                self._check_shape(key, replacement.shape, tensor.shape, resizes=True)
                tensor = replacement
        if key in (EMBEDDING, UNEMBEDDING):
            tensor = self._resized(key, tensor)
        if low_rank is not None:
            self._check_shape(key, low_rank.shape, tensor.shape)
            tensor = low_rank.merged(tensor)
        if rows is not None:
            self._check_rows(key, rows, tensor)
            tensor = rows.put_into(tensor)
        if self.changed(key, tied=tied):
            check_finite(
                f"{self.place}: {key} merged", tensor, "the adapter or its scaling is damaged"
            )
        return tensor

    def check_used(self, keys: set[str], base: str) -> None:
        """Make sure that the base has all that the adapter changes, and the adapter all it names.

        Args:
            keys: names of the base's weights.
            base: names the base in messages.

        Raises:
            InputError: naming a weight that only one of the two has.
        """
        unused = sorted(self.changes - keys)
        if unused:
            raise InputError(
                f"{self.place} was trained on another base, or for another task: it changes "
                f"{unused[0]}, which {base} does not have."
            )
        for key in sorted(keys - self.replaced.keys()):
            if not self.ties and any(is_part_of(key, module) for module in self.saves):
                raise InputError(
                    f"{self.place} has no {key}, which its modules_to_save name; it is incomplete "
                    "or was trained on another base."
                )
        if not self.in_all_layers:
            return
        for key in sorted(keys - {*self.low_rank, *self.replaced}):
            if key.endswith("proj.weight") and self._targets(key.removesuffix(".weight")):
                raise InputError(
                    f"{self.place} has no LoRA weights for {key.removesuffix('.weight')}, which "
                    "its target_modules name; it is incomplete or was trained on another base."
                )

    def _changes_of(
        self, key: str, tied: bool
    ) -> tuple[Tensor | None, Tensor | None, LowRank | None, TokenRows | None]:
        """What there is for a weight: for the base's own, in its place, merged, and row by row."""
        of_base, whole = self.base.get(key), self.replaced.get(key)
        low_rank, rows = self.low_rank.get(key), self.rows.get(key)
        other = {EMBEDDING: UNEMBEDDING, UNEMBEDDING: EMBEDDING}.get(key)
        if not tied or other is None:
            return of_base, whole, low_rank, rows
        # One weight, seen twice; its name as the embedding goes first.
        of_base = self.base.get(EMBEDDING, self.base.get(UNEMBEDDING))
        if self.ties and whole is None and low_rank is None:
            whole, low_rank = self.replaced.get(other), self.low_rank.get(other)
        if key == UNEMBEDDING and rows is None:
            # The rows of tied embeddings are always trained as one.
            rows = self.rows.get(EMBEDDING)
        return of_base, whole, low_rank, rows

    def _resized(self, key: str, tensor: Tensor) -> Tensor:
        """The rows of the tokens that the adapter was trained with."""
        wanted = self.d_vocab(len(tensor))
        if wanted <= len(tensor):
            # Resizing takes rows from the end.
            return tensor[:wanted]
        raise InputError(
            f"{self.place} was trained with a vocabulary of {wanted} tokens and lacks the new rows "
            f"of {key}, of which the base has {len(tensor)}; merge it with peft, onto the base "
            "resized as for the training, and give the merged folder."
        )

    def _check_shape(
        self, key: str, ours: Sequence[int], of_base: Sequence[int], *, resizes: bool = False
    ) -> None:
        # An embedding may have more or fewer rows.
        first = 1 if resizes and key in (EMBEDDING, UNEMBEDDING) else 0
        if len(ours) != len(of_base) or tuple(ours[first:]) != tuple(of_base[first:]):
            raise InputError(
                f"{self.place} was trained on another base: its {key} has shape "
                f"{tuple(ours)}, the base's {tuple(of_base)}."
            )

    def _check_rows(self, key: str, new: TokenRows, tensor: Tensor) -> None:
        self._check_shape(key, new.rows.shape, (len(new.tokens), tensor.shape[1]))
        beyond = [token for token in new.tokens if not 0 <= token < len(tensor)]
        if beyond:
            raise InputError(
                f"{self.place} was trained on another base: it has a row of {key} for token "
                f"{beyond[0]}, and there are {len(tensor)} tokens."
            )

    def _targets(self, module: str) -> bool:
        match self.targets:
            case "all-linear":
                return True
            case str() as pattern:
                return matches(pattern, module)
            case list() as names:
                return any(module == name or module.endswith(f".{name}") for name in names)
            case _:
                return False


def is_part_of(key: str, module: str) -> bool:
    """Whether a tensor belongs to a module that `modules_to_save` names: by the end of its name, as
    peft reads it."""
    parts = key.split(".")
    return any(".".join(parts[:length]).endswith(module) for length in range(1, len(parts)))


def adapted_config(config: PretrainedConfig, adapter: Adapter | None) -> PretrainedConfig:
    """The base's configuration, or a copy with the number of tokens that the adapter brings.

    Raises:
        InputError: if the adapter's embeddings disagree on that number.
    """
    d_vocab = config.vocab_size if adapter is None else adapter.d_vocab(config.vocab_size)
    if d_vocab == config.vocab_size:
        return config
    config = copy.deepcopy(config)
    config.vocab_size = d_vocab
    return config
