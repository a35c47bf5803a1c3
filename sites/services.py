"""What a project needs to know of a site before and after its jobs: what an hour costs in the site's own unit, how one
logs in, what the queue takes, how data move, who helps, where a model is kept once for all of a project.

Most of it holds for a whole centre and stands in ``centres/``; a profile may state it itself. What nobody has published
stands under ``unknown``, with where one would ask: a section that is there answers each of its questions in one way or
the other, and ``aifactory sites check`` proves it.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from aifactory_train.sites.fields import Positive, PositiveFloat, Seconds, SiteModel, Text


class Answers(SiteModel):
    """A section: each key is answered, or named under ``unknown`` with where one would ask."""

    unknown: dict[str, Text] = {}

    @model_validator(mode="after")
    def _unknown_is_unanswered(self) -> Answers:
        for key in self.unknown:
            if key not in type(self).model_fields or key == "unknown":
                raise ValueError(f"unknown names '{key}', which is no key of this section")
            if getattr(self, key) not in (None, [], {}):
                raise ValueError(f"'{key}' is stated and named as unknown")
        return self

    def unanswered(self) -> list[str]:
        """Keys that are neither stated nor named as unknown, of those that need an answer."""
        return [
            key
            for key in type(self).model_fields
            if key not in ("unknown", *self.unknown, *self.optional()) and getattr(self, key) in (None, [], {})
        ]

    def optional(self) -> tuple[str, ...]:
        """Keys that need no answer, because most sites have no such thing."""
        return ()


class Accounting(Answers):
    """What an hour is billed in. A GPU is what the scheduler counts (on MI250X one GCD)."""

    unit: str | None = None  # of an allocation: GPU-hours, core-hours, node-hours, SBU
    unit_is: str | None = None  # what one is, where the name does not say it
    charged: str | None = Field(default=None, pattern="^(node|gpu)$")  # node: whole nodes always; gpu: the share taken
    per_gpu_hour: PositiveFloat | None = None  # units for one GPU and hour
    per_node_hour: PositiveFloat | None = None  # units for a whole node and hour
    factors: dict[str, PositiveFloat] = {}  # partition or QoS -> factor on both
    minimum: str | None = None  # the least that is billed
    balance_command: str | None = None  # shows what is left

    def optional(self) -> tuple[str, ...]:
        return ("factors",)


class Login(Answers):
    """How one gets in; hosts stand in ``access.login_hosts``."""

    method: str | None = None  # key, certificate, password
    second_factor: str | None = None
    certificate_hours: PositiveFloat | None = None
    certificate_command: str | None = None
    jump_host: str | None = None
    notes: str | None = None

    def optional(self) -> tuple[str, ...]:
        return ("notes",) if self.method == "certificate" else ("notes", "certificate_hours", "certificate_command")


class Queue(Answers):
    """What the queue takes of one user, beside the limits of partitions and QoS."""

    default_time: Seconds | None = None  # of a job that names none
    max_submitted: Positive | None = None  # jobs of one user, queued and running
    max_running: Positive | None = None
    reservation: str | None = None  # how one is had
    typical_wait: str | None = None


class DataMovement(Answers):
    """How data come and go, and where a project keeps a model once for all its members."""

    transfer: str | None = None  # hosts or services for large transfers
    quota_command: str | None = None
    object_store: str | None = None
    model_cache: str | None = None  # template of a folder that all of a project read: {project}, {account}
    #: personal data of special categories: allowed | agreement (once one is made with the site) | elsewhere (the centre
    #: has another service for them) | no
    sensitive: str | None = Field(default=None, pattern="^(allowed|agreement|elsewhere|no)$")
    sensitive_rule: str | None = None  # the rule in a sentence

    def optional(self) -> tuple[str, ...]:
        return ("sensitive_rule",)


class Help(Answers):
    support: str | None = None
    documentation: str | None = None
    status: str | None = None  # page or command that tells whether the service runs


#: The sections by their key in a profile.
SECTIONS: dict[str, type[Answers]] = {
    "accounting": Accounting,
    "login": Login,
    "queue": Queue,
    "data": DataMovement,
    "help": Help,
}
