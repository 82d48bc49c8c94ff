"""Our own list of objects that can lie in a box."""

OBJECTS: tuple[str, ...] = tuple(
    """
    apple arrow bag ball bell belt blanket book boot bottle bowl branch bread brick brush bucket
    button cable cake camera candle cap card chain cheese clock cloth coat coffee coin cookie
    cotton crown cup diamond dish disk doll drum egg engine fan file flag flower fork frame
    fruit gift glass globe guitar hammer hat helmet hook jacket jar key knife ladder lamp leaf
    lemon letter lock magnet map mask medal milk mirror mouse needle note nut oil orange pan
    paper pen phone pill pin pipe plant plate pot radio ring rock rope rose shell shirt shoe
    soap sock spoon stamp stone sugar tape tea ticket toy tube wallet watch wheel wire
    """.split()
)
"""Everyday nouns; after a space each is one token for the LLaMA, Qwen2.5, SmolLM2 tokenizers."""
