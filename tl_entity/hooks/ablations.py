"""What ablated heads and MLPs put out, and so what an ablation leaves in.

An ablation is a table of outputs and a rule that gives each token of a prompt a row of it:

- `pooled`: the mean over all tokens of the same role. It leaves what all of them have in common,
  not which of them it is.
- `resample`: the output at a token of the same role, drawn from another prompt. It leaves nothing
  of the prompt, and outputs are ones that the model makes.
- `index`: the mean over the tokens of the same index (Prakash et al. 2024, §3.3). In prompts of one
  length it still tells which token it is, such as the label of the third segment.
- `zero`: nothing at all. Heads that put out the same everywhere then count as needed.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.choices import AblationKind
from tl_entity.errors import InputError
from tl_entity.finite import check_finite
from tl_entity.results import Result
from tl_entity.tasks.batches import NO_ROLE, PromptBatch

if TYPE_CHECKING:
    import pandas as pd

LEAVES: dict[AblationKind, str] = {
    "pooled": "what all tokens of the same role have in common",
    "resample": "nothing of the prompt; outputs are those of another one",
    "index": "which token of the prompt it is, where prompts have one length",
    "zero": "nothing at all",
}
"""What each kind leaves of a head's output."""


@checked
@dataclass(frozen=True)
class Ablation(Result):
    """What ablated outputs are replaced by; made by `pooled_ablation` and its kin.

    Raises:
        NotFiniteError: if a value is NaN or infinite.

    Attributes:
        kind: what the outputs are taken from.
        outputs: `hook_z` of every head, by row; None for zeros.
        mlp_outputs: `hook_mlp_out` of every layer, by row; None if MLPs can't be ablated by it.
        role_names: of the prompts it was made from; empty where roles don't count.
        row_roles: index of each row's role in these, -1 for means by token index; None where roles
            don't count.
        row_prompts: which prompt each row comes from; None for means.
        prompt_tokens: these prompts' tokens, -1 at padding; None for means.
        index_from: the row with which means by token index begin, for tokens of the roles that
            `role_names` does not name; None if there are none.
        seed: of the draws.
    """

    kind: AblationKind
    outputs: Float[Tensor, "layer row head d_head"] | None
    mlp_outputs: Float[Tensor, "layer row d_model"] | None = None
    role_names: tuple[str, ...] = ()
    row_roles: Int[Tensor, " row"] | None = None
    row_prompts: Int[Tensor, " row"] | None = None
    prompt_tokens: Int[Tensor, "prompt length"] | None = None
    index_from: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.outputs is not None:
            axes = "The ablation values [layer, row, head, d_head]"
            check_finite(axes, self.outputs, "take them from sound runs")

    def __str__(self) -> str:
        return f"{self.kind}: leaves {LEAVES[self.kind]}"

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a role with how many rows of outputs it has; one in all where roles don't
        count."""
        import pandas as pd

        if self.row_roles is None:
            n = 0 if self.outputs is None else self.outputs.shape[1]
            return pd.DataFrame([{"kind": self.kind, "role": None, "n_outputs": n}])
        counts = (
            self.row_roles[self.row_roles >= 0].bincount(minlength=len(self.role_names)).tolist()
        )
        return pd.DataFrame(
            [
                {"kind": self.kind, "role": role, "n_outputs": n}
                for role, n in zip(self.role_names, counts, strict=True)
            ]
        )

    @classmethod
    def by_index(cls, outputs: Float[Tensor, "layer pos head d_head"]) -> "Ablation":
        """Outputs by token index, such as `mean_head_outputs` gives."""
        return cls("index", outputs, index_from=0)

    @classmethod
    def of(cls, given: "Ablation | Tensor") -> "Ablation":
        """An ablation as it is; of a tensor, outputs by token index."""
        return given if isinstance(given, Ablation) else cls.by_index(given)

    @checked
    def of_model(self, cfg: Any) -> "Ablation":
        """The same, for a model with this configuration: zeros are there in its shape.

        Raises:
            InputError: if it was made from a model of other sizes.
        """
        if self.outputs is None:
            return replace(
                self,
                outputs=torch.zeros(cfg.n_layers, 1, cfg.n_heads, cfg.d_head, dtype=cfg.dtype),
                mlp_outputs=torch.zeros(cfg.n_layers, 1, cfg.d_model, dtype=cfg.dtype),
            )
        sizes = (cfg.n_layers, cfg.n_heads, cfg.d_head)
        given = (self.outputs.shape[0], *self.outputs.shape[2:])
        if given != sizes:
            raise InputError(
                f"The mean outputs are of {given} layers, heads and d_head, the model has {sizes}."
            )
        return self

    @checked
    def rows(self, prompts: PromptBatch) -> Int[Tensor, "batch pos"]:
        """Which row each token takes. What a prompt's tokens take does not depend on the prompts
        that stand with it in a batch.

        Raises:
            InputError: if the prompts have no roles, or tokens of a role that no row has; by index,
                if they are longer than the outputs or padded on the left.
        """
        if self.kind == "zero":
            return torch.zeros_like(prompts.tokens)
        if self.kind == "index":
            return self._by_index(prompts)
        roles = self._roles(prompts)
        if self.kind == "resample":
            return self._drawn(prompts, roles)
        if self.index_from is None:
            return roles.clamp(min=0)
        return torch.where(roles < 0, self._by_index(prompts), roles)

    def _by_index(self, prompts: PromptBatch) -> Tensor:
        assert self.outputs is not None and self.index_from is not None
        n_rows, length = self.outputs.shape[1] - self.index_from, prompts.tokens.shape[1]
        if not bool(prompts.mask[:, 0].all()):
            raise InputError("Ablation needs prompts padded on the right, where positions line up.")
        if length > n_rows:
            raise InputError(
                f"The prompts have {length} tokens, the ablation values only {n_rows} positions; "
                "take the values from prompts of the same form."
            )
        tokens = torch.arange(length, device=prompts.tokens.device)
        return (self.index_from + tokens).expand(len(prompts), -1)

    def _roles(self, prompts: PromptBatch) -> Tensor:
        """Each token's role, counted as this ablation counts them."""
        assert self.row_roles is not None
        if prompts.roles is None:
            raise InputError(
                f"The {self.kind} ablation replaces a token's outputs by those of its role, and "
                "the prompts have no roles; give PromptBatch its roles, or ablate by index."
            )
        there = set(self.row_roles.tolist())
        number: list[int] = []
        for index, name in enumerate(prompts.role_names):
            known = self.role_names.index(name) if name in self.role_names else NO_ROLE
            needed = known not in there and self.index_from is None
            if needed and bool((prompts.roles == index).any()):
                raise InputError(
                    f"The {self.kind} ablation knows no token of role {name!r}; make it from "
                    "prompts of the same form."
                )
            number.append(known)
        # The last entry is what -1, the role of padding, looks up.
        table = torch.tensor([*number, NO_ROLE], device=prompts.roles.device)
        return table[prompts.roles]

    def _drawn(self, prompts: PromptBatch, roles: Tensor) -> Tensor:
        assert self.row_roles is not None and self.row_prompts is not None
        assert self.prompt_tokens is not None
        of_role = {
            role: (self.row_roles == role).nonzero()[:, 0].cpu().numpy()
            for role in range(len(self.role_names))
        }
        sources: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(self.prompt_tokens.tolist()):
            sources.setdefault(tuple(t for t in row if t >= 0), []).append(index)
        row_prompts = self.row_prompts.cpu().numpy()
        found = np.zeros(roles.shape, dtype=np.int64)
        for number, (tokens, mask) in enumerate(
            zip(prompts.tokens.cpu(), prompts.mask.cpu(), strict=True)
        ):
            ids = tokens[mask].tolist()
            generator = np.random.default_rng([self.seed, *ids])
            own = sources.get(tuple(ids), [])
            mine = roles[number].cpu().numpy()
            for role in np.unique(mine[mine >= 0]).tolist():
                # Never its own output: that would be no ablation.
                rows = of_role[role][~np.isin(row_prompts[of_role[role]], own)]
                if len(rows) == 0:
                    raise InputError(
                        f"No other prompt has a token of role {self.role_names[role]!r} to draw "
                        "from; make the ablation from more prompts."
                    )
                at = mine == role
                found[number, at] = rows[generator.integers(len(rows), size=int(at.sum()))]
        return torch.from_numpy(found).to(prompts.tokens.device)
