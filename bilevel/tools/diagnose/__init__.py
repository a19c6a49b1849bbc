"""A check before a long run: SAR and GAR of a short uniform training."""

from bilevel.tools.diagnose.diagnosis import command as command
