"""Figures of the paper and its released notebooks, to print beside ours (Prakash et al. 2024)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedModel:
    """What was published of one model, on prompts of seven boxes.

    Attributes:
        name: the model.
        accuracy: of the whole model.
        circuit_accuracy: of the circuit found in Llama-7B, run inside this model.
        faithfulness: the ratio of the two, as published.
        sizes: heads of the circuit found in *this* model by group, where published; for the
            fine-tunes another circuit than the one whose accuracy is given.
    """

    name: str
    accuracy: float
    circuit_accuracy: float
    faithfulness: float
    sizes: tuple[int, int, int, int] | None = None


PUBLISHED: tuple[PublishedModel, ...] = (
    PublishedModel("Llama-7B", 0.66, 0.66, 1.00, (40, 7, 20, 5)),
    PublishedModel("Vicuna-7B", 0.67, 0.65, 0.97),
    PublishedModel("Goat-7B", 0.82, 0.73, 0.89, (68, 28, 40, 39)),
    PublishedModel("FLoat-7B", 0.82, 0.72, 0.88, (68, 29, 40, 38)),
)
RANDOM_CIRCUIT_ACCURACY = (0.0, 0.01)
"""From lowest to highest, of random circuits of the sizes of Llama's."""

PUBLISHED_CMAP: dict[str, dict[str, float]] = {
    "Goat-7B": {
        "whole circuit": 0.82,
        "value_fetcher": 0.82,
        "pos_transmitter": 0.78,
        "pos_detector": 0.62,
        "struct_reader": 0.65,
    },
    "FLoat-7B": {
        "whole circuit": 0.82,
        "value_fetcher": 0.82,
        "pos_transmitter": 0.74,
        "pos_detector": 0.56,
        "struct_reader": 0.65,
    },
}
"""Llama-7B's accuracy with head outputs of a fine-tune, by fine-tune and by group: of the
*fine-tune's* circuit, each group cut down to heads that DCM selected in it."""

PUBLISHED_CMAP_SIZES: dict[str, tuple[int, int, int, int]] = {"Goat-7B": (56, 15, 18, 39)}
"""How many heads were patched, by group; Goat's whole circuit has 68/28/40/39, so that D is
whole."""

PUBLISHED_KINDS: dict[str, str] = {
    "value_fetcher": "object_value",
    "pos_transmitter": "position",
    "pos_detector": "position",
}
"""The desideratum by whose DCM heads a group is cut down for CMAP: what the paper says the group
carries. D is not cut down."""

PUBLISHED_KNOCKOUT: dict[int, float] = {16: 0.06, 20: 0.21, 24: 0.56, 31: 0.65}
"""Llama-7B's accuracy when the last token no longer sees the correct object from a layer up, by
that layer (of 32, counted from 0 as everywhere here; the released file counts from 1)."""

CITATION = (
    "Prakash, Shaham, Haklay, Belinkov, Bau: Fine-Tuning Enhances Existing Mechanisms: "
    "A Case Study on Entity Tracking. ICLR 2024, arXiv 2402.14811"
)
