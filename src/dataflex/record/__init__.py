"""What a run did: events, plans, summary, plots."""
