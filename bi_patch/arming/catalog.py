"""The catalog of everything that arming puts in place: the start-up check's own seams, then those of seams/."""

from packaging.version import Version

from bi_patch.arming import startup_seams
from bi_patch.seams import plan as plan_module
from bi_patch.seams import registry
from bi_patch.seams.model import Catalog
from bi_patch.seams.plan import Plan

CATALOG = Catalog(startup_seams.SEAMS, (), ()) + registry.CATALOG

_names = [item.name for item in CATALOG.seams + CATALOG.variables + CATALOG.policies]
assert len(_names) == len(set(_names)), "two seams share a name"


def plan(release: Version, platform: str) -> Plan:
    """The plan for a release and a platform. Raises UnsupportedRelease for a release that bi_patch does not support."""
    return plan_module.make(CATALOG, release, platform)
