"""The report of a comparison: one HTML file that needs nothing else."""

from bilevel.study.report.write import Picture as Picture
from bilevel.study.report.write import Report as Report
from bilevel.study.report.write import Section as Section
from bilevel.study.report.write import Text as Text
from bilevel.study.report.write import chances as chances
from bilevel.study.report.write import domains as domains
from bilevel.study.report.write import over_training as over_training
from bilevel.study.report.write import write_report as write_report
