"""What the Ascend areas share: how a seam or a configuration is refused."""

from bi_patch.errors import UnsupportedFeature


def refuse(name: str, found: list[str], todo: str = "Turn it off") -> None:
    """Raise UnsupportedFeature for the features that were found, if any."""
    if found:
        raise UnsupportedFeature(
            f"{name}: batch invariance on Ascend does not cover {', '.join(found)}. {todo}, or set BI_PATCH=0"
        )


def refusing(name: str, what: str, todo: str):
    """A seam's close: whoever calls the target is refused."""

    def close(original):
        def refused(*args, **kwargs):
            refuse(name, [what], todo)

        return refused

    return close


def option(config, name: str):
    """A value of vLLM-Ascend's --additional-config, None where it is not given. name: dotted."""
    held = getattr(config, "additional_config", None) or {}
    for part in name.split("."):
        held = held.get(part) if isinstance(held, dict) else None
    return held
