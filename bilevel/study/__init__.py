"""Comparing methods on a task: tables and reports."""
