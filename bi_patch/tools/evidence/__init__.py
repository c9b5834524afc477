"""The evidence: result files that say which code made them, and the tables that pages show.

kinds: what a file holds. store: writes, reads and chooses files. tables: makes Markdown.
"""

from bi_patch.tools.evidence.kinds import (
    CAUSES,
    Cost,
    CostRow,
    Evidence,
    FaultRow,
    Faults,
    Invariance,
    InvarianceRow,
    Parity,
    faults_caught,
    total_differing,
)
from bi_patch.tools.evidence.store import (
    RESULTS,
    EvidenceMissing,
    EvidenceUnreadable,
    Table,
    current,
    file_name,
    new,
    read,
    superseded,
    triton_release,
    write,
)
from bi_patch.tools.evidence.tables import commit, markdown

__all__ = [
    "CAUSES",
    "RESULTS",
    "Cost",
    "CostRow",
    "Evidence",
    "EvidenceMissing",
    "EvidenceUnreadable",
    "FaultRow",
    "Faults",
    "Invariance",
    "InvarianceRow",
    "Parity",
    "Table",
    "commit",
    "current",
    "faults_caught",
    "file_name",
    "markdown",
    "new",
    "read",
    "superseded",
    "total_differing",
    "triton_release",
    "write",
]
