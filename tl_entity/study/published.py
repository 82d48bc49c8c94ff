"""Figures of the paper; they stand in `tl_entity.studies.entity_tracking`."""

from tl_entity.studies.entity_tracking import CITATION as CITATION
from tl_entity.studies.entity_tracking import PUBLISHED as PUBLISHED
from tl_entity.studies.entity_tracking import PUBLISHED_CMAP as PUBLISHED_CMAP
from tl_entity.studies.entity_tracking import PUBLISHED_CMAP_SIZES as PUBLISHED_CMAP_SIZES
from tl_entity.studies.entity_tracking import PUBLISHED_KINDS as PUBLISHED_KINDS
from tl_entity.studies.entity_tracking import PUBLISHED_KNOCKOUT as PUBLISHED_KNOCKOUT
from tl_entity.studies.entity_tracking import RANDOM_CIRCUIT_ACCURACY as RANDOM_CIRCUIT_ACCURACY
from tl_entity.studies.entity_tracking import PublishedModel as PublishedModel
