"""Path patching that recomputes only what a sender can change (same numbers as plain hooks).

With attention outputs held clean, a changed head travels through the residual stream and the MLPs
of its own token only. So each sender is one vector for each prompt, and the senders of all layers
pass the remaining MLPs as one growing batch: the *held* pass. If receivers are overwritten
afterwards, only tokens from theirs on and layers from theirs up can change: the *suffix* pass
recomputes just these, against the clean run's keys and values.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from tl_entity._typing import checked
from tl_entity.exact.blocks import (
    add_mlp_,
    attend,
    check_supported,
    head_outputs,
    project,
    rotate,
    row_slices,
)
from tl_entity.exact.memory import memory_budget
from tl_entity.heads import Head
from tl_entity.hooks.points import HeadInput, hook_point, kv_head, n_kv_heads
from tl_entity.hooks.run import record
from tl_entity.metrics import log_probability
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch

ROWS_ENOUGH = 4096
"""A matrix product with so many rows runs at full speed."""

LOGITS_CHUNK_BYTES = 64 * 2**20
"""Rows are unembedded in slices whose logits take about this much memory."""


@checked
@torch.no_grad()
def patched_log_probabilities(
    model: HookedTransformer,
    pairs: PairBatch,
    *,
    position: str,
    receivers: Sequence[Head] | None = None,
    receiver_input: HeadInput | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "layer head batch"]]:
    """The target's log probability in the clean run, and with each sender patched in turn.

    The same function as `tl_entity.hooks.path_patching.patched_log_probabilities`, which defines
    it, up to float rounding; a sender that gets its own clean value changes exactly nothing.

    Args:
        model: the model.
        pairs: clean and corrupt prompts.
        position: where senders and receivers are.
        receivers: heads whose input is patched; None to patch the logits directly.
        receiver_input: what of the receivers is patched; needed exactly if there are receivers.
        batch_size: pairs recomputed together; from the memory bound if left out.
        memory: bytes that intermediate results may take; found from the device if left out.
        progress: called with the number of runs done since the last call, one for each sender and
            pair.

    Raises:
        InputError: if the model is of an architecture that this engine does not recompute.
    """
    check_supported(model)
    memory = memory_budget(model.cfg.device) if memory is None else memory
    by_layer: dict[int, list[int]] = {}
    for receiver in sorted(set(receivers or ())):
        by_layer.setdefault(receiver.layer, []).append(receiver.head)
    top = model.cfg.n_layers if receivers is None else max(by_layer, default=0)
    if batch_size is None:
        batch_size = _pairs_within(model, pairs, memory)
    clean, patched = [], []
    for chunk in pairs.chunks(batch_size):
        runs = _Runs.record(model, chunk, position, by_layer, top)
        scores = runs.clean.expand(model.cfg.n_layers, model.cfg.n_heads, -1).clone()
        if top:
            if receivers is None:
                reached = _through_mlps(model, runs)
            else:
                assert receiver_input is not None
                reached = _through_receivers(model, runs, by_layer, receiver_input, memory)
            # A sender that keeps its value changes nothing, whatever rounding says.
            scores[:top] = reached.where(runs.sender_changes, runs.clean)
        clean.append(runs.clean)
        patched.append(scores)
        progress(scores.numel())
    return torch.cat(clean), torch.cat(patched, -1)


@dataclass(frozen=True)
class _Runs:
    """What the passes need of the clean and the corrupt run, and nothing more.

    Attributes:
        pairs: the pairs that were run.
        at: token index of the senders in each clean prompt.
        last: token index of the answer in each clean prompt.
        clean: the target's log probability in the clean run.
        delta_z: corrupt minus clean head outputs at the senders' token, for each layer.
        points: the recorded activations of the clean run by hook point name.
        top: layers from here up hold no sender that can reach a receiver.
    """

    pairs: PairBatch
    at: Int[Tensor, " batch"]
    last: Int[Tensor, " batch"]
    clean: Float[Tensor, " batch"]
    delta_z: list[Float[Tensor, "batch head d_head"]]
    points: dict[str, Tensor]
    top: int

    @classmethod
    def record(
        cls,
        model: HookedTransformer,
        pairs: PairBatch,
        position: str,
        receivers: dict[int, list[int]],
        top: int,
    ) -> "_Runs":
        n_layers = model.cfg.n_layers
        points: dict[str, str | None] = {
            hook_point(name, layer): position
            for layer in range(top)
            for name in ("z", "attn_out", "resid_mid")
        }
        z_points = [hook_point("z", layer) for layer in range(top)]
        for layer in range(min(receivers, default=n_layers), n_layers):
            points |= {hook_point(name, layer): None for name in ("rot_k", "v")}
            if layer in receivers:
                points |= {hook_point(name, layer): None for name in ("resid_pre", "resid_mid")}
        final = hook_point("resid_post", n_layers - 1)
        points[final] = ANSWER_POSITION
        seen = record(model, pairs.clean, points)
        corrupt = record(model, pairs.corrupt, dict.fromkeys(z_points, position)) if top else {}
        return cls(
            pairs=pairs,
            at=pairs.clean.position(position),
            last=pairs.clean.position(ANSWER_POSITION),
            clean=_score(model, seen.pop(final)[None], pairs.targets)[0],
            delta_z=[corrupt[name] - seen.pop(name) for name in z_points],
            points=seen,
            top=top,
        )

    def __getitem__(self, point: tuple[str, int]) -> Tensor:
        return self.points[hook_point(*point)]

    def at_senders(self, name: str, layer: int) -> Float[Tensor, "batch d_model"]:
        """The clean activation at the senders' token."""
        activation = self[name, layer]
        if activation.ndim == 2:
            return activation
        return activation[torch.arange(len(activation)), self.at]

    @property
    def sender_changes(self) -> Bool[Tensor, "top head batch"]:
        """Where a sender's corrupt value differs from its clean one."""
        return torch.stack([(delta != 0).any(-1).T for delta in self.delta_z])


def _through_mlps(model: HookedTransformer, runs: _Runs) -> Float[Tensor, "top head batch"]:
    """Log probabilities when the senders' changes reach the logits."""
    *_, (_, rows) = _held_pass(model, runs)
    patched = _score(model, rows, runs.pairs.targets)
    # With attention held, the scored token feels only senders at that very token.
    return patched.where(runs.at == runs.last, runs.clean).unflatten(0, (runs.top, -1))


def _held_pass(
    model: HookedTransformer, runs: _Runs
) -> Iterator[tuple[int, Float[Tensor, "senders batch d_model"]]]:
    """For each layer up to `top`, `resid_pre` at the senders' token, for all senders below it.

    Senders are in order of layer, then head. The rows are changed in place afterwards.
    """
    n_heads = model.cfg.n_heads
    rows = runs.clean.new_empty(
        runs.top * n_heads, len(runs.pairs), model.cfg.d_model, dtype=model.cfg.dtype
    )
    for layer in range(runs.top):
        below = layer * n_heads
        yield layer, rows[:below]
        rows[:below] += runs.at_senders("attn_out", layer)
        # Each head's change through its own slice of the output projection.
        w_o = model.blocks[layer].attn.W_O
        change = torch.bmm(runs.delta_z[layer].transpose(0, 1), w_o)
        rows[below : below + n_heads] = runs.at_senders("resid_mid", layer) + change
        add_mlp_(model, layer, rows[: below + n_heads].flatten(0, 1))
    yield runs.top, rows


def _through_receivers(
    model: HookedTransformer,
    runs: _Runs,
    receivers: dict[int, list[int]],
    receiver_input: HeadInput,
    memory: int,
) -> Float[Tensor, "top head batch"]:
    """Log probabilities when the senders' changes reach the receivers' input, and nothing else."""
    inputs = {
        layer: project(
            model,
            layer,
            receiver_input,
            model.blocks[layer].ln1(rows),
            receivers[layer],
        )
        for layer, rows in _held_pass(model, runs)
        if layer in receivers
    }
    n_senders = runs.top * model.cfg.n_heads
    patched = runs.clean.expand(n_senders, -1).clone()
    lengths = runs.last - runs.at + 1
    # Prompts with equally long suffixes are recomputed together, so no token is computed in vain;
    # one whose receivers come after the answer's token feels nothing.
    for length in lengths.unique().tolist():
        if length < 1:
            continue
        members = (lengths == length).nonzero().squeeze(1)
        suffix = _Suffix.of(model, runs, members, length, receivers, receiver_input, inputs)
        for senders in row_slices(n_senders, suffix.bytes_per_sender, memory // 2):
            final = suffix.run(senders)
            patched[senders, members] = _score(model, final, runs.pairs.targets[members])
    return patched.unflatten(0, (runs.top, -1))


@dataclass(frozen=True)
class _Suffix:
    """Prompts whose tokens from the receivers' to the answer's are recomputed for many senders.

    Attributes:
        model: the model.
        runs: the recorded clean and corrupt runs.
        members: the prompts concerned; all have suffixes of one length.
        tokens: the token indices of the suffix in each of these prompts.
        rotary: the same tokens counted without padding.
        receivers: receiver heads by layer.
        receiver_input: what of them is overwritten.
        inputs: for each receiver layer what its receivers get from each sender below.
    """

    model: HookedTransformer
    runs: _Runs
    members: Int[Tensor, " member"]
    tokens: Int[Tensor, "member suffix"]
    rotary: Int[Tensor, "member suffix"]
    receivers: dict[int, list[int]]
    receiver_input: HeadInput
    inputs: dict[int, Float[Tensor, "senders batch receivers d_head"]]

    @classmethod
    def of(
        cls,
        model: HookedTransformer,
        runs: _Runs,
        members: Tensor,
        length: int,
        receivers: dict[int, list[int]],
        receiver_input: HeadInput,
        inputs: dict[int, Tensor],
    ) -> "_Suffix":
        tokens = runs.at[members, None] + torch.arange(length, device=members.device)
        counted = runs.pairs.clean.mask[members].long().cumsum(1) - 1
        return cls(
            model=model,
            runs=runs,
            members=members,
            tokens=tokens,
            rotary=counted.gather(1, tokens),
            receivers=receivers,
            receiver_input=receiver_input,
            inputs={layer: vectors[:, members] for layer, vectors in inputs.items()},
        )

    @property
    def bytes_per_sender(self) -> int:
        cfg = self.model.cfg
        members, length = self.tokens.shape
        keys = self.runs.pairs.clean.tokens.shape[1] + length
        floats = 6 * cfg.d_model + cfg.n_heads * (6 * cfg.d_head + 3 * keys)
        return members * length * floats * self.runs.delta_z[0].element_size()

    def run(self, senders: slice) -> Float[Tensor, "sender member d_model"]:
        """The final residual stream at the answer's token, for a slice of senders."""
        cfg = self.model.cfg
        # The first receiver layer above its own is where a sender's change begins.
        starts = [
            min(r for r in self.receivers if r > sender // cfg.n_heads)
            for sender in range(senders.start, senders.stop)
        ]
        rows = self.runs.delta_z[0].new_empty(len(starts), *self.tokens.shape, cfg.d_model)
        for layer in range(starts[0], cfg.n_layers):
            begun = sum(start < layer for start in starts)
            now = sum(start <= layer for start in starts)
            # Above the last layer's attention, only the answer's token matters.
            ends = slice(-1, None) if layer == cfg.n_layers - 1 else slice(None)
            if begun:
                from_here = slice(senders.start, senders.start + begun)
                attn_out = self._attention(layer, rows[:begun], from_here, ends)
                rows[:begun, :, ends] += attn_out
            if now > begun:
                from_here = slice(senders.start + begun, senders.start + now)
                rows[begun:now, :, ends] = self._first_changed(layer, from_here, ends)
            ended = rows[:now, :, ends]
            if ended.is_contiguous():
                add_mlp_(self.model, layer, ended.flatten(0, 2))
            else:
                rows = ended.contiguous()
                add_mlp_(self.model, layer, rows.flatten(0, 2))
        return rows[:, :, -1]

    def _attention(
        self, layer: int, rows: Tensor, senders: slice, ends: slice
    ) -> Float[Tensor, "sender member query d_model"]:
        """The attention output of a layer whose whole suffix has changed."""
        model, cfg = self.model, self.model.cfg
        normalized = model.blocks[layer].ln1(rows.flatten(1, 2)).view(rows.shape)
        q = project(model, layer, "q", normalized[:, :, ends])
        k, v = (project(model, layer, which, normalized) for which in ("k", "v"))
        if layer in self.receivers:
            index = torch.tensor(self.receivers[layer])
            given = self.inputs[layer][senders]
            if self.receiver_input == "q":
                if q.shape[2] == rows.shape[2]:  # else the receivers' token is of no more use
                    q[:, :, 0, index] = given
            else:
                # Siblings that share a key-value head must keep theirs, so each gets its own copy.
                own = torch.tensor([kv_head(cfg, head) for head in range(cfg.n_heads)])
                k, v = k[..., own, :], v[..., own, :]
                (k if self.receiver_input == "k" else v)[:, :, 0, index] = given
        z = self._attend(
            layer,
            rotate(model, layer, q, self.rotary[:, ends]),
            (rotate(model, layer, k, self.rotary), v),
            heads=None,
            ends=ends,
        )
        return (
            head_outputs(model, layer, z, list(range(cfg.n_heads))) + model.blocks[layer].attn.b_O
        )

    def _first_changed(
        self, layer: int, senders: slice, ends: slice
    ) -> Float[Tensor, "sender member query d_model"]:
        """`resid_mid` where the receivers' overwritten input is the only change so far.

        Only the receivers' own outputs are computed; all else is the clean run's.
        """
        model, heads = self.model, self.receivers[layer]
        resid_pre = self._clean("resid_pre", layer)
        normalized = model.blocks[layer].ln1(resid_pre)
        q = project(model, layer, "q", normalized[:, ends], heads)[None]
        k, v = (project(model, layer, which, normalized, heads)[None] for which in ("k", "v"))
        given = self.inputs[layer][senders]
        resid_mid = self._clean("resid_mid", layer)[:, ends].expand(len(given), -1, -1, -1).clone()
        rotary = self.rotary[:, ends]
        touched = slice(None)
        if self.receiver_input == "q":
            if len(self.tokens[0]) > 1:
                if ends != slice(None):
                    return resid_mid  # a query before the answer's token has no effect any more
                touched = slice(0, 1)
                q, rotary = q[:, :, touched], rotary[:, touched]
            new_q, new_k, new_v = given[:, :, None], k, v
        else:
            n = len(given)
            new_q = q
            new_k, new_v = k.expand(n, -1, -1, -1, -1).clone(), v.expand(n, -1, -1, -1, -1).clone()
            (new_k if self.receiver_input == "k" else new_v)[:, :, 0] = given
        queries = touched if self.receiver_input == "q" else ends
        z = [
            self._attend(
                layer,
                rotate(model, layer, queries_of, rotary),
                (rotate(model, layer, keys, self.rotary), values),
                heads=heads,
                ends=queries,
            )
            for queries_of, keys, values in ((q, k, v), (new_q, new_k, new_v))
        ]
        resid_mid[:, :, touched] += head_outputs(model, layer, z[1] - z[0], heads)
        return resid_mid

    def _attend(
        self,
        layer: int,
        q: Tensor,
        suffix: tuple[Tensor, Tensor],
        *,
        heads: list[int] | None,
        ends: slice,
    ) -> Tensor:
        cfg = self.model.cfg
        prefix_length = int(self.tokens[:, 0].max())
        tokens = torch.arange(prefix_length, device=self.tokens.device)
        visible = self.runs.pairs.clean.mask[self.members, :prefix_length]
        visible = visible & (tokens < self.tokens[:, :1])
        prefix = [self.runs[name, layer][self.members, :prefix_length] for name in ("rot_k", "v")]
        if heads is not None:
            index = [kv_head(cfg, head) for head in heads]
            prefix = [vectors[:, :, index] for vectors in prefix]
        length = self.tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[ends]
        n = max(len(q), len(suffix[0]))
        return attend(
            q.expand(n, -1, -1, -1, -1),
            (prefix[0], prefix[1]),
            visible,
            (suffix[0].expand(n, -1, -1, -1, -1), suffix[1].expand(n, -1, -1, -1, -1)),
            causal,
            self.model.blocks[layer].attn.attn_scale,
        )

    def _clean(self, name: str, layer: int) -> Float[Tensor, "member suffix d_model"]:
        return self.runs[name, layer][self.members[:, None], self.tokens]


def _score(
    model: HookedTransformer,
    resid: Float[Tensor, "senders batch d_model"],
    targets: Int[Tensor, " batch"],
) -> Float[Tensor, "senders batch"]:
    """Log probability of the targets from the final residual stream."""
    rows = resid.flatten(0, 1)
    wanted = targets.repeat(len(resid))
    scores = torch.empty(len(rows), dtype=torch.promote_types(resid.dtype, torch.float32))
    scores = scores.to(resid.device)
    per_row = 3 * model.cfg.d_vocab_out * scores.element_size()
    for some in row_slices(len(rows), per_row, LOGITS_CHUNK_BYTES):
        logits = model.unembed(model.ln_final(rows[None, some]))[0]
        scores[some] = log_probability(logits, wanted[some])
    return scores.view(resid.shape[:2])


def _pairs_within(model: HookedTransformer, pairs: PairBatch, memory: int) -> int:
    """How many pairs' caches and held rows take at most half the memory.

    No more than make the matrix products large: beyond that, only progress would be seen later.
    """
    cfg = model.cfg
    caches = 2 * pairs.clean.tokens.shape[1] * n_kv_heads(cfg) * cfg.d_head
    rows = cfg.n_heads * cfg.d_model
    each = cfg.n_layers * (caches + 2 * rows) * (torch.finfo(cfg.dtype).bits // 8)
    enough = max(4, ROWS_ENOUGH // (cfg.n_layers * cfg.n_heads))
    return max(1, min(enough, memory // 2 // each))
