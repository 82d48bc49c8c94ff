"""The models on the straight way from the weights of one to those of another, and what each unit
does there.

At the point a of the way every weight is W + a D, where W is the base model's and D the change. A
unit's *rate* for a prompt is how fast the metric grows if only this unit's change grows: the
gradient with respect to the unit's weights, times D. It needs no gradient of a weight. A matrix
that makes y of x has the rate <dm/dy, x D>, which is known for each prompt by itself.

No third model is held: the weights at a are made for one layer at a time, on the way up, where only
the residual stream is kept, and again on the way down, where the layer is run once more with
gradients.
"""

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from transformer_lens import HookedTransformer

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.hooks.run import embed
from tl_entity.methods.weight_units import Place, Source, Unit, difference, place_of
from tl_entity.metrics import Metric
from tl_entity.models.architecture import refuse
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch, PromptBatch


@dataclass(frozen=True)
class WeightPath:
    """The way from one model to another.

    Attributes:
        base: the model at 0; it stays as it is.
        tuned: the model at 1; it stays as it is.
        changed: the parameters in which they differ, with their units.
    """

    base: HookedTransformer
    tuned: HookedTransformer
    changed: Mapping[str, tuple[Unit, ...]]

    def __post_init__(self) -> None:
        refuse(
            self.base.cfg,
            ("inputs apart", "heads apart", "quantised"),
            "Weights of this model have no shares: {reason}.",
        )

    @property
    def dtype(self) -> torch.dtype:
        """What everything is computed in: the models' own numbers, in float32 at least."""
        return torch.promote_types(self.base.cfg.dtype, torch.float32)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of all changed parameters, in the order of `rates`."""
        return tuple(unit for units in self.changed.values() for unit in units)

    @checked
    def rates(
        self, pairs: PairBatch, at: float, metric: Metric, start: Float[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "unit batch"]]:
        """The metric at one point of the way, and each unit's rate there.

        Args:
            pairs: the clean prompts are run, and their targets scored.
            at: the point, 0 to 1.
            metric: how runs are scored.
            start: the metric's values at 0, which its change is taken against; None at 0.

        Returns:
            The metric's values, not yet their change, and the rates of the metric's change.
        """
        prompts = pairs.clean
        with _computed_in(self.base, self.dtype), torch.no_grad():
            resid = [self._embedded(prompts, at)]
            for layer in range(self.base.cfg.n_layers):
                resid.append(self._run(layer, resid[-1], prompts, at))
            rows = torch.arange(len(prompts), device=resid[-1].device)
            last = prompts.position(ANSWER_POSITION).to(rows.device)
            whole = torch.zeros_like(resid[-1])
            final = resid.pop()[rows, last][:, None]
            with self._taped(None, at) as tape, torch.enable_grad():
                final.requires_grad_(True)
                logits = self._run(None, final, prompts, at)[:, 0]
                values = metric.of_logits(logits, pairs)
                change = metric.change(values, values.detach() if start is None else start)
                total = change.sum()
            found, gradient = tape.rates(total, final)
            whole[rows, last] = gradient[:, 0]
            gradient = whole
            for layer in reversed(range(self.base.cfg.n_layers)):
                below = resid.pop()
                with self._taped(layer, at) as tape, torch.enable_grad():
                    below.requires_grad_(True)
                    above = self._run(layer, below, prompts, at)
                rates, gradient = tape.rates(above, below, gradient.to(above.device))
                found |= rates
            found |= self._rates_of_embedding(prompts, gradient)
        in_order = [found[name].to(values.device) for name in self.changed]
        return values.detach(), torch.cat(in_order)

    def _run(self, layer: int | None, resid: Tensor, prompts: PromptBatch, at: float) -> Tensor:
        """One layer, or, with None, what comes after the last."""
        n_layers = self.base.cfg.n_layers
        how: dict[str, Any] = {
            "start_at_layer": n_layers if layer is None else layer,
            "stop_at_layer": None if layer is None else layer + 1,
            "attention_mask": prompts.mask.long(),
        }
        weights = self._weights(layer, at)
        return functional_call(self.base, weights, (resid,), how, tie_weights=False)

    def _names(self, layer: int | None) -> Iterable[str]:
        prefixes = ("ln_final.", "unembed.") if layer is None else (f"blocks.{layer}.",)
        return (name for name, _ in self.base.named_parameters() if name.startswith(prefixes))

    def _weights(self, layer: int | None, at: float) -> dict[str, Tensor]:
        """The layer's weights at this point, where they are not just those of the base."""
        weights: dict[str, Tensor] = {}
        for name in self._names(layer):
            ours = self.base.get_parameter(name).detach()
            wide = ours.to(self.dtype)
            if name in self.changed and at > 0:
                theirs = self.tuned.get_parameter(name).detach().to(ours.device, self.dtype)
                # Both ends are exactly the models' own.
                weights[name] = torch.lerp(wide, theirs, at)
            elif wide is not ours:
                weights[name] = wide
        return weights

    def _embedded(self, prompts: PromptBatch, at: float) -> Tensor:
        ours = embed(self.base, prompts).to(self.dtype)
        return ours if at == 0 else torch.lerp(ours, self._of_tuned(prompts, ours), at)

    def _of_tuned(self, prompts: PromptBatch, like: Tensor) -> Tensor:
        there = prompts.to(self.tuned.cfg.device or "cpu")
        return embed(self.tuned, there).to(like)

    def _rates_of_embedding(self, prompts: PromptBatch, gradient: Tensor) -> dict[str, Tensor]:
        if "embed.W_E" not in self.changed:
            return {}
        ours = embed(self.base, prompts).to(gradient)
        change = self._of_tuned(prompts, ours) - ours
        return {"embed.W_E": (change * gradient).sum((1, 2))[None]}

    @contextmanager
    def _taped(self, layer: int | None, at: float) -> Generator["_Tape", None, None]:
        """Within this context, what changed parameters of a layer read and write is kept."""
        prefix = "" if layer is None else f"blocks.{layer}."
        places: dict[str, Place] = {}
        for name in self._names(layer):
            found = place_of(name)
            if found is not None and name in self.changed:
                places[name] = found[1]
        with ExitStack() as stack:
            tape = _Tape(self, places)
            for place in places.values():
                tape.watch(self.base, prefix, place, stack)
            yield tape


@dataclass(frozen=True)
class _Tape:
    """What changed parameters read and wrote in one run of a layer.

    Attributes:
        path: the way.
        places: of the layer's changed parameters.
        read: for each source what was read, once for each call.
        written: by module.
    """

    path: WeightPath
    places: Mapping[str, Place]
    read: dict[Source, list[Tensor]] = field(default_factory=dict)
    written: dict[str, list[Tensor]] = field(default_factory=dict)

    def watch(self, model: HookedTransformer, prefix: str, place: Place, stack: ExitStack) -> None:
        """Take note of what the parameters at this place read and write."""
        if place.output not in self.written:
            written = self.written[place.output] = []
            module = model.get_submodule(prefix + place.output)

            def keep_output(module: Any, arguments: Any, output: Tensor) -> None:
                written.append(output)

            stack.callback(module.register_forward_hook(keep_output).remove)
        source = place.reads
        if source is not None and source not in self.read:
            read = self.read[source] = []
            module = model.get_submodule(prefix + source.module)

            def keep_input(module: Any, arguments: Any, named: Any, output: Tensor) -> None:
                if source.argument is None:
                    seen = output
                elif isinstance(source.argument, int):
                    seen = arguments[source.argument]
                else:
                    seen = named[source.argument]
                read.append(seen.detach())

            stack.callback(module.register_forward_hook(keep_input, with_kwargs=True).remove)

    def rates(
        self, above: Tensor, below: Tensor, gradient: Tensor | None = None
    ) -> tuple[dict[str, Float[Tensor, "unit batch"]], Tensor]:
        """The rates of the layer's units, and the gradient at what went into the layer.

        Args:
            above: what came out of it.
            below: what went into it.
            gradient: with respect to what came out; None if that is a number.
        """
        modules = [module for module, written in self.written.items() for _ in written]
        outputs = [output for written in self.written.values() for output in written]
        at_input, *at_outputs = torch.autograd.grad(above, [below, *outputs], gradient)
        by_module: dict[str, list[Tensor]] = {}
        for module, found in zip(modules, at_outputs, strict=True):
            by_module.setdefault(module, []).append(found)
        rates: dict[str, Tensor] = {}
        for name, place in self.places.items():
            change = difference(self.path.base, self.path.tuned, name, self.path.dtype)
            gradients = by_module[place.output]
            reads = self.read[place.reads] if place.reads else [None] * len(gradients)
            parts = [
                _rate(place, change, x, g, len(below))
                for x, g in zip(reads, gradients, strict=True)
            ]
            rates[name] = torch.stack(parts).sum(0)
        return rates, at_input


def _rate(
    place: Place, change: Tensor, x: Tensor | None, gradient: Tensor, n_prompts: int
) -> Float[Tensor, "unit batch"]:
    """<gradient, what the change adds to the output>, for each unit and prompt."""
    if x is None:
        products = gradient * change
    elif place.axes == "heads of columns":
        # One product for all heads: [d_model, head * d_head].
        together = x @ change.transpose(0, 1).flatten(1)
        products = gradient * together.view(gradient.shape)
    elif place.axes == "heads of rows":
        products = x * (gradient @ change.flatten(0, 1).T).view(x.shape)
    elif place.axes == "matrix":
        products = gradient * (x @ change)
    else:
        products = gradient * x * change
    if place.by_head:  # [batch pos head d_head]
        return products.sum((1, 3)).T
    # Norms of queries and keys have the prompts' tokens and heads one after another.
    return products.reshape(n_prompts, -1).sum(1)[None]


def bytes_per_prompt(model: Model, n_pos: int) -> int:
    """About what one prompt takes: the kept residual streams, one layer with its gradients, and the
    logits."""
    cfg = model.cfg
    layer = 14 * cfg.d_model + 8 * (cfg.d_mlp or 0) + 10 * cfg.n_heads * cfg.d_head
    numbers = n_pos * ((cfg.n_layers + 1) * cfg.d_model + layer) + 6 * cfg.n_heads * n_pos**2
    width = torch.finfo(torch.promote_types(cfg.dtype, torch.float32)).bits // 8
    return width * (numbers + 6 * cfg.d_vocab)


@contextmanager
def _computed_in(model: HookedTransformer, dtype: torch.dtype) -> Generator[None, None, None]:
    """Within this context the model's modules keep activations in this dtype."""
    before = model.cfg.dtype
    model.cfg.dtype = dtype
    try:
        yield
    finally:
        model.cfg.dtype = before
