"""``dataflex compare``: a suite of runs, trained and evaluated alike, and what their differences are worth."""
