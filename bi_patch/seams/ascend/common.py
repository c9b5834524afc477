"""What the Ascend modules share: they refuse features, and read vLLM-Ascend's options."""

from bi_patch.errors import UnsupportedFeature


def refuse(name: str, found: list[str], todo: str = "Turn it off") -> None:
    """Raise UnsupportedFeature if `found` names features. name: the seam or policy that refuses them."""
    if found:
        raise UnsupportedFeature(
            f"{name}: batch invariance on Ascend does not cover {', '.join(found)}. {todo}, or set BI_PATCH=0"
        )


def refusing(name: str, what: str, todo: str):
    """A seam's close: the replacement raises UnsupportedFeature when it is called."""

    def close(original):
        def refused(*args, **kwargs):
            refuse(name, [what], todo)

        return refused

    return close


def option(config, name: str):
    """A value of vLLM-Ascend's --additional-config, or None if the user did not set it. name: a dotted path."""
    held = getattr(config, "additional_config", None) or {}
    for part in name.split("."):
        held = held.get(part) if isinstance(held, dict) else None
    return held
