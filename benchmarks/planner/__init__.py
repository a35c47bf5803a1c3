"""Published measurements as jobs of the planner, and the fit of its constants to them."""
