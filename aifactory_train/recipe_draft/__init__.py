"""A recipe for a user's own rows: what the rows are (:mod:`.guesses`), and the file that says so (:mod:`.text`)."""
