"""Which architecture and size, and why, before anything is trained."""

from fieldguide.advisor.ranking import Advice, Option, advise

__all__ = ["Advice", "Option", "advise"]
