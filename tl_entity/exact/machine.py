"""The old place of `tl_entity.planning.machine`."""

# pyright: reportUnusedImport=false
from tl_entity.planning.machine import Machine, calibrate  # noqa: F401
