"""Analyses of learned weights, after Grangier, Ablin and Hannun (2024), sections 6.1 to 6.4 and appendix B."""

from bilevel.tools.analyses.running import command as command
