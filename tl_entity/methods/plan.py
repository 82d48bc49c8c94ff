"""The old place of `tl_entity.planning.plan`."""

# pyright: reportUnusedImport=false
from tl_entity.planning.plan import (  # noqa: F401
    Plan,
    PlannedJob,
    box_layout,
    entity_tracking_jobs,
    n_parameters,
    plan,
    read_configuration,
    spread_heads,
)
