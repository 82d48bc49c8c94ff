"""Random heads to hold the found ones against."""

import random

from transformer_lens import HookedTransformer

from tl_entity import Circuit, Group, Head


def of_the_same_layers(
    model: HookedTransformer, circuit: Circuit, n_draws: int, *, seed: int
) -> list[Circuit]:
    """Circuits with another head of the same layer for each, none of them found at its token.

    Late layers act on the answer more than early ones do, so heads drawn from all layers would be
    too easy a control.
    """
    generator = random.Random(seed)
    found = circuit.heads_at()
    drawn = []
    for _ in range(n_draws):
        taken: set[tuple[str, Head]] = set()
        groups = []
        for group in circuit:
            heads = []
            for head in group.heads:
                others = [
                    other
                    for other in (Head(head.layer, index) for index in range(model.cfg.n_heads))
                    if other not in found[group.position] and (group.position, other) not in taken
                ]
                heads.append(generator.choice(others))
                taken.add((group.position, heads[-1]))
            groups.append(Group(group.name, group.position, tuple(sorted(heads))))
        drawn.append(Circuit(tuple(groups)))
    return drawn
