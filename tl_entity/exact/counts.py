"""The old place of `tl_entity.planning.jobs`."""

# pyright: reportUnusedImport=false
from tl_entity.planning.jobs import (  # noqa: F401
    CircuitEvaluation,
    Count,
    Job,
    PathPatching,
    cross_model_patching,
    knockouts,
    mask_steps,
)
