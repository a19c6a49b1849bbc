"""The report of a comparison: one HTML file that needs nothing else."""

from bilevel.study.report.write import Curve as Curve
from bilevel.study.report.write import Picture as Picture
from bilevel.study.report.write import RunRecord as RunRecord
from bilevel.study.report.write import Text as Text
from bilevel.study.report.write import write_report as write_report
