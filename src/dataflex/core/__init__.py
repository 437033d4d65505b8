"""Decisions without torch: schedules, plans, streams, subset rules, state, the contracts of methods."""
