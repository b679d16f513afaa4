"""``loglik audit``: decisions from log-likelihoods, as tables, summaries and pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from loglik.cli.audits.calibration import AuditCalibration
from loglik.cli.audits.choice import AuditChoice
from loglik.cli.audits.membership import AuditMembership
from loglik.cli.audits.ood import AuditOOD
from loglik.cli.audits.preferences import AuditPreferences
from loglik.cli.audits.provenance import AuditProvenance
from loglik.cli.audits.uncertainty import AuditUncertainty

__all__ = ["Audit"]

Audits = (
    Annotated[AuditPreferences, tyro.conf.subcommand("preferences")]
    | Annotated[AuditCalibration, tyro.conf.subcommand("calibration")]
    | Annotated[AuditChoice, tyro.conf.subcommand("choice")]
    | Annotated[AuditMembership, tyro.conf.subcommand("membership")]
    | Annotated[AuditOOD, tyro.conf.subcommand("ood")]
    | Annotated[AuditProvenance, tyro.conf.subcommand("provenance")]
    | Annotated[AuditUncertainty, tyro.conf.subcommand("uncertainty")]
)


@dataclass(frozen=True)
class Audit:
    """Decide by likelihoods: read rows and a model, write a table, a summary and a page with the plots."""

    what: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Audits]]
    """What is audited."""

    def run(self) -> None:
        """The chosen audit."""
        self.what.run()
