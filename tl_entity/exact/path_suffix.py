"""What receivers get from senders, recomputed from their tokens and layers on."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity._pieces import SUFFIX, piece
from tl_entity.exact.blocks import (
    add_mlp,
    device_of,
    head_outputs,
    project,
)
from tl_entity.exact.path_runs import ByLayer, Inputs, Runs, sizes_of
from tl_entity.exact.window import (
    ANSWER_TOKEN,
    EVERY_TOKEN,
    Window,
    WindowEdit,
)
from tl_entity.hooks.points import HeadInput


@dataclass(frozen=True)
class Suffix:
    """A window whose tokens, from the receivers' to the answer's, are recomputed for many senders.

    Attributes:
        model: the model.
        runs: the recorded clean and corrupt runs.
        window: the prompts and tokens concerned.
        receivers: receiver heads by layer and by what of them is overwritten.
        inputs: what they get from each sender below, in the same order.
    """

    model: Model
    runs: Runs
    window: Window
    receivers: ByLayer
    inputs: Inputs

    def starts(self, senders: range) -> tuple[int, ...]:
        """The first receiver layer above its own is where a sender's change begins."""
        n = self.runs.per_layer
        first = {
            layer: min(r for r in self.receivers if r > layer)
            for layer in range(senders.start // n, (senders.stop - 1) // n + 1)
        }
        return tuple(first[sender // n] for sender in senders)

    @piece(
        SUFFIX,
        alike=lambda self, senders: (
            self.window.sizes,
            self.starts(senders),
            sizes_of(self.receivers),
        ),
    )
    def run(self, senders: range) -> Float[Tensor, "sender member d_model"]:
        """The final residual stream at the answer's token, for neighbouring senders."""
        cfg = self.model.cfg
        starts = self.starts(senders)
        rows = self.runs.deltas[0].new_empty(len(starts), *self.window.tokens.shape, cfg.d_model)
        for layer in range(starts[0], cfg.n_layers):
            begun = sum(start < layer for start in starts)
            now = sum(start <= layer for start in starts)
            rows = rows.to(device_of(self.model, layer))
            self._pass(layer, rows, slice(senders.start, senders.start + begun), now - begun)
        return rows[:, :, -1]

    @piece(
        alike=lambda self, layer, rows, begun, fresh: (
            self.window.sizes,
            rows.shape,
            begun.stop - begun.start,
            fresh,
            tuple((which, len(some)) for which, some in self.receivers.get(layer, {}).items()),
            layer == self.model.cfg.n_layers - 1,
        )
    )
    def _pass(
        self,
        layer: int,
        rows: Float[Tensor, "sender member window d_model"],
        begun: slice,
        fresh: int,
    ) -> None:
        """Take the rows through a layer, in place: of the senders whose change began below it, and
        of those after them, so many, whose change begins here."""
        old = begun.stop - begun.start
        now = old + fresh
        queries = ANSWER_TOKEN if layer == self.model.cfg.n_layers - 1 else EVERY_TOKEN
        if old:
            rows[:old, :, queries] += self.window.attention_output(
                self.model,
                layer,
                rows[:old],
                self.runs.keys_and_values(layer),
                edits=self._overwrite(layer, begun, queries),
                queries=queries,
            )
        if fresh:
            here = slice(begun.stop, begun.stop + fresh)
            rows[old:now, :, queries] = self._first_changed(layer, here, queries)
        rows[:now, :, queries] = add_mlp(self.model, layer, rows[:now, :, queries])

    def _overwrite(self, layer: int, senders: slice, queries: slice) -> dict[str, WindowEdit]:
        """What gives the receivers of a layer their input, at the first token of the window."""
        return {
            which: self._give(layer, which, senders)
            for which in self.receivers.get(layer, {})
            if which != "q" or not self._is_past(queries)
        }

    def _give(self, layer: int, which: HeadInput, senders: slice) -> WindowEdit:
        def give(vectors: Tensor) -> Tensor:
            vectors[:, :, 0, self.receivers[layer][which]] = self.inputs[layer][which][senders]
            return vectors

        return give

    def _is_past(self, queries: slice) -> bool:
        """Whether a query at the first token of the window has no effect any more."""
        return queries == ANSWER_TOKEN and len(self.window) > 1

    def _first_changed(
        self, layer: int, senders: slice, queries: slice
    ) -> Float[Tensor, "sender member query d_model"]:
        """`resid_mid` where the receivers' overwritten inputs are the only change so far.

        Only the receivers' own outputs are computed; all else is the clean run's.
        """
        model, window, given = self.model, self.window, self.receivers[layer]
        heads = sorted({head for some in given.values() for head in some})
        resid_mid = window.clean(self.runs["resid_mid", layer])[:, queries]
        resid_mid = resid_mid.expand(senders.stop - senders.start, -1, -1, -1).clone()
        touched = queries
        if set(given) == {"q"} and len(window) > 1:
            if self._is_past(queries):
                return resid_mid
            touched = slice(0, 1)
        normalized = model.blocks[layer].ln1(window.clean(self.runs["resid_pre", layer]))
        q = project(model, layer, "q", normalized[:, touched], heads)[None]
        k, v = (project(model, layer, which, normalized, heads)[None] for which in ("k", "v"))
        new: dict[HeadInput, Tensor] = {"q": q, "k": k, "v": v}
        for which, some in given.items():
            if which == "q" and self._is_past(queries):
                continue
            overwritten = new[which].expand(len(resid_mid), -1, -1, -1, -1).clone()
            index = [heads.index(head) for head in some]
            overwritten[:, :, 0, index] = self.inputs[layer][which][senders]
            new[which] = overwritten
        z_clean, z_new = (
            window.attend(
                model,
                layer,
                *vectors,
                self.runs.keys_and_values(layer),
                heads=heads,
                queries=touched,
            )
            for vectors in ((q, k, v), (new["q"], new["k"], new["v"]))
        )
        # Counted within resid_mid, which holds just the queries.
        rows = touched if queries == EVERY_TOKEN else EVERY_TOKEN
        resid_mid[:, :, rows] += head_outputs(model, layer, z_new - z_clean, heads)
        return resid_mid
