"""Comparing methods on a task: typed settings, one registry of methods, runs, search, budgets, tables, report."""

from bilevel.study.task import Evaluate as Evaluate
from bilevel.study.task import Known as Known
from bilevel.study.task import Measure as Measure
from bilevel.study.task import Model as Model
from bilevel.study.task import ModelOptions as ModelOptions
from bilevel.study.task import ParamFilter as ParamFilter
from bilevel.study.task import Picture as Picture
from bilevel.study.task import SourceLanguages as SourceLanguages
from bilevel.study.task import Splits as Splits
from bilevel.study.task import Task as Task
from bilevel.study.task import Text as Text
from bilevel.study.task import Weighting as Weighting
from bilevel.study.task import evaluator as evaluator
from bilevel.study.task import mean_evaluator as mean_evaluator
from bilevel.study.task import rows_at_once as rows_at_once
