"""The policy of each platform that refuses what the feature table marks as refused."""

from typing import Any

from packaging.version import Version

from bi_patch.platforms import releases
from bi_patch.platforms.features import table
from bi_patch.seams import active
from bi_patch.seams.model import Policy


def policy(platform: str) -> Policy:
    """The policy `features.<platform>`."""

    def apply(config: Any) -> None:
        release = active.plan.release if active.plan is not None else Version(releases.BY_PLATFORM[platform][-1])
        table.check(config, platform, release)

    return Policy(
        name=f"features.{platform}",
        apply=apply,
        why="a feature that no patch point covers would change bits silently",
    )
