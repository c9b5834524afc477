"""The contracts of the engines that this process knows. Arming keeps them, and a trainer in this process reads them."""

from __future__ import annotations

from typing import Any

# By vLLM's name of the engine (VllmConfig.instance_id); see bi_patch.arming.contract.
contracts: dict[str, dict[str, Any]] = {}


def keep(contract: dict[str, Any]) -> None:
    """Keep an engine's contract, if it has one."""
    if contract:
        contracts[contract["instance"]] = contract
