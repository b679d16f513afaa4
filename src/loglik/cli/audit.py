"""``loglik audit``: decisions from log-likelihoods, as tables, summaries and pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from loglik.cli.audits.calibration import AuditCalibration
from loglik.cli.audits.chain import AuditChain
from loglik.cli.audits.choice import AuditChoice
from loglik.cli.audits.data import AuditData
from loglik.cli.audits.effects import AuditEffects
from loglik.cli.audits.evidence import AuditEvidence
from loglik.cli.audits.follow_ups import AuditFollowUps
from loglik.cli.audits.knowledge import AuditKnowledge
from loglik.cli.audits.label_bias import AuditLabelBias
from loglik.cli.audits.make_traps import AuditMakeTraps
from loglik.cli.audits.membership import AuditMembership
from loglik.cli.audits.ood import AuditOOD
from loglik.cli.audits.option_order import AuditOptionOrder
from loglik.cli.audits.preferences import AuditPreferences
from loglik.cli.audits.provenance import AuditProvenance
from loglik.cli.audits.randomness import AuditRandomness
from loglik.cli.audits.reasoning import AuditReasoning
from loglik.cli.audits.recalibrate import AuditRecalibrate
from loglik.cli.audits.retrieval import AuditRetrieval
from loglik.cli.audits.scenarios import AuditScenarios
from loglik.cli.audits.self_knowledge import AuditSelfKnowledge
from loglik.cli.audits.template_bias import AuditTemplateBias
from loglik.cli.audits.thinksum import AuditThinkSum
from loglik.cli.audits.traps import AuditTraps
from loglik.cli.audits.uncertainty import AuditUncertainty

__all__ = ["Audit"]

Audits = (
    Annotated[AuditPreferences, tyro.conf.subcommand("preferences")]
    | Annotated[AuditCalibration, tyro.conf.subcommand("calibration")]
    | Annotated[AuditRecalibrate, tyro.conf.subcommand("recalibrate")]
    | Annotated[AuditUncertainty, tyro.conf.subcommand("uncertainty")]
    | Annotated[AuditSelfKnowledge, tyro.conf.subcommand("self-knowledge")]
    | Annotated[AuditReasoning, tyro.conf.subcommand("reasoning")]
    | Annotated[AuditChoice, tyro.conf.subcommand("choice")]
    | Annotated[AuditOptionOrder, tyro.conf.subcommand("option-order")]
    | Annotated[AuditLabelBias, tyro.conf.subcommand("label-bias")]
    | Annotated[AuditRandomness, tyro.conf.subcommand("randomness")]
    | Annotated[AuditTemplateBias, tyro.conf.subcommand("template-bias")]
    | Annotated[AuditRetrieval, tyro.conf.subcommand("retrieval")]
    | Annotated[AuditEvidence, tyro.conf.subcommand("evidence")]
    | Annotated[AuditThinkSum, tyro.conf.subcommand("thinksum")]
    | Annotated[AuditFollowUps, tyro.conf.subcommand("follow-ups")]
    | Annotated[AuditMembership, tyro.conf.subcommand("membership")]
    | Annotated[AuditMakeTraps, tyro.conf.subcommand("make-traps")]
    | Annotated[AuditTraps, tyro.conf.subcommand("traps")]
    | Annotated[AuditOOD, tyro.conf.subcommand("ood")]
    | Annotated[AuditProvenance, tyro.conf.subcommand("provenance")]
    | Annotated[AuditChain, tyro.conf.subcommand("chain")]
    | Annotated[AuditEffects, tyro.conf.subcommand("effects")]
    | Annotated[AuditScenarios, tyro.conf.subcommand("scenarios")]
    | Annotated[AuditKnowledge, tyro.conf.subcommand("knowledge")]
    | Annotated[AuditData, tyro.conf.subcommand("data")]
)


@dataclass(frozen=True)
class Audit:
    """Decide by likelihoods: read rows and a model, write a table, a summary and a page with the plots."""

    what: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Audits]]
    """What is audited."""

    def run(self) -> None:
        """The chosen audit."""
        self.what.run()
